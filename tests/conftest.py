"""Properties draw new examples on a developer's machine, and the same ones where CI judges a change."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["BRIM_HISTORY"] = "off"  # nobody's own runs decide a test; one about history names a file of its own

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

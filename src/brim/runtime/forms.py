"""What makes a loop exact, by the loop's name."""

from __future__ import annotations

from typing import Any


def find_exact_form(loop: str) -> Any:
    """Return `brim.accumulate` for a plain loop, its counterparts for Accelerate and Lightning, else `brim.guard`."""
    if loop == "plain":
        from brim.runtime.accumulate import accumulate

        return accumulate
    if loop == "accelerate":
        from brim.runtime.accelerate_loop import exact_accelerate

        return exact_accelerate
    if loop == "lightning":
        from brim.runtime.lightning import LightningExact

        return LightningExact
    from brim.runtime.guard import guard

    return guard

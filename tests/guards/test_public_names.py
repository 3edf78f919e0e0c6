"""What `import brim` promises. A name is added here on purpose, and never taken away once released."""

from __future__ import annotations

import brim

PUBLIC = {
    "AccumulationReport", "BrimError", "CannotRecover", "DoesNotFit", "Estimate", "ExactAccumulation", "Export",
    "LightningExact", "ModelShape", "NeutralityReport", "Plan", "Recovery", "Strategy", "Trial", "Workload",
    "__version__", "accumulate", "accumulate_contrastive", "estimate", "exact_accelerate", "export", "guard",
    "load_plan", "load_run", "plan", "read_model", "save_plan", "schema", "trace", "trial", "unguard",
    "verify_accumulation", "verify_neutrality", "watch",
}  # fmt: skip


def test_public_names_are_frozen() -> None:
    assert set(brim.__all__) == PUBLIC
    assert list(brim.__all__) == sorted(brim.__all__)


def test_every_public_name_is_there_and_documented() -> None:
    for name in brim.__all__:
        value = getattr(brim, name)
        assert isinstance(value, str) or value.__doc__, name
    assert set(brim.__all__) <= set(dir(brim))


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(brim, "no_such_name")

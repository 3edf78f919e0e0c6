"""The verbs end to end: read what is outside, let the planner choose, write it down. One file per family of verbs."""

from __future__ import annotations

from brim.api.files import export, load_plan, load_run, save_plan, schema
from brim.api.measured import (
    Wanted,
    add_observation,
    count_observations,
    describe_observations,
    export_history,
    forget,
    import_history,
    list_calibrations,
    list_observations,
)
from brim.api.plans import estimate, plan, trace
from brim.api.proofs import verify_accumulation, verify_neutrality
from brim.api.runs import trial
from brim.planner.document import describe_estimate, describe_estimates, describe_plan
from brim.trials.record import describe_trial

__all__ = [
    "Wanted", "add_observation", "count_observations", "describe_estimate", "describe_estimates",
    "describe_observations", "describe_plan", "describe_trial", "estimate", "export", "export_history", "forget",
    "import_history", "list_calibrations", "list_observations", "load_plan", "load_run", "plan", "save_plan", "schema",
    "trace", "trial", "verify_accumulation", "verify_neutrality",
]  # fmt: skip

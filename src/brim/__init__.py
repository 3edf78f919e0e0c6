"""Brim fills a GPU to the brim and never over: training configurations that fit, are fastest, and stay exact."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brim.api import (
        estimate,
        export,
        load_plan,
        load_run,
        plan,
        save_plan,
        schema,
        trace,
        trial,
        verify_accumulation,
        verify_neutrality,
    )
    from brim.api.watched import guard, watch
    from brim.checks.report import AccumulationReport, NeutralityReport
    from brim.cost.ledger import Estimate
    from brim.errors import BrimError, CannotRecover, DoesNotFit
    from brim.exporters.record import Export
    from brim.planner.record import Plan
    from brim.readers.sources import read_model
    from brim.runtime.accelerate_loop import exact_accelerate
    from brim.runtime.accumulate import accumulate
    from brim.runtime.contrastive import accumulate_contrastive
    from brim.runtime.guard import unguard
    from brim.runtime.lightning import LightningExact
    from brim.runtime.recover import Recovery
    from brim.runtime.trainer import ExactAccumulation
    from brim.spec.model import ModelShape
    from brim.spec.strategy import Strategy
    from brim.spec.workload import Workload
    from brim.trials.record import Trial

__version__ = "0.1.0"

_HOMES = {
    "plan": "brim.api",
    "estimate": "brim.api",
    "export": "brim.api",
    "save_plan": "brim.api",
    "load_plan": "brim.api",
    "load_run": "brim.api",
    "schema": "brim.api",
    "trace": "brim.api",
    "trial": "brim.api",
    "verify_accumulation": "brim.api",
    "verify_neutrality": "brim.api",
    "accumulate": "brim.runtime.accumulate",
    "accumulate_contrastive": "brim.runtime.contrastive",
    "exact_accelerate": "brim.runtime.accelerate_loop",
    "LightningExact": "brim.runtime.lightning",
    "Recovery": "brim.runtime.recover",
    "guard": "brim.api.watched",
    "unguard": "brim.runtime.guard",
    "ExactAccumulation": "brim.runtime.trainer",
    "watch": "brim.api.watched",
    "AccumulationReport": "brim.checks.report",
    "NeutralityReport": "brim.checks.report",
    "read_model": "brim.readers.sources",
    "Plan": "brim.planner.record",
    "Estimate": "brim.cost.ledger",
    "Export": "brim.exporters.record",
    "Trial": "brim.trials.record",
    "Workload": "brim.spec.workload",
    "Strategy": "brim.spec.strategy",
    "ModelShape": "brim.spec.model",
    "BrimError": "brim.errors",
    "CannotRecover": "brim.errors",
    "DoesNotFit": "brim.errors",
}
"""Where each public name lives; a name is imported when it is first used, so `import brim` stays tiny."""

__all__ = [
    "AccumulationReport", "BrimError", "CannotRecover", "DoesNotFit", "Estimate", "ExactAccumulation", "Export",
    "LightningExact", "ModelShape", "NeutralityReport", "Plan", "Recovery", "Strategy", "Trial", "Workload",
    "__version__", "accumulate", "accumulate_contrastive", "estimate", "exact_accelerate", "export", "guard",
    "load_plan", "load_run", "plan", "read_model", "save_plan", "schema", "trace", "trial", "unguard",
    "verify_accumulation", "verify_neutrality", "watch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'brim' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Which strategies of a job are worth running on this device: what its packages and its trainer can do."""

from __future__ import annotations

import importlib.util

from brim.planner.answerer import Answerer
from brim.planner.candidates import Fixed, list_splits, list_variants
from brim.planner.rules import broken_rule, default_attention
from brim.planner.search import cost_strategy
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.trials.ladder import Candidate


def list_candidates(workload: Workload, fixed: Fixed, answerer: Answerer, *, on_cpu: bool) -> tuple[Candidate, ...]:
    """Return micro-batch x checkpointing x attention kernel x what else the planner varies, and what each should cost.

    Leaves out: loss kernels, of which the planner's rules give every trainer one.

    Args:
        workload: the job.
        fixed: Strategy fields that stay as they are.
        answerer: who predicts.
        on_cpu: whether it runs on a CPU, which has no package of GPU kernels.

    Raises:
        InvalidStrategy: rules forbid every one.
    """
    open_knobs = dict(fixed)
    open_knobs.setdefault("attention_kernel", list_attention(workload, on_cpu))
    splits = list_splits(workload, fixed)
    strategies = (variant.at(*split) for variant in list_variants(workload, open_knobs) for split in splits)
    return tuple(_predict(workload, one, answerer) for one in strategies if broken_rule(workload, one) is None)


def _predict(workload: Workload, strategy: Strategy, answerer: Answerer) -> Candidate:
    costed = cost_strategy(workload, strategy, answerer.peak(workload, strategy), answerer)
    return Candidate(strategy=strategy, peak_bytes=costed.peak_bytes, seconds=costed.cost)


def list_attention(workload: Workload, on_cpu: bool) -> tuple[str, ...]:
    """Return the attention kernels that run here; eager only where there is nothing better."""
    flash = ("flash",) if not on_cpu and _has("flash_attn") else ()
    return (default_attention(workload), *flash)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None

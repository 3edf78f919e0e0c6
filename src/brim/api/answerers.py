"""Who is asked, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from brim.errors import MissingExtra, UnknownName
from brim.planner.answerer import Answerer, answer_by_formula, answer_by_rule
from brim.planner.job import Job
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

if TYPE_CHECKING:
    from brim.probes.model import BuildModel

_ANSWERERS = ("rule", "formula", "trace", "trial")


def check_answerer(name: str) -> None:
    if name not in _ANSWERERS:
        raise UnknownName(kind="answerer", name=str(name), known=_ANSWERERS)


def find_answerer(name: str, job: Job, *, fold: bool = True, lengths: Sequence[int] = ()) -> Answerer:
    check_answerer(name)
    if name == "rule":
        return answer_by_rule()
    if name == "formula":
        return answer_by_formula()
    try:
        from brim.probes.answer import answer_by_trace
    except ModuleNotFoundError as error:
        raise MissingExtra(package=error.name or "torch", extra="trace", purpose="--by trace") from None
    return answer_by_trace(make_builder(job.workload, job.config), fold=fold, lengths=tuple(lengths))


def make_builder(workload: Workload, config: Mapping[str, Any]) -> Callable[[Strategy], BuildModel]:
    """Return what builds transformers' model of a config in the attention a strategy asks for; an empty config is read
    by the model's name."""

    def build(strategy: Strategy) -> BuildModel:
        from brim.probes.model import build_from_config
        from brim.readers.sources import read_checkpoint

        shape = workload.model
        known = config or read_checkpoint(shape.name, known_only=False)[2]
        dtype = workload.recipe.weight_dtype
        return lambda: build_from_config(known, shape.architecture, strategy.attention_kernel, dtype)

    return build

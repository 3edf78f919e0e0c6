"""A plan as JSON: the record others read, its schema, and the way back.

Writing is plain Python, so that `brim plan` does not import pydantic (0.4 s); reading and the schema use it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from brim.cost.ledger import Estimate
from brim.errors import InvalidFile, UnknownName, first_line, quoted
from brim.planner.record import SCHEMA_VERSION, Plan

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

_LARGEST_NUMBER = 2**80
_DERIVED = {"step_seconds": "Step time, seconds.", "tokens_per_second_per_device": "Speed, tokens per second."}
"""Keys of an estimate that repeat numbers of `step_time` for readers of the JSON."""
_TOTAL = "total_bytes"
"""Key of a moment that repeats the sum of its ledger."""


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Return the plan as a JSON object; `read_plan` gives an equal plan back."""
    document: dict[str, Any] = _plain(plan)
    document["estimate"] = describe_estimate(plan.estimate)
    return document


def describe_estimate(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as a JSON object, with totals and speed repeated at the top for its readers."""
    document: dict[str, Any] = _plain(estimate)
    for row, moment in zip(document["moments"], estimate.moments, strict=True):
        row[_TOTAL] = moment.total_bytes
    time = estimate.step_time
    return document | {name: getattr(time, name) if time else None for name in _DERIVED}


def describe_estimates(estimates: Iterable[Estimate]) -> dict[str, Any]:
    """Return what `brim estimate --json` prints."""
    return {"estimates": [describe_estimate(estimate) for estimate in estimates]}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def read_plan(text: str, *, path: str) -> Plan:
    """Return the plan a JSON text holds, every type, key and product checked.

    Args:
        text: what `describe_plan` wrote.
        path: where the text stands, for messages.

    Raises:
        InvalidFile: broken JSON, a newer schema, a wrong type, an unknown key, or numbers that contradict each other.
    """
    from pydantic import ValidationError

    document = parse_document(text, path=path, kind="plan")
    version = document.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InvalidFile(path=path, problem="is no plan: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise InvalidFile(path=path, problem=f"has schema version {version}, this brim reads up to {SCHEMA_VERSION}")
    _drop_derived(document)
    try:
        plan = _plan_adapter().validate_json(json.dumps(document))
    except ValidationError as error:
        _refuse(path, error)
    problem = _contradiction(plan)
    if problem:
        raise InvalidFile(path=path, problem=problem)
    return plan


def parse_document(text: str | bytes, *, path: str, kind: str) -> dict[str, Any]:
    """Return the JSON object of a text: no constant that is no number, no absurd number, nothing unprintable.

    Args:
        text: what stands in a file.
        path: where, for messages.
        kind: what it should be, for messages: `plan`.

    Raises:
        InvalidFile: it is none.
    """

    def refuse_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number")

    try:
        document = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidFile(path=path, problem=f"is no JSON: {first_line(error)}") from None
    if not isinstance(document, dict):
        raise InvalidFile(path=path, problem=f"is no {kind}: not a JSON object")
    problem = _absurd(document)
    if problem:
        raise InvalidFile(path=path, problem=problem)
    return document


def _absurd(document: Any) -> str:
    """Return what no plan holds: numbers beyond 2**80, text that cannot be printed; `` if there is nothing."""
    stack = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, (int, float)) and not abs(value) < _LARGEST_NUMBER:
            return "holds a number beyond 2**80"
        if isinstance(value, str) and not value.isprintable():
            return f"holds unprintable text: {quoted(value)}"
        stack.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    return ""


def _drop_derived(document: dict[str, Any]) -> None:
    estimate = document.get("estimate")
    if not isinstance(estimate, dict):
        return
    for name in _DERIVED:
        estimate.pop(name, None)
    moments = estimate.get("moments")
    for moment in moments if isinstance(moments, list) else ():
        if isinstance(moment, dict):
            moment.pop(_TOTAL, None)


def _refuse(path: str, error: ValidationError) -> NoReturn:
    raise InvalidFile(path=path, problem=describe_problem(error, "the plan")) from None


def describe_problem(error: ValidationError, whole: str) -> str:
    """Return the first thing that is wrong with a document, and where; `whole` names the document itself."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:120] or whole
    return f"{where}: {first_line(first['msg'])}"


def _contradiction(plan: Plan) -> str:
    """Return how the numbers of a plan contradict each other; `` if they do not."""
    strategy, batch = plan.strategy, plan.workload.batch
    mesh = strategy.mesh
    positive = {
        "micro_batch_size": strategy.micro_batch_size,
        "gradient_accumulation_steps": strategy.gradient_accumulation_steps,
        "seq_len": plan.workload.data.seq_len, "budget_bytes": plan.budget_bytes,
        **{f"mesh.{axis.name}": getattr(mesh, axis.name) for axis in fields(mesh)},
    }  # fmt: skip
    for name, number in positive.items():
        if number < 1:
            return f"{name} must be at least 1, not {number}"
    product = strategy.micro_batch_size * strategy.gradient_accumulation_steps * mesh.data_parallel_size
    if not product == plan.effective_batch_size == batch.sequences:
        return (
            f"micro-batch {strategy.micro_batch_size} x accumulation {strategy.gradient_accumulation_steps} x "
            f"{mesh.data_parallel_size} ranks is {product}, not the effective batch {plan.effective_batch_size}"
        )
    if mesh.num_devices != plan.workload.cluster.num_devices:
        return f"the mesh spans {mesh.num_devices} devices, there are {plan.workload.cluster.num_devices}"
    return ""


@cache
def _plan_adapter() -> TypeAdapter[Plan]:
    from pydantic import TypeAdapter

    return TypeAdapter(Plan)


def schema(what: str) -> dict[str, Any]:
    """Return the JSON schema of `brim plan --json` (`plan`) or `brim estimate --json` (`estimate`).

    Raises:
        UnknownName: neither of the two.
    """
    if what == "plan":
        return _with_derived(_plan_adapter().json_schema(mode="serialization"))
    if what == "estimate":
        return _estimates_schema()
    raise UnknownName(kind="schema", name=what, known=("plan", "estimate"))


def _estimates_schema() -> dict[str, Any]:
    from pydantic import TypeAdapter

    document = TypeAdapter(list[Estimate]).json_schema(mode="serialization")
    definitions = document.pop("$defs")
    return _with_derived({
        "type": "object", "title": "Estimates", "additionalProperties": False, "required": ["estimates"],
        "properties": {"estimates": document}, "$defs": definitions,
    })  # fmt: skip


def _with_derived(document: dict[str, Any]) -> dict[str, Any]:
    document["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    definitions = document["$defs"]
    for name, text in _DERIVED.items():
        number = {"anyOf": [{"type": "number"}, {"type": "null"}], "description": text}
        definitions["Estimate"]["properties"][name] = number
    definitions["Estimate"]["required"] += list(_DERIVED)
    definitions["Moment"]["properties"][_TOTAL] = {"type": "integer", "description": "Sum of the ledger, bytes."}
    definitions["Moment"]["required"].append(_TOTAL)
    return document

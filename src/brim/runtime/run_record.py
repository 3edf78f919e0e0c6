"""`brim-run.json`: what a watched run was said to cost, what it did cost, and what was seen. No torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from brim.errors import InvalidFile
from brim.files import write_text
from brim.planner.document import describe_problem, parse_document
from brim.runtime.sight import Verdict
from brim.spec.model import STRICT
from brim.spec.observation import Observation, Prediction

if TYPE_CHECKING:
    from pydantic import TypeAdapter

RUN_FILE = "brim-run.json"
OUT_OF_MEMORY = "out of memory"
"""`problem` of a run that died of it; any other is no fault of the way it was run."""
SCHEMA_VERSION = 1
_MEMORY_ERRORS = ("OutOfMemoryError", "CannotRecover")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the plan had said."""

    __pydantic_config__ = STRICT

    prediction: Prediction
    """What the plan's answerer said of the plan as it stands."""
    longest_tokens: int
    """Length that the plan was made for, tokens."""
    tokens_per_second: float | None = None
    """Tokens per second and device, padding included; None if not predicted."""
    budget_bytes: int
    """Bytes that tensors may take."""
    capacity_bytes: int
    """Bytes there are."""
    as_run_allocated_bytes: int | None = None
    """Peak of tensors predicted for the lengths and the split that were run; None where the formula knows none."""
    as_run_seconds: float | None = None
    """Step time predicted for the tokens that were run; None if not predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured, on the worst rank; None is what nobody could read."""

    __pydantic_config__ = STRICT

    num_steps: int
    """Optimizer steps so far."""
    num_ranks: int = 1
    """Ranks."""
    device: str
    """Name of the device."""
    capacity_bytes: int | None = None
    """Its memory, bytes."""
    peak_allocated_bytes: int | None = None
    """Most that tensors took in training steps, the first one left out."""
    aside_bytes: int | None = None
    """Most that they took in evaluation or saving; None where that is not more."""
    peak_reserved_bytes: int | None = None
    """Most that the allocator held, whatever for."""
    device_bytes: int | None = None
    """Most bytes in use on the card when it was looked at, all programs."""
    num_retries: int = 0
    """Times the allocator emptied its pool to go on."""
    num_ooms: int = 0
    """Allocations refused."""
    longest_tokens: int | None = None
    """Longest sequence so far, padding included."""
    coming_tokens: int | None = None
    """Longest sequence still to come, as far as known."""
    step_seconds: float | None = None
    """One optimizer step; the first one, evaluation and saving left out."""
    tokens_per_second: float | None = None
    """Real tokens, padding left out, per second and device."""
    padding_fraction: float | None = None
    """Share of the tokens run that are padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A watched run."""

    __pydantic_config__ = STRICT

    schema_version: int = SCHEMA_VERSION
    """Version of this record."""
    brim_version: str = ""
    """Version that wrote it."""
    state: Literal["running", "ended", "died"]
    """Whether it still runs, or did when this was written."""
    problem: str = ""
    """Why it died; empty if it did not."""
    expected: Expected | None = None
    """What the plan had said; None without a plan."""
    measured: Measured
    """What was measured."""
    verdicts: tuple[Verdict, ...] = ()
    """What was seen, in the order of time."""
    observation: Observation | None = None
    """The record that history keeps; None while the run goes on, and without a plan."""


def name_problem(kind: type[BaseException]) -> str:
    """Return the `problem` of a run that an exception ended; one that could not recover died of memory too."""
    return OUT_OF_MEMORY if kind.__name__ in _MEMORY_ERRORS else kind.__name__


def write_run(folder: str | os.PathLike[str], record: RunRecord) -> None:
    """Write the record of a run into a folder, whole or not at all; the folder is made if it is missing.

    Raises:
        InvalidFile: the folder cannot be made or written to, or the disk is full.
    """
    path = os.path.join(folder, RUN_FILE)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InvalidFile(path=path, problem=f"cannot be written: {error.strerror or error}") from None
    write_text(path, describe_run(record) + "\n")


def describe_run(record: RunRecord) -> str:
    """Return a run as the JSON text that `read_run` reads; without pydantic, whose import costs a step of training."""
    return json.dumps(_plain(record), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def read_run(text: str | bytes, *, path: str) -> RunRecord:
    """Return the run that a JSON text holds, every type and key checked.

    Raises:
        InvalidFile: broken JSON, a newer schema, a wrong type or an unknown key.
    """
    from pydantic import ValidationError

    document = parse_document(text, path=path, kind="watched run")
    version = document.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InvalidFile(path=path, problem="is no watched run: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise InvalidFile(path=path, problem=f"has schema version {version}, this brim reads up to {SCHEMA_VERSION}")
    try:
        record = _adapter().validate_json(json.dumps(document))
    except ValidationError as error:
        raise InvalidFile(path=path, problem=describe_problem(error, "the run")) from None
    below = _find_negative(document)
    if below:
        raise InvalidFile(path=path, problem=f"{below} is below zero")
    return record


def schema_run() -> dict[str, Any]:
    """Return the JSON schema of `brim-run.json`."""
    document = _adapter().json_schema(mode="serialization")
    document["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return document


def _find_negative(value: Any, where: str = "the run") -> str:
    """Return where a number below zero stands; empty if nowhere: sizes, counts and times all are none."""
    if isinstance(value, (int, float)):
        return where if value < 0 else ""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((found for key, inner in pairs if (found := _find_negative(inner, str(key)))), "")


@cache
def _adapter() -> TypeAdapter[RunRecord]:
    from pydantic import TypeAdapter

    return TypeAdapter(RunRecord)

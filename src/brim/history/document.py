"""A run as a line of JSON: written, read back with every key and number checked, and told apart by what it says."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, is_dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NoReturn

from brim.errors import InvalidFile, first_line, quoted
from brim.history.rebuild import list_kinds
from brim.spec.observation import Observation

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SCHEMA_VERSION = 1
LONGEST_LINE = 1_000_000
_LARGEST_NUMBER = 2**80


def describe_observation(observation: Observation) -> dict[str, Any]:
    """Return a run as a JSON object."""
    return {"schema_version": SCHEMA_VERSION, **asdict(observation)}


def write_line(observation: Observation) -> str:
    """Return a run as one line of JSON, without the line's end."""
    return json.dumps(describe_observation(observation), separators=(",", ":"))


def identify(observation: Observation) -> str:
    """Return the key of a run: equal for equal runs, on every machine.

    Fields at their defaults are left out, so that one which is added later moves no key.
    """
    text = json.dumps(_lean(observation), sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()[:32]


def _lean(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_lean(one) for one in value]
    if not is_dataclass(value):
        return value
    pairs = ((field, getattr(value, field.name)) for field, _ in list_kinds(type(value)))
    return {field.name: _lean(one) for field, one in pairs if field.default is MISSING or one != field.default}


def read_line(text: str) -> Observation:
    """Return the run that a line holds, checked.

    Raises:
        ValueError: broken JSON, a newer schema, a wrong type, an unknown key, or a number that cannot be.
    """
    from pydantic import ValidationError

    from brim.planner.document import describe_problem  # needs pydantic, which reading a store does without

    if len(text) > LONGEST_LINE:
        raise ValueError(f"is longer than {LONGEST_LINE:,} characters; no run is")
    document = _parse(text)
    version = document.pop("schema_version", None)
    if type(version) is not int or version < 1:
        raise ValueError("is no run: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise ValueError(f"has schema version {version}, this brim reads up to {SCHEMA_VERSION}")
    try:
        observation = _adapter().validate_json(json.dumps(document))
    except ValidationError as error:
        raise ValueError(describe_problem(error, "the run")) from None
    _check_counts(observation)
    return observation


def check(observation: Observation) -> Observation:
    """Return a run as it reads back from its line.

    Raises:
        ValueError: it would not.
    """
    return read_line(write_line(observation))


def read_lines(raw: bytes, *, path: str) -> list[Observation]:
    """Return the runs of a file that `brim history export` wrote; blank lines are passed over.

    Raises:
        InvalidFile: a line is none; the text names the first that is not.
    """
    found = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").strip()
            if text:
                found.append(read_line(text))
        except (ValueError, RecursionError) as error:
            said = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else first_line(error)
            raise InvalidFile(path=path, problem=f"line {number}: {said}; nothing was imported") from None
    return found


def _parse(text: str) -> dict[str, Any]:
    def refuse_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number")

    try:
        document = json.loads(text, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("is no run: nested too deep") from None
    if not isinstance(document, dict):
        raise ValueError("is no run: not a JSON object")
    stack: list[Any] = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, (int, float)) and not 0 <= value < _LARGEST_NUMBER:
            raise ValueError("holds a number below zero or beyond 2**80")
        if isinstance(value, str) and not value.isprintable():
            raise ValueError("holds unprintable text")
        stack.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    return document


def _check_counts(observation: Observation) -> None:
    """Raise ValueError if something that there is at least one of is none, or the run ended at no time."""
    read_time(observation.finished)
    strategy, workload = observation.strategy, observation.workload
    positive = {
        "num_ranks": observation.num_ranks, "capacity_bytes": observation.capacity_bytes,
        "micro_batch_size": strategy.micro_batch_size,
        "gradient_accumulation_steps": strategy.gradient_accumulation_steps, "seq_len": workload.data.seq_len,
        "hidden_size": workload.model.hidden_size, "mesh": strategy.mesh.num_devices,
    }  # fmt: skip
    for name, number in positive.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")


def read_time(text: str) -> datetime:
    """Return the moment that a text in ISO 8601 names, UTC where it names no zone.

    Raises:
        ValueError: it names none.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"finished: {quoted(text)} is no time") from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


@cache
def _adapter() -> TypeAdapter[Observation]:
    from pydantic import TypeAdapter

    return TypeAdapter(Observation)

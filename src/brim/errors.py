"""Every error raised on purpose.

    BrimError                    exit code
    |- InvalidInput              2   a value that cannot be meant
    |  |- InvalidSize            2   not a size in bytes
    |  |- UnknownName            2   no such model, GPU, task, target ...
    |  |- IndivisibleBatch       2   the effective batch does not split
    |  |- InvalidStrategy        2   knobs that exclude each other
    |  |- Inexpressible          2   the target has no word for it
    |  |- UnsupportedModel       2   the formula does not know the architecture
    |  |- InvalidConfig          2   a model config that is broken
    |  |- InvalidFile            2   a file that cannot be read or written
    |  `- MissingExtra           2   an optional package is not installed
    |- DoesNotFit                3   nothing fits the budget
    |- NotExact                  4   a proof failed
    |  `- InseparableLoss        4   a loss that no split over micro-batches leaves as it is
    |- ProbeFailed               5   a probe died
    |- Unreachable               6   hub or network
    `- TableError                1   our own data is wrong

Each carries its facts as attributes, and its text is built from them: what was asked, what is
wrong with both numbers and units, what would work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

_LONGEST_ECHO = 80


def first_line(error: object) -> str:
    """Return the first line of what an error says, as text that is safe to print."""
    return quoted(str(error).splitlines()[0] if str(error) else "unreadable")[1:-1]


def quoted(text: object) -> str:
    """Return the user's own words, shortened and free of control characters."""
    words = "".join(c if c.isprintable() else "?" for c in str(text))
    return repr(words if len(words) <= _LONGEST_ECHO else words[: _LONGEST_ECHO - 1] + "…")


class BrimError(Exception):
    """Root of every error raised on purpose; `facts` go into JSON output unchanged."""

    exit_code = 1

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts


class TableError(BrimError):
    """A row of brim's own tables is wrong: our bug."""


class InvalidInput(BrimError):
    """A value that cannot be meant."""

    exit_code = 2


class InvalidSize(InvalidInput):
    """A text that is no size in bytes."""

    def __init__(self, *, text: str) -> None:
        super().__init__(f"{quoted(text)} is no size; write for example 24GiB, 80GB or 500MB", text=text)


class UnknownName(InvalidInput):
    """A name that no table has."""

    def __init__(self, *, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        names = sorted(known)
        folded = {choice.lower(): choice for choice in names}
        close = [folded[match] for match in get_close_matches(name.lower()[:200], folded, n=3, cutoff=0.5)]
        if close:
            advice = f"did you mean {' or '.join(close)}?"
        elif 0 < len(names) <= 12:
            advice = f"known: {', '.join(names)}"
        else:
            advice = ""
        text = "; ".join(part for part in (f"unknown {kind} {quoted(name)}", advice, hint) if part)
        super().__init__(text, kind=kind, name=name, close_matches=close)
        self.close_matches = close


class IndivisibleBatch(InvalidInput):
    """An effective batch that is no whole number of micro-batches on every rank."""

    def __init__(self, *, sequences: int, ranks: int, micro_batch_size: int | None, nearest: Sequence[int]) -> None:
        unit = f"{ranks} data-parallel rank{'s' if ranks != 1 else ''}"
        if micro_batch_size is not None:
            unit += f" in micro-batches of {micro_batch_size}"
        super().__init__(
            f"effective batch {sequences} sequences cannot be split over {unit}; "
            f"nearest: {' or '.join(str(near) for near in nearest)}",
            sequences=sequences, ranks=ranks, micro_batch_size=micro_batch_size, nearest=list(nearest),
        )  # fmt: skip
        self.nearest = tuple(nearest)


class InvalidStrategy(InvalidInput):
    """Knobs that exclude each other, or a value outside its range."""


class Inexpressible(InvalidInput):
    """The export target has no word for a setting of the plan."""

    def __init__(self, *, target: str, setting: str, advice: str) -> None:
        super().__init__(f"{target} cannot express {setting}; {advice}", target=target, setting=setting)


class UnsupportedModel(InvalidInput):
    """An architecture that the formula does not know."""

    def __init__(self, *, model: str, what: str, advice: str = "use --by trace") -> None:
        super().__init__(f"the formula does not know {what} of {quoted(model)}; {advice}", model=model, what=what)


class InvalidConfig(InvalidInput):
    """A model config that is broken; `path` names the key."""

    def __init__(self, *, source: str, path: str, problem: str) -> None:
        super().__init__(f"{quoted(source)}: {path} {problem}", source=source, path=path, problem=problem)


class InvalidFile(InvalidInput):
    """A file that cannot be read or written."""

    def __init__(self, *, path: str, problem: str) -> None:
        super().__init__(f"{quoted(path)}: {problem}", path=path, problem=problem)


class MissingExtra(InvalidInput):
    """An optional package is not installed."""

    def __init__(self, *, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}: pip install 'brim[{extra}]'", package=package, extra=extra, purpose=purpose
        )


class DoesNotFit(BrimError):
    """No strategy fits the budget."""

    exit_code = 3

    def __init__(self, message: str, *, gap_bytes: int, at_moment: str, relaxations: Sequence[Any] = (), **facts: Any):
        super().__init__(message, gap_bytes=gap_bytes, at_moment=at_moment, **facts)
        self.gap_bytes = gap_bytes
        self.at_moment = at_moment
        self.relaxations = tuple(relaxations)


class NotExact(BrimError):
    """Accumulated gradients differ from the big batch."""

    exit_code = 4


class InseparableLoss(NotExact):
    """A loss that is no weighted mean of its micro-batches' losses."""

    def __init__(self, *, reason: str, advice: str) -> None:
        super().__init__(f"this loss cannot be split over micro-batches: {reason}; {advice}", reason=reason)
        self.reason = reason


class ProbeFailed(BrimError):
    """A probe process died or gave no answer."""

    exit_code = 5


class Unreachable(BrimError):
    """The hub or the network did not answer."""

    exit_code = 6

"""The words of export targets by version, read from targets.toml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from brim.errors import UnknownName
from brim.tables.read import _find, _record, _toml_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """Words of an export target over a range of versions of the package that decides them."""

    target: str
    """Name of the export target."""
    name: str
    """Name of the dialect."""
    package: str
    """Package whose version decides the words."""
    since: str
    """First version, inclusive."""
    requires: tuple[str, ...]
    """What the exported script checks before it starts, as pip writes it."""
    checkpointing: str
    """Word of the checkpointing flag."""
    checkpointing_options: str
    """Word of its options, empty if it takes none."""
    checkpointing_kinds: tuple[str, ...]
    """Values of `Strategy.activation_checkpointing` it can express."""
    dtype: str
    """from_pretrained's word for the load dtype."""
    warmup_fraction: str
    """Word that takes warmup as a share of the run."""
    loss_kernels: Mapping[str, str]
    """Loss kernels it has, each with its `loss_type` word, empty where there is none; the first is the default."""
    layer_kernels: tuple[str, ...]
    """Layer kernels it has."""
    padding_free: bool
    """Whether batches without padding can be asked for."""
    packing: bool
    """Whether packing can be asked for."""
    activation_offload: str
    """Word that keeps activations in host memory, empty if there is none."""
    zero_stages: tuple[int, ...]
    """ZeRO stages it can express."""
    offloads: tuple[str, ...]
    """Offloads it can express."""
    compile: bool
    """Whether compilation can be asked for."""
    source: str
    """What was read."""
    retrieved: str
    """When it was read."""
    until: str | None = None
    """First version beyond it; None for the newest."""
    length: str | None = None
    """Word for the longest sequence, None if the config class has none."""
    activation_offload_min_tokens: int = 0
    """Sequence length from which it offloads, tokens."""
    checkpointing_default: bool = False
    """Whether it checkpoints when nothing is said."""
    optim_default: str = "adamw_torch_fused"
    """Optimizer it takes when nothing is said."""

    @property
    def versions(self) -> str:
        """The range of versions, as people write it."""
        return f"{self.package}>={self.since}" + (f",<{self.until}" if self.until else "")


@cache
def list_dialects() -> tuple[Dialect, ...]:
    """Return every dialect of every export target, newest first within a target."""
    return tuple(_record(Dialect, "targets.toml", row) for row in _toml_rows("targets.toml", "dialect"))


def find_dialect(target: str, version: str | None = None) -> Dialect:
    """Return the dialect of an export target, the newest unless a version is named.

    Args:
        target: name of the target, any case.
        version: of the package that decides the words, for example `4.57.6` of transformers.

    Raises:
        UnknownName: no such target, or a version no dialect covers.
    """
    names = dict.fromkeys(row.target for row in list_dialects())
    name = _find("target", target, ((name, (), name) for name in names))
    rows = [row for row in list_dialects() if row.target == name]
    if version is None:
        return rows[0]
    wanted = _version(version)
    for row in rows:
        if wanted and _version(row.since) <= wanted and (row.until is None or wanted < _version(row.until)):
            return row
    raise UnknownName(
        kind=f"{rows[0].package} version", name=version, known=(),
        hint="known: " + "; ".join(row.versions for row in rows),
    )  # fmt: skip


def _version(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, empty if it starts with none."""
    numbers: list[int] = []
    for part in text.strip()[:40].split("."):
        if not (part.isascii() and part.isdigit()):
            break
        numbers.append(int(part))
    return tuple(numbers)


def find_learning_rate(method: str) -> float:
    """Return the learning rate an exported script starts from, by method; raises UnknownName."""
    rows = _toml_rows("targets.toml", "learning_rate")
    return _find("method", method, ((row["method"], (), row["value"]) for row in rows))

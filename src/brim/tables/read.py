"""The one reader of brim's tables: every row comes out as a frozen record, or the table is our bug."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal, TypeVar

from brim.errors import TableError, UnknownName
from brim.spec.device import Device, Link
from brim.spec.recipe import Dtype
from brim.units import GIB

Row = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Effective batch by task, sequences."""

    name: str
    aliases: tuple[str, ...]
    min: int
    low: int
    high: int
    max: int
    warmup_fraction: float
    source: str
    retrieved: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """State per trained parameter and temporaries of a step; see the head of optimizers.toml."""

    name: str
    aliases: tuple[str, ...]
    kernels: tuple[str, ...]
    hf: Mapping[str, str]
    passes: int
    source: str
    retrieved: str
    state_of_parameter: int = 0
    vector_state_of_parameter: int | None = None
    state_bytes: float = 0.0
    block_bytes: float = 0.0
    min_quantised: int = 0
    factored: bool = False
    paged: bool = False
    foreach_temporary_copies: int = 0
    loop_temporary_largest: int = 0
    temporary_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """Semantics and defaults of a training loop; see the head of trainers.toml."""

    name: str
    aliases: tuple[str, ...]
    default_load_dtype: Literal["fp32", "checkpoint"]
    default_checkpointing: Literal["none", "selective", "full"]
    autocast: bool
    qlora_adapter_dtype: Dtype
    lora_adapter_dtype: Dtype
    kbit_upcast: bool
    loss_kernels: tuple[str, ...]
    layer_kernels: tuple[str, ...]
    logits_alive_in_backward: bool
    upcasts_logits: bool
    step_note: str
    source: str
    retrieved: str
    default_seq_len: int | None = None
    activation_offload: bool = False
    flattens_packed: bool = False
    checkpointing_kinds: tuple[str, ...] | None = None
    prefers: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What a package of fused layer kernels replaces; see the head of kernels.toml."""

    name: str
    norm: bool
    rotary: bool
    gate: Literal["always", "adapted", "never"]
    adapters: Literal["always", "quantised", "never"]
    loss_in_place: bool
    unpacking_buffer: bool
    source: str
    retrieved: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A built-in model: its Hugging Face config, trimmed."""

    id: str
    aliases: tuple[str, ...]
    params: int
    config: Mapping[str, Any] = field(repr=False)
    source: str
    retrieved: str
    license_gated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The card a bare size such as `7B` stands for."""

    name: str
    card: str
    reason: str


def _toml_rows(file: str, key: str) -> list[Row]:
    text = files("brim.tables").joinpath(file).read_text(encoding="utf-8")
    try:
        return tomllib.loads(text)[key]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise TableError(f"tables/{file}: {error}") from error


def _record(kind: Callable[..., T], file: str, row: Row) -> T:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise TableError(f"tables/{file}, row {row.get('name', row.get('id'))}: {error}") from error


def _usable_gib(row: Row) -> float:
    """Memory a process gets: torch's own total where known, else the driver's less what torch loses on such cards.

    Source: rows of gpus.toml with both figures (torch / driver): 6-12 GB 0.946-0.986, 16-24 GB 0.97-0.985,
    40 GB and more 0.985-0.997, AMD 1.0. The low end of each class is taken.
    """
    driver_gib = row["memory_gib"]
    share = 0.95 if driver_gib <= 12.5 else 0.97 if driver_gib <= 25 else 0.985
    return row.get("usable_gib", driver_gib * (share if row["vendor"] == "nvidia" else 1.0))


def _device(row: Row) -> Device:
    capability = row.get("compute_capability")
    major, _, minor = capability.partition(".") if capability else ("", "", "")
    rates = {key: row[key] for key in row if key.endswith("_per_second")}
    return Device(
        name=row["name"], capacity_bytes=round(_usable_gib(row) * GIB), matmul_fraction=row.get("matmul_fraction"),
        compute_capability=(int(major), int(minor)) if capability else None, vendor=row["vendor"],
        link=row.get("link"), source=row["source"], **rates,
    )  # fmt: skip


@cache
def _gpu_rows() -> tuple[Row, ...]:
    return tuple(_toml_rows("gpus.toml", "gpu"))


@cache
def list_tasks() -> tuple[Task, ...]:
    """Return every task, in table order."""
    return tuple(_record(Task, "tasks.toml", row) for row in _toml_rows("tasks.toml", "task"))


@cache
def list_optimizers() -> tuple[Optimizer, ...]:
    """Return every optimizer, in table order."""
    return tuple(_record(Optimizer, "optimizers.toml", row) for row in _toml_rows("optimizers.toml", "optimizer"))


@cache
def list_trainers() -> tuple[Trainer, ...]:
    """Return every trainer preset, in table order."""
    return tuple(_record(Trainer, "trainers.toml", row) for row in _toml_rows("trainers.toml", "trainer"))


@cache
def list_kernels() -> tuple[Kernels, ...]:
    """Return every package of fused layer kernels, in table order."""
    return tuple(_record(Kernels, "kernels.toml", row) for row in _toml_rows("kernels.toml", "kernels"))


@cache
def list_devices() -> tuple[Device, ...]:
    """Return every GPU, in table order."""
    return tuple(_device(row) for row in _gpu_rows())


@cache
def list_cards() -> tuple[Card, ...]:
    """Return every built-in model card, in table order."""
    lines = files("brim.tables").joinpath("models.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(_record(Card, "models.jsonl", json.loads(line)) for line in lines if line.strip())


@cache
def list_sizes() -> tuple[Size, ...]:
    """Return the card that each bare size stands for."""
    return tuple(_record(Size, "sizes.toml", row) for row in _toml_rows("sizes.toml", "size"))


def _fold(name: str) -> str:
    return "-".join(name.lower().replace("_", "-").split())


def _find(kind: str, name: str, rows: Iterable[tuple[str, Iterable[str], T]], hint: str = "") -> T:
    wanted, known = _fold(name), []
    for row_name, aliases, record in rows:
        known.append(row_name)
        if wanted in {_fold(choice) for choice in (row_name, *aliases)}:
            return record
    raise UnknownName(kind=kind, name=name, known=known, hint=hint)


def find_task(name: str) -> Task:
    """Return the task of that name or alias; raises UnknownName."""
    return _find("task", name, ((row.name, row.aliases, row) for row in list_tasks()))


def find_optimizer(name: str) -> Optimizer:
    """Return the optimizer of that name or HF `optim` value; raises UnknownName."""
    return _find("optimizer", name, ((row.name, row.aliases, row) for row in list_optimizers()))


def find_kernels(name: str) -> Kernels:
    """Return the package of fused layer kernels of that name; raises UnknownName."""
    return _find("layer kernels", name, ((row.name, (), row) for row in list_kernels()))


def find_trainer(name: str) -> Trainer:
    """Return the trainer preset of that name or alias; raises UnknownName."""
    return _find("trainer", name, ((row.name, row.aliases, row) for row in list_trainers()))


def find_device(name: str) -> Device:
    """Return the GPU of that name or alias, any case; raises UnknownName."""
    rows = ((row["name"], row.get("aliases", ()), row) for row in _gpu_rows())
    return _device(_find("GPU", name, rows, hint="`brim gpus` lists all; a size such as 24GiB works too"))


@cache
def _link_rows() -> tuple[Row, ...]:
    return tuple(_toml_rows("links.toml", "link"))


def find_link(name: str) -> Link:
    """Return the link of that name; raises UnknownName."""
    rows = _link_rows()
    row = _find("link", name, ((row["name"], (), row) for row in rows))
    return Link(name=row["name"], bytes_per_second=row["bus_bytes_per_second"], latency_seconds=row["latency_seconds"])


def find_card(name: str) -> Card | None:
    """Return the built-in card of that hub id, alias or bare size, any case; None if there is none."""
    wanted = _fold(name)
    card_id = next((size.card for size in list_sizes() if _fold(size.name) == wanted), None)
    wanted = _fold(card_id) if card_id else wanted
    return next((card for card in list_cards() if wanted in {_fold(text) for text in (card.id, *card.aliases)}), None)


def match_device(name: str, capability: tuple[int, int] | None, memory_bytes: int) -> Device | None:
    """Return the row for a card as its driver names it, None if no row is certainly that card.

    The name decides if a row has it; rows of one name are told apart by memory. Otherwise the compute
    capability and the memory decide, if only one row has both.

    Args:
        name: the driver's name, for example `NVIDIA GeForce RTX 4090`.
        capability: CUDA compute capability, None if unknown.
        memory_bytes: memory the driver reports, bytes.
    """
    near = [row for row in _gpu_rows() if _has_memory(row, memory_bytes)]
    for fold in (_fold, _brief):
        named = [row for row in near if fold(name) in {fold(text) for text in (row["name"], *row.get("aliases", ()))}]
        if named:
            return _device(named[0])
    alike = [row for row in near if capability is not None and _device(row).compute_capability == capability]
    return _device(alike[0]) if len(alike) == 1 else None


def _has_memory(row: Row, memory_bytes: int) -> bool:
    # Drivers keep up to 3 % back, and error correction takes 6 % on cards without spare memory for it.
    return abs(memory_bytes / GIB - row["memory_gib"]) <= 0.08 * row["memory_gib"]


def _brief(name: str) -> str:
    makers = ("nvidia", "geforce", "tesla", "quadro", "amd", "instinct", "radeon")
    words = [word for word in _fold(name).replace("-", " ").split() if word not in makers]
    return "".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleRow:
    """A row of the rule's matrix: for a card and a size, ranges of micro-batch and accumulation."""

    card_gb: float
    billions: float
    bits: int
    micro_batch: tuple[int, int]
    accumulation: tuple[int, int]
    source: str
    retrieved: str
    or_more: bool = False


@cache
def list_rule_rows() -> tuple[RuleRow, ...]:
    """Return the rule of thumb's matrix, in table order."""
    return tuple(_record(RuleRow, "rule.toml", row) for row in _toml_rows("rule.toml", "matrix"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleConstants:
    """The numbers of the rule of thumb; see the head of rule.toml."""

    gb_per_billion_4bit: float
    gb_per_billion_16bit: float
    buffer_gb: float
    used_fraction: float
    checkpointing_saves_fraction: tuple[float, float]
    micro_batch_with_checkpointing: tuple[int, int]
    accumulation_with_checkpointing: tuple[int, int]
    reference_seq_len: int
    activation_gb_16bit: float
    activation_billions_16bit: float
    activation_exponent_16bit: float
    source: str
    retrieved: str


@cache
def read_rule_constants() -> RuleConstants:
    """Return the numbers of the rule of thumb."""
    return _record(RuleConstants, "rule.toml", _toml_rows("rule.toml", "constants")[0])


@cache
def read_rule_patterns() -> tuple[Row, ...]:
    """Return the rule of thumb's usual set-ups: size, card, devices, micro-batch, accumulation."""
    return tuple(_toml_rows("rule.toml", "pattern"))


@cache
def read_rule_targets() -> tuple[Row, ...]:
    """Return the rule of thumb's effective batches and how they are split."""
    return tuple(_toml_rows("rule.toml", "target"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How far an answerer has been from measured peaks; generated by benchmarks/accuracy.py."""

    answerer: str
    meter: str
    rows: int
    groups: int
    coverage_fraction: float
    median_error_fraction: float
    p90_error_fraction: float
    signed_median_fraction: float
    under_fraction: float
    shortfall_p90_fraction: float
    source: str
    retrieved: str


@cache
def list_accuracy() -> tuple[Accuracy, ...]:
    """Return the record of every answerer that was scored, in table order."""
    return tuple(_record(Accuracy, "accuracy.toml", row) for row in _toml_rows("accuracy.toml", "accuracy"))

"""What brim's tables hold, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

from brim.report.memory import make_grid, make_table
from brim.report.numbers import format_count, format_gib, format_parameters, format_scaled
from brim.spec.device import Device
from brim.tables.read import Card, Optimizer, Size, Task


def format_devices(devices: Iterable[Device]) -> Group:
    """Return GPUs: memory, bandwidth and rates."""
    heads = ("GiB", "GB/s", "bf16", "fp16", "capability")
    table = make_table("gpu", *heads, right=heads, whole=("gpu",))
    for row in devices:
        capability = ".".join(str(part) for part in row.compute_capability) if row.compute_capability else "-"
        rates = (format_scaled(row.bf16_flops_per_second, 1e12), format_scaled(row.fp16_flops_per_second, 1e12))
        bandwidth = format_scaled(row.memory_bytes_per_second, 1e9)
        table.add_row(row.name, format_gib(row.capacity_bytes), bandwidth, *rates, capability)
    return _with_count(table, "GPU", "GiB: what one process can get; bf16, fp16: dense TFLOP/s; also --gpu 24GiB")


def format_models(cards: Iterable[Card], sizes: Iterable[Size] = ()) -> Group:
    """Return built-in model cards, and the bare sizes that stand for one of them."""
    named: dict[str, list[str]] = {}
    for size in sizes:
        named.setdefault(size.card, []).append(size.name)
    table = make_table("model", "parameters", "also", right=("parameters",), whole=("model",))
    for card in cards:
        obvious = card.id.rpartition("/")[2].lower()
        also = ", ".join((*named.get(card.id, ()), *(name for name in card.aliases if name.lower() != obvious)))
        table.add_row(card.id, format_parameters(card.params), also)
    return _with_count(table, "model card", "any other model: a hub id, a folder or a config.json")


def format_tasks(tasks: Iterable[Task]) -> Group:
    """Return tasks and their effective batches in sequences."""
    heads = ("min", "optimal", "max useful")
    table = make_table("task", *heads, "also", right=heads, whole=("task",))
    for row in tasks:
        optimal = f"{format_count(row.low)}-{format_count(row.high)}"
        table.add_row(row.name, format_count(row.min), optimal, format_count(row.max), ", ".join(row.aliases))
    return _with_count(table, "task", "effective batch in sequences; --effective-batch-size always wins")


def format_optimizers(optimizers: Iterable[Optimizer]) -> Group:
    """Return optimizers: what they keep for each trained parameter, their kernels, their HF names."""
    table = make_table("optimizer", "state per parameter", "kernels", "HF optim", whole=("optimizer", "HF optim"))
    for row in optimizers:
        table.add_row(row.name, _describe_state(row), ", ".join(row.kernels), next(iter(row.hf.values()), "-"))
    return _with_count(table, "optimizer", "copies are in the parameter's dtype; paged states may move to host memory")


def _describe_state(row: Optimizer) -> str:
    if row.factored:
        return "row and column means"
    if row.state_bytes:
        return f"{row.state_bytes + row.block_bytes:.3g} bytes" + (", paged" if row.paged else "")
    copies = row.state_of_parameter
    return f"{copies or 'no'} {'copy' if copies == 1 else 'copies'}"


def _with_count(table: Table, noun: str, note: str) -> Group:
    plural = "" if table.row_count == 1 else "s"
    return Group(table, Text(f"\n{table.row_count} {noun}{plural}; {note}", style="dim"))


def format_facts(facts: Mapping[str, str]) -> Table:
    """Return names and values, two columns."""
    grid = make_grid(2)
    for name, value in facts.items():
        grid.add_row(name, Text(value))
    return grid

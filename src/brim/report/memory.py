"""Memory on the terminal: a bar against the capacity, and the ledger at the peak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from brim.cost.ledger import Estimate, Ledger, Moment
from brim.report.numbers import format_gib, format_share
from brim.units import GIB

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

_SMALLEST_ROW_BYTES = GIB // 200
PAGED_WORDS = "paged states (move to host when the card is full)"
LEDGER_ROWS = tuple(field.name for field in fields(Ledger))


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of `cells` characters in parts; ASCII where the output knows no more."""

    parts: Sequence[float]
    whole: float
    cells: int = 40
    mark: float | None = None
    empty: tuple[str, str] = ("░", ".")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Draw the parts one after the other, what is left of the whole, and the mark on top."""
        shades, empty, mark = ("#+", self.empty[1], "|") if options.ascii_only else ("█▒", self.empty[0], "┃")
        line, filled = [empty] * self.cells, 0.0
        for index, part in enumerate(self.parts):
            first, last = self._place(filled), self._place(filled + part)
            line[first:last] = [shades[min(index, 1)]] * (last - first)
            filled += part
        if self.mark is not None and 0 < self.mark < self.whole:
            line[min(self._place(self.mark), self.cells - 1)] = mark
        yield Text("".join(line), style="cyan", no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Return the fixed width of the bar."""
        return Measurement(self.cells, self.cells)

    def _place(self, amount: float) -> int:
        return max(0, min(self.cells, round(self.cells * amount / self.whole))) if self.whole > 0 else 0


def make_table(*columns: str, right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """Return an empty table in the report's style: no frame, bold head, numbers to the right.

    Args:
        columns: the heads.
        right: columns of numbers.
        whole: columns whose cells never wrap.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        fixed = column in right or column in whole
        table.add_column(column, justify="right" if column in right else "left", no_wrap=fixed, overflow="fold")
    return table


def make_grid(num_columns: int, gap: int = 2) -> Table:
    """Return an empty table without heads, for words on the left and what they say on the right."""
    grid = Table.grid(padding=(0, gap, 0, 0))
    for _ in range(num_columns):
        grid.add_column(overflow="fold")
    return grid


def find_peak(estimate: Estimate) -> Moment | None:
    """Return the moment of the peak; None if the answerer knows no moments."""
    return next((moment for moment in estimate.moments if moment.name == estimate.peak_moment), None)


def list_rows(moment: Moment) -> list[tuple[str, int]]:
    """Return the ledger rows of a moment that hold anything, with their words and bytes."""
    pairs = ((row.replace("_", " "), getattr(moment.ledger, row)) for row in LEDGER_ROWS)
    return [(words, size_bytes) for words, size_bytes in pairs if size_bytes]


def list_device_rows(estimate: Estimate, paged_bytes: int = 0) -> list[tuple[str, int]]:
    """Return what fills the card at the peak: the ledger, then what allocator and process add; they sum up.

    Args:
        estimate: the answer.
        paged_bytes: paged states in its device figure, which leave the card when it is full and are left out.
    """
    moment = find_peak(estimate)
    rest = (
        ("allocator slack", estimate.peak_reserved_bytes - estimate.peak_allocated_bytes),
        ("CUDA context", estimate.device_bytes - estimate.peak_reserved_bytes - paged_bytes),
    )
    rows = list_rows(moment) if moment is not None else [("tensors", estimate.peak_allocated_bytes)]
    return [*rows, *((words, size_bytes) for words, size_bytes in rest if size_bytes)]


def format_ledger(estimate: Estimate, capacity_bytes: int, paged_bytes: int = 0) -> Table:
    """Return what fills the card at the peak, row by row, down to what is left free; rows of 0.00 GiB are left out.

    Paged states stand below, beside the sum.
    """
    table = make_table("row", "GiB", "of the card", "", right=("GiB", "of the card"))
    for words, size_bytes in list_device_rows(estimate, paged_bytes):
        if size_bytes >= _SMALLEST_ROW_BYTES:
            bar = Bar([size_bytes], capacity_bytes, cells=24, empty=(" ", " "))
            table.add_row(words, format_gib(size_bytes), format_share(size_bytes, capacity_bytes), bar)
    used_bytes = estimate.device_bytes - paged_bytes
    for words, size_bytes in (("used", used_bytes), ("free", capacity_bytes - used_bytes)):
        table.add_row(words, format_gib(size_bytes), format_share(size_bytes, capacity_bytes), style="bold")
    if paged_bytes:
        table.add_row(PAGED_WORDS, format_gib(paged_bytes), "", "")
    return table

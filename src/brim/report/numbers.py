"""Numbers as people read them: sizes in GiB, shares in percent, times in the unit that fits."""

from __future__ import annotations

from brim.units import GIB

_TIMES = ((172_800, 86_400, "days"), (5_400, 3_600, "h"), (100, 60, "min"))
_SCALES = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


def format_gib(size_bytes: float) -> str:
    """Return bytes as a bare number of GiB, for a column that names the unit."""
    return f"{size_bytes / GIB:,.2f}"


def format_share(part: float, whole: float) -> str:
    """Return `part` of `whole` in percent, `-` without a whole."""
    if whole <= 0:
        return "-"
    percent = 100 * part / whole
    return f"{percent:.0f} %" if percent >= 1 or percent <= 0 else "<1 %"


def format_difference(figure: float, reference: float) -> str:
    """Return how far `figure` is from `reference` in signed percent, `-` without a reference."""
    return f"{100 * (figure / reference - 1):+.0f} %" if reference > 0 else "-"


def format_seconds(seconds: float) -> str:
    """Return a duration in seconds, minutes, hours or days, two digits: a prediction knows no more."""
    value, unit = next(((seconds / size, unit) for limit, size, unit in _TIMES if seconds >= limit), (seconds, "s"))
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"


def format_count(number: float) -> str:
    """Return a whole number with thousands separators."""
    return f"{number:,.0f}"


def format_rounded(number: float) -> str:
    """Return a number cut to three digits with thousands separators."""
    return f"{float(f'{number:.3g}'):,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def format_scaled(number: float | None, factor: float) -> str:
    """Return `number / factor` in three digits, `-` if unknown: table cells of rates."""
    return "-" if number is None else format_rounded(number / factor)


def format_parameters(number: int) -> str:
    """Return a parameter count the way models are named: 8.03B, 124M."""
    for factor, letter in _SCALES:
        if number >= 0.9995 * factor:  # 999.9M reads 1B
            return f"{format_rounded(number / factor)}{letter}"
    return str(number)

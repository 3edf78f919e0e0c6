"""What `brim verify` prints: the proof of accumulation and, of a plan, that its strategy is neutral."""

from __future__ import annotations

from typing import TYPE_CHECKING

from brim.cli.output import print_json, print_remark, print_report
from brim.files import write_text

if TYPE_CHECKING:
    from brim.checks.report import AccumulationReport, NeutralityReport


def print_proofs(
    accumulation: AccumulationReport, neutrality: NeutralityReport | None, html: str | None, *, as_json: bool
) -> None:
    """Print the proofs as text or JSON, and draw the errors of accumulation into a file if one is named."""
    from brim.report.exactness import draw_errors

    if html is not None:
        write_text(html, draw_errors(accumulation))
        print_remark(f"wrote {html}")
    if as_json:
        more = {} if neutrality is None else {"neutrality": neutrality.describe()}
        print_json({**accumulation.describe(), **more})
    else:
        _print_text(accumulation, neutrality)


def _print_text(accumulation: AccumulationReport, neutrality: NeutralityReport | None) -> None:
    from rich.console import Group
    from rich.text import Text

    from brim.report.exactness import format_accumulation

    if neutrality is None:
        print_report(format_accumulation(accumulation))
        return
    from brim.report.neutrality import format_neutrality

    print_report(Group(format_accumulation(accumulation), Text(), format_neutrality(neutrality)))

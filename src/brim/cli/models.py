"""`brim models`: models brim knows without a download."""

from __future__ import annotations

from brim.cli.listing import FILTER, print_listing
from brim.cli.options import AS_JSON


def run_models(text: str | None = FILTER, as_json: bool = AS_JSON) -> None:
    """List the models brim knows without a download.

    \b
    Example:
      brim models llama
    """
    from brim.report.listings import format_models
    from brim.tables.read import list_cards, list_sizes

    print_listing("model", list_cards(), lambda cards: format_models(cards, list_sizes()), text, as_json=as_json)

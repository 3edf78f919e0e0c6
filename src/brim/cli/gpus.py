"""`brim gpus`: GPUs brim can plan for."""

from __future__ import annotations

from brim.cli.listing import FILTER, print_listing
from brim.cli.options import AS_JSON


def run_gpus(text: str | None = FILTER, as_json: bool = AS_JSON) -> None:
    """List the GPUs brim can plan for.

    \b
    Example:
      brim gpus 4090
    """
    from brim.report.listings import format_devices
    from brim.tables.read import list_devices

    print_listing("GPU", list_devices(), format_devices, text, as_json=as_json)

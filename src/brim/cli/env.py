"""`brim env`: what somebody who reads your issue needs to know."""

from __future__ import annotations

from brim.cli.options import AS_JSON
from brim.cli.output import print_json, print_report


def run_env(as_json: bool = AS_JSON) -> None:
    """Print versions, GPUs and settings for an issue.

    No token is shown.

    \b
    Example:
      brim env
    """
    from brim.cli.surroundings import read_surroundings

    facts = read_surroundings()
    if as_json:
        print_json(facts)
        return
    from brim.report.listings import format_facts

    print_report(format_facts(facts))

"""The verbs and flags people have typed into scripts. `python tests/guards/test_cli_surface.py` writes them anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from brim.cli.app import VERBS
from brim.cli.command import make_command
from brim.planner.options import JobOptions

SURFACE = Path(__file__).with_name("cli_surface.json")


def read_surface() -> dict[str, list[str]]:
    return {verb: sorted(name for param in make_command(verb).params for name in list_names(param)) for verb in VERBS}


def list_names(param: Any) -> list[str]:
    return [param.metavar] if param.param_type_name == "argument" else [*param.opts, *param.secondary_opts]


def test_verbs_and_flags_are_frozen() -> None:
    assert read_surface() == json.loads(SURFACE.read_text(encoding="utf-8"))


def test_every_option_of_the_planner_is_a_flag() -> None:
    flags = set(read_surface()["plan"])
    names = {"export" if name == "target" else name for name in JobOptions.__dataclass_fields__}
    assert {f"--{name.replace('_', '-')}" for name in names} <= flags


def test_every_verb_has_its_file_and_its_help() -> None:
    for verb in VERBS:
        command = make_command(verb)
        assert command.name == verb
        assert command.help and "Example" in command.help, verb


if __name__ == "__main__":
    SURFACE.write_text(json.dumps(read_surface(), indent=2) + "\n", encoding="utf-8")

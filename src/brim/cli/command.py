"""How a verb becomes a command: its file is imported when asked for, its help is grouped."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from typing import Any

import typer
import typer.core
import typer.main

from brim.errors import quoted

# Both spellings of every flag: --seq-len and --seq_len.
HELP_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"], "token_normalize_func": lambda word: word.replace("_", "-"),
    "max_content_width": 100,
}  # fmt: skip


class Verb(typer.core.TyperCommand):
    """A command whose values are strings and booleans, and whose help lists flags by panel."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the words as they are: typer would import pydantic (0.13 s) to turn strings into strings."""
        if ctx.resilient_parsing or not {"-h", "--help"}.isdisjoint(args):
            return super().parse_args(ctx, args)
        given, rest, _ = self.make_parser(ctx).parse_args(args=list(args))
        if rest:
            ctx.fail(f"unexpected argument {quoted(rest[0])}")
        for param in self.params:
            value = given.get(param.name)
            ctx.params[param.name] = value if isinstance(value, (str, bool)) else param.default
            if param.required and ctx.params[param.name] is None:
                ctx.fail(f"missing {param.metavar}")
        ctx.args = []
        return []

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then each panel of flags."""
        from brim.planner.options import JobOptions

        docs, panels = read_field_docs(JobOptions), dict[str, list[tuple[str, str]]]()
        others: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            if getattr(param, "hidden", False):
                continue
            argument = param.param_type_name == "argument"
            panel = getattr(param, "rich_help_panel", None)
            name = (param.metavar or param.name) if argument else _name_option(param)
            rows = panels.setdefault("Arguments" if argument else panel or "Output and help", [])
            rows.append((name, getattr(param, "help", None) or docs.get(param.name, "")))
            others += [] if argument else _list_others(param)
        if others:
            panels["Other spellings (both - and _)"] = others
        for title, rows in panels.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def read_field_docs(kind: type) -> dict[str, str]:
    """Return the string under each field of a dataclass."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    pairs = zip(body.body, body.body[1:], strict=False) if isinstance(body, ast.ClassDef) else ()
    return {
        field.target.id: str(doc.value.value)
        for field, doc in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }  # fmt: skip


def _name_option(param: Any) -> str:
    """Return the first spelling with its value or its negation, for example `--[no-]packing`."""
    short = [name for name in param.opts if not name.startswith("--")]
    names = [*short, *[name for name in param.opts if name not in short][:1]]
    if param.secondary_opts:
        names[-1] = f"--[no-]{names[-1][2:]}"
    return ", ".join(names) + ("" if param.is_flag else f" {param.metavar or 'TEXT'}")


def _list_others(param: Any) -> list[tuple[str, str]]:
    """Return the other spellings of a flag, each with the one the help shows."""
    first, *others = [name for name in param.opts if name.startswith("--")]
    return [(other, first) for other in others if other != "--help"]


def make_command(verb: str) -> Any:
    """Return the command of a verb from `brim.cli.<verb>`, whose function has the verb's name."""
    function = getattr(import_module(f"brim.cli.{verb}"), f"run_{verb}")
    single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    single.command(verb, cls=Verb, context_settings=HELP_SETTINGS)(function)
    return typer.main.get_command(single)

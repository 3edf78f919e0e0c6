"""The flags that describe a job: one table, from which signatures, help and both spellings follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import typer

from brim.cli.spellings import spell_as_brim
from brim.errors import InvalidInput, quoted


def _read_whole(text: str) -> int:
    if len(text) > 40:
        raise ValueError(text)
    return int(text.replace(",", ""))


def read_whole_numbers(name: str, text: str | None) -> tuple[int, ...]:
    """Return the whole numbers of a list such as `512,2048`; none for None."""
    try:
        return tuple(int(word) for word in text.split(",")) if text is not None and len(text) < 10_000 else ()
    except ValueError:
        problem = f"--{name} must be whole numbers such as 512,2048, not {quoted(text)}"
        raise InvalidInput(problem, option=name) from None


class Flag(NamedTuple):
    """One flag: its option of `brim.plan`, its other names, and how its text is read; the option's docstring is its
    help."""

    name: str
    panel: str
    metavar: str
    aliases: tuple[str, ...] = ()
    read: Callable[[str], Any] = str
    help: str = ""


_DATA, _TRAINED, _HARDWARE = "Data and batch", "What is trained", "Hardware and trainer"
_FIXED, _OUTPUT = "Fixed instead of chosen", "Answer"
FLAGS = (
    Flag("gpu", _HARDWARE, "NAME[:COUNT]|24GiB|auto"),
    Flag("num_nodes", _HARDWARE, "N", ("num-machines", "nnodes"), _read_whole),
    Flag("trainer", _HARDWARE, "NAME"),
    Flag("method", _TRAINED, "full|lora|qlora|..."),
    Flag("load_in_4bit", _TRAINED, "", help="The same as --method qlora."),
    Flag("load_in_8bit", _TRAINED, "", help="The same as --method qlora --quantization int8."),
    Flag("dtype", _TRAINED, "bf16|fp16|fp32", ("torch-dtype",),
         help="dtype the weights are loaded in and products run in."),
    Flag("bf16", _TRAINED, "", help="The same as --dtype bf16."),
    Flag("fp16", _TRAINED, "", help="The same as --dtype fp16."),
    Flag("optimizer", _TRAINED, "NAME", ("optim",)),
    Flag("lora_r", _TRAINED, "N", ("lora-rank",), _read_whole),
    Flag("lora_alpha", _TRAINED, "X", (), float),
    Flag("lora_targets", _TRAINED, "NAMES", ("lora-target-modules", "lora-target")),
    Flag("use_dora", _TRAINED, ""),
    Flag("use_rslora", _TRAINED, ""),
    Flag("quantization", _TRAINED, "nf4|fp4|int8", ("bnb-4bit-quant-type",)),
    Flag("double_quant", _TRAINED, "", ("bnb-4bit-use-double-quant", "use-bnb-nested-quant")),
    Flag("precompute_ref_log_probs", _TRAINED, ""),
    Flag("resume", _TRAINED, "", ("resume-from-checkpoint",)),
    Flag("task", _DATA, "NAME"),
    Flag("seq_len", _DATA, "N", ("max-length", "max-seq-length", "max-seq-len", "cutoff-len"), _read_whole),
    Flag("effective_batch_size", _DATA, "N", ("global-batch-size",), _read_whole),
    Flag("effective_batch_tokens", _DATA, "N", (), _read_whole),
    Flag("dataset", _DATA, "NAME|FILE", ("dataset-name",)),
    Flag("dataset_size", _DATA, "N", (), _read_whole),
    Flag("epochs", _DATA, "X", ("num-train-epochs",), float),
    Flag("packing", _DATA, ""),
    Flag("micro_batch_size", _FIXED, "N", ("per-device-train-batch-size",), _read_whole),
    Flag("gradient_accumulation_steps", _FIXED, "N", (), _read_whole),
    Flag("activation_checkpointing", _FIXED, "KIND"),
    Flag("gradient_checkpointing", _FIXED, "", help="The same as --activation-checkpointing full, or none."),
    Flag("attention_kernel", _FIXED, "KIND", ("attn-implementation",)),
    Flag("loss_kernel", _FIXED, "KIND"),
    Flag("optimizer_kernel", _FIXED, "KIND"),
    Flag("allocator", _FIXED, "KIND"),
    Flag("by", _OUTPUT, "rule|formula|trace|trial"),
    Flag("moe_imbalance", _OUTPUT, "X", (), float),
    Flag("history", _OUTPUT, ""),
    Flag("refresh", _OUTPUT, ""),
)  # fmt: skip
BOOLEANS = frozenset(
    name.replace("_", "-") for flag in FLAGS if not flag.metavar for name in (flag.name, *flag.aliases)
)
MODEL = typer.Argument(
    None, metavar="MODEL", show_default=False,
    help="Hub id, built-in name, bare size such as 7B, folder, or config.json.",
)  # fmt: skip
MODEL_ALIAS = typer.Option(None, "--model-name-or-path", "--model", hidden=True)
AS_JSON = typer.Option(False, "--json", help="Print JSON instead of text.")


def takes_job(function: Callable[..., None]) -> Callable[..., None]:
    """Give `function(model, job, **own)` the flags of a job in front of its own."""

    def run(**values: Any) -> None:
        model = _pick_model(values.pop("model"), values.pop("model_name_or_path"))
        job = spell_as_brim({flag.name: _read(flag, values.pop(flag.name)) for flag in FLAGS})
        function(model, job, **values)

    declared = list(inspect.signature(function, eval_str=True).parameters.values())[2:]
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in declared]
    first = [_parameter("model", str | None, MODEL), _parameter("model_name_or_path", str | None, MODEL_ALIAS)]
    run.__signature__ = inspect.Signature(first + [_declare(flag) for flag in FLAGS] + own)  # type: ignore[attr-defined]
    run.__doc__ = function.__doc__
    return run


def read_words(words: Sequence[str]) -> list[str]:
    """Return a command line in which HF's `--bf16 True` and `--bf16 False` are `--bf16` and `--no-bf16`."""
    read: list[str] = []
    for word in words:
        name, equals, value = (read[-1] if read else "", "", word) if word[:1] != "-" else word.partition("=")
        flag = name.lstrip("-").replace("_", "-")
        if name.startswith("--") and flag in BOOLEANS and value.lower() in ("true", "false"):
            read[len(read) if equals else -1 :] = [f"--{'' if value.lower() == 'true' else 'no-'}{flag}"]
        else:
            read.append(word)
    return read


def _pick_model(given: str | None, alias: str | None) -> str:
    if (given is None) == (alias is None):
        raise InvalidInput("name one model, for example `brim plan 7B`; `brim models` lists the built-in ones")
    return given if given is not None else str(alias)


def _read(flag: Flag, value: Any) -> Any:
    if not isinstance(value, str) or flag.read is str:
        return value
    try:
        return flag.read(value)
    except ValueError:
        noun = "a whole number" if flag.read is _read_whole else "a number"
        raise InvalidInput(f"{_dashed(flag.name)} must be {noun}, not {quoted(value)}", option=flag.name) from None


def _declare(flag: Flag) -> inspect.Parameter:
    names = [_dashed(name) for name in (flag.name, *flag.aliases)]
    if not flag.metavar:
        names = [f"{name}/--no-{name[2:]}" for name in names]
    option = typer.Option(
        None, *names, help=flag.help or None, metavar=flag.metavar or None, rich_help_panel=flag.panel,
        show_default=False,
    )  # fmt: skip
    return _parameter(flag.name, str | None if flag.metavar else bool | None, option)


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")

"""What a user may say about a job, checked value by value; None means nothing was said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from brim.errors import InvalidInput, UnknownName, quoted
from brim.spec.recipe import Dtype, Method
from brim.spec.strategy import Allocator, AttentionKernel, Checkpointing, LossKernel, OptimizerKernel

LoadFormat = Literal["nf4", "fp4", "int8"]

MOST_SEQUENCES = 2**24
MOST_TOKENS = 2**40
LONGEST_SEQUENCE = 2**24
LARGEST_RANK = 2**16
LARGEST_DATASET = 2**48
MOST_EPOCHS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """The options of `brim.plan`, by keyword; each is a flag of `brim plan` in kebab-case."""

    method: Method | None = None
    """What trains: all weights (`full`), adapters (`lora`), adapters on a quantised base (`qlora`)."""
    gpu: str | None = None
    """A GPU (`rtx-4090`), with a count per node (`h100:8`), a size (`24GiB`), or `auto` for this machine."""
    num_nodes: int | None = None
    """Nodes with these GPUs."""
    trainer: str | None = None
    """Training loop: trl, trl-dpo, transformers, unsloth, accelerate or plain."""
    target: str | None = None
    """Export target the plan must be expressible in; sets the trainer where none is given."""
    seq_len: int | None = None
    """Tokens a sequence is cut or filled to."""
    task: str | None = None
    """What the training is for; sets the range of useful effective batches."""
    effective_batch_size: int | None = None
    """Sequences one optimizer step averages over."""
    effective_batch_tokens: int | None = None
    """The same in tokens."""
    dataset: str | None = None
    """Hub id or file of the dataset."""
    dataset_size: int | None = None
    """Sequences in one epoch."""
    epochs: float | None = None
    """Passes over the data."""
    lora_r: int | None = None
    """Rank of the adapter."""
    lora_alpha: float | None = None
    """Scale numerator of the adapter."""
    lora_targets: str | Sequence[str] | None = None
    """Matrices that get an adapter, comma-separated, or `all-linear`."""
    use_dora: bool | None = None
    """Whether the adapter is weight-decomposed (DoRA); for the trace."""
    use_rslora: bool | None = None
    """Whether the adapter's scale is rank-stabilised; changes no memory."""
    optimizer: str | None = None
    """Key of the optimizers table or HF `optim` value."""
    dtype: Dtype | None = None
    """dtype of matrix products."""
    by: Literal["rule", "formula", "trace", "trial"] | None = None
    """Who answers: the rule of thumb, the tensor-by-tensor formula, a trace of the real step (needs torch), or a trial:
    real steps on this machine's device."""
    micro_batch_size: int | None = None
    """Fixed sequences per rank per forward."""
    gradient_accumulation_steps: int | None = None
    """Fixed micro-batches per optimizer step."""
    activation_checkpointing: Checkpointing | None = None
    """Fixed: none, selective or full."""
    attention_kernel: AttentionKernel | None = None
    """Fixed: eager, sdpa or flash."""
    allocator: Allocator | None = None
    """Fixed: native or expandable_segments."""
    optimizer_kernel: OptimizerKernel | None = None
    """Fixed: loop, foreach or fused."""
    loss_kernel: LossKernel | None = None
    """Fixed: dense, chunked or fused."""
    packing: bool | None = None
    """Whether sequences are filled to the length with several examples."""
    quantization: LoadFormat | None = None
    """Storage of the frozen base under `qlora`."""
    double_quant: bool | None = None
    """Whether the scales are quantised once more."""
    precompute_ref_log_probs: bool | None = None
    """Whether DPO computes its reference's answers before training instead of keeping the reference."""
    resume: bool | None = None
    """Whether the run goes on from a checkpoint."""
    moe_imbalance: float | None = None
    """Tokens of the busiest expert as a multiple of an even share, for the trace."""
    history: bool | None = None
    """Whether measured runs of this card, trainer and family correct the formula; they do unless this is false."""
    refresh: bool | None = None
    """Whether the hub is asked before built-in cards and the cache."""


_WHOLE = {
    "num_nodes": 1024, "seq_len": LONGEST_SEQUENCE, "effective_batch_size": MOST_SEQUENCES,
    "effective_batch_tokens": MOST_TOKENS, "dataset_size": LARGEST_DATASET, "lora_r": LARGEST_RANK,
    "micro_batch_size": MOST_SEQUENCES, "gradient_accumulation_steps": MOST_SEQUENCES,
}  # fmt: skip
_REAL = {"moe_imbalance": 2**16, "epochs": MOST_EPOCHS, "lora_alpha": 2**20}
_CHOICES: dict[str, tuple[str, ...]] = {
    "method": get_args(Method), "dtype": get_args(Dtype), "by": ("rule", "formula", "trace", "trial"),
    "activation_checkpointing": get_args(Checkpointing), "attention_kernel": get_args(AttentionKernel),
    "allocator": get_args(Allocator), "optimizer_kernel": get_args(OptimizerKernel),
    "loss_kernel": get_args(LossKernel), "quantization": get_args(LoadFormat),
}  # fmt: skip
_TRUTHS = ("use_dora", "use_rslora", "packing", "double_quant", "precompute_ref_log_probs", "resume", "history",
           "refresh")
_WORDS = ("gpu", "trainer", "target", "task", "dataset", "optimizer")
_LONGEST_WORD = 4096


def read_options(values: dict[str, Any]) -> JobOptions:
    """Return the options, every value checked.

    Raises:
        UnknownName: no such option. InvalidInput: a value that cannot be meant; the text names the bounds.
    """
    known = [option.name for option in fields(JobOptions)]
    for name in values:
        if name not in known:
            raise UnknownName(kind="option", name=str(name), known=known)
    said = {name: value for name, value in values.items() if value is not None}
    for name, value in said.items():
        _check(name, value)
    return JobOptions(**said)


def _check(name: str, value: Any) -> None:
    if name in _WHOLE:
        _check_whole(name, value, _WHOLE[name])
    elif name in _REAL:
        _check_real(name, value, _REAL[name])
    elif name in _CHOICES and (not isinstance(value, str) or value not in _CHOICES[name]):
        raise UnknownName(kind=name, name=str(value), known=_CHOICES[name])
    elif name in _TRUTHS and not isinstance(value, bool):
        raise InvalidInput(f"{name} must be true or false, not {quoted(value)}", option=name)
    elif name in _WORDS and not _is_word(value):
        raise InvalidInput(f"{name} must be a name, not {quoted(value)}", option=name)
    elif name == "lora_targets":
        split_targets(value)


def _is_word(value: Any) -> bool:
    """Whether it is one printable line with something in it."""
    return isinstance(value, str) and value.isprintable() and bool(value.strip()) and len(value) <= _LONGEST_WORD


def _check_whole(name: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InvalidInput(f"{name} must be a whole number from 1 to {most:,}, not {_echo(value)}", option=name)


def _check_real(name: str, value: Any, most: int) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 < value <= most:
        raise InvalidInput(f"{name} must be a number above 0 and at most {most:,}, not {_echo(value)}", option=name)


def _echo(value: Any) -> str:
    """Return a wrong value as the user knows it; a huge number shortened, without turning it into digits first."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value}" if abs(value) < 10**24 else "a number of more than 24 digits"
    return f"{value}" if isinstance(value, float) else quoted(value)


def split_targets(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return adapter targets as a tuple of names.

    Raises:
        InvalidInput: an empty list, or something that is no name.
    """
    names = value.split(",") if isinstance(value, str) else value
    if isinstance(names, Sequence) and all(isinstance(name, str) for name in names):
        stripped = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
        if stripped and len(stripped) <= 256:
            return stripped
    raise InvalidInput(f"lora_targets must be names such as q_proj,v_proj, not {quoted(value)}", option="lora_targets")

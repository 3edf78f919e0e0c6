"""The knobs of a strategy as they are turned on a small model on the CPU, or why they cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from brim.checks.loops import own_loss
from brim.cost.attention_kernels import FUSED_OPERATORS
from brim.errors import ProbeFailed
from brim.spec.recipe import Recipe
from brim.spec.strategy import Strategy
from brim.tables.read import find_optimizer

Inputs = Mapping[str, Any]
Collate = Callable[[list[Any]], Inputs]
StepWith = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SHARDING = "sharding"
"""Name of the knob that `zero_stage` and the data-parallel axes of the mesh are together."""
_ATTENTION = frozenset(
    packet.default
    for name in FUSED_OPERATORS
    if (packet := getattr(torch.ops.aten, name, None)) is not None
)
_OPTIMIZERS: dict[str, tuple[Any, dict[str, float]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
}
"""Optimizers of torch that have several kernels, with settings under which every term of the update counts."""
_KERNEL_WORDS = {"loop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
_TILE_TOKENS, _TILE_VOCABULARY = 64, 32


def keep_model(model: nn.Module) -> nn.Module:
    """Return the model as it is."""
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One knob, turned."""

    name: str
    """Field of the strategy, or `sharding`."""
    value: str
    """What it is turned to."""
    prepare: Callable[[nn.Module], nn.Module] = keep_model
    """Turns it on a copy of the model and returns what is called."""
    loss_of: Callable[[nn.Module, Inputs], Tensor] | None = None
    """The loss of a micro-batch; the model's own if None."""
    collate: Collate | None = None
    """Makes the micro-batch; the padded one if None."""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What forward and backward run inside of."""
    step_with: StepWith | None = None
    """Makes the optimizer, for a knob that changes the step and not the gradient."""
    step_as: StepWith | None = None
    """Makes the optimizer that it is compared with."""
    draws_again: bool = False
    """Whether dropout could be drawn differently, so that it is compared with dropout on as well."""
    obstacle: str = ""
    """Why it cannot be turned here; empty if it can."""
    note: str = ""
    """What ran in its place, where the real one does not run on a CPU."""
    meaning: str = ""
    """What it means if it changes the result."""


def list_knobs(
    strategy: Strategy, model: nn.Module, rows: Sequence[Any], recipe: Recipe | None = None
) -> tuple[Knob, ...]:
    """Return the knobs that a strategy turns away from the plain way to run, the attention kernel first.

    The plain way is eager attention, a dense loss, padded rows, the optimizer's loop, one rank, nothing recomputed,
    offloaded or compiled. Micro-batches are the proof of accumulation's.

    Args:
        strategy: how the job is run.
        model: the small model.
        rows: sequences as the collator takes them.
        recipe: says which optimizer and which form of checkpointing; AdamW and both forms if None.
    """
    return (
        *_attention(strategy), *_checkpointing(strategy, recipe), *_loss(strategy, model, recipe),
        *_optimizer(strategy, recipe), *_padding(strategy, model, rows), *_offload(strategy), *_sharding(strategy),
        *_compile(strategy), *_only_on_gpus(strategy),
    )  # fmt: skip


def pick_forms(knobs: Iterable[Knob]) -> list[Knob]:
    """Return the knobs that change the gradient and can be turned together: of several forms of one, the first."""
    picked: dict[str, Knob] = {}
    for knob in knobs:
        if not knob.obstacle and knob.step_with is None and knob.name != SHARDING:
            picked.setdefault(knob.name, knob)
    return list(picked.values())


def _attention(strategy: Strategy) -> Iterator[Knob]:
    kernel = strategy.attention_kernel
    obstacle = "flash attention runs on a GPU only" if kernel == "flash" else ""
    if kernel != "eager":
        yield Knob(name="attention_kernel", value=kernel, prepare=partial(set_attention, kernel), obstacle=obstacle,
                   meaning="it does not compute what eager attention does")  # fmt: skip


def set_attention(kernel: str, model: nn.Module) -> nn.Module:
    """Return the model with another attention implementation.

    Raises:
        ProbeFailed: its class has no such implementation.
    """
    try:
        model.set_attn_implementation(kernel)  # type: ignore[operator]
    except (ValueError, AttributeError, NotImplementedError):
        raise ProbeFailed(f"{type(model).__name__} has no {kernel} attention") from None
    return model


def _checkpointing(strategy: Strategy, recipe: Recipe | None) -> Iterator[Knob]:
    kind = strategy.activation_checkpointing
    if kind == "selective":
        context = partial(create_selective_checkpoint_contexts, _keep_attention)
        yield checkpoint_layers(kind, {"use_reentrant": False, "context_fn": context})
    elif kind == "full":
        forms = (False, True) if recipe is None else (recipe.engine.reentrant_checkpointing,)
        for reentrant in forms:
            yield checkpoint_layers(f"{kind}, reentrant" if reentrant else kind, {"use_reentrant": reentrant})


def checkpoint_layers(value: str, options: Mapping[str, Any]) -> Knob:
    """Return activation checkpointing as a knob.

    Args:
        value: what the strategy calls it.
        options: keywords of torch's checkpoint function.
    """

    def prepare(model: nn.Module) -> nn.Module:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(options))  # type: ignore[operator]
        return model

    side = "what layers hand out beside their output, such as router logits, gets no gradient under the reentrant form"
    meaning = side if options.get("use_reentrant") else "what is computed again gives another gradient"
    return Knob(name="activation_checkpointing", value=value, prepare=prepare, draws_again=True, meaning=meaning)


def _keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Source: trl models/selective_activation_checkpointing.py _build_policy_fn: whatever attention returns is kept."""
    if op in _ATTENTION or "flash_attn" in str(op):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _loss(strategy: Strategy, model: nn.Module, recipe: Recipe | None) -> Iterator[Knob]:
    if strategy.loss_kernel == "dense":
        return
    obstacle = ""
    if strategy.loss_kernel == "fused":
        obstacle = "the fused loss is a Triton kernel, which runs on a GPU only"
    elif recipe is not None and recipe.engine.name.startswith("unsloth"):
        obstacle = "unsloth's loss runs on a GPU only"
    elif not _is_causal(model):
        obstacle = f"no chunked loss takes over the head of {type(model).__name__}"
    elif _find_fused_head() is None:
        obstacle = "the installed trl has no chunked loss (1.15 and newer have)"
    yield Knob(
        name="loss_kernel", value=strategy.loss_kernel, prepare=_add_chunked_head, loss_of=_chunked_loss,
        around=_small_tiles, obstacle=obstacle, note="TRL's head, in tiles of 64 tokens x 32 words",
        meaning="it does not compute the model's own loss",
    )  # fmt: skip


def _is_causal(model: nn.Module) -> bool:
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) and not bool(
        getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    )


def _find_fused_head() -> Any:
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        return None
    return add_fused_lm_head


def _add_chunked_head(model: nn.Module) -> nn.Module:
    _find_fused_head()(model)
    return model


def _chunked_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    return own_loss(model, {**inputs, "fused_lm_head": True})


@contextmanager
def _small_tiles() -> Iterator[None]:
    """Let the small model's loss take several tiles in both directions, as a large one's does."""
    import trl.kernels.chunked_logprob as kernel
    import trl.trainer.utils as head

    places = ((kernel, "TOKEN_CHUNK_SIZE", _TILE_TOKENS), (head, "_CHUNKED_LOGPROB_CHUNK_SIZE", _TILE_VOCABULARY))
    with ExitStack() as stack:
        for module, name, size in places:
            if hasattr(module, name):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, size)
        yield


def _optimizer(strategy: Strategy, recipe: Recipe | None) -> Iterator[Knob]:
    kernel, name = strategy.optimizer_kernel, "adamw" if recipe is None else recipe.optimizer
    if kernel == "loop":
        return
    obstacle = ""
    if name not in _OPTIMIZERS:
        kernels = find_optimizer(name).kernels
        one = len(kernels) == 1
        obstacle = f"{name} has one kernel, {kernels[0]}" if one else f"{name} is not torch's and is not run here"
    yield Knob(
        name="optimizer_kernel", value=kernel, obstacle=obstacle, step_with=partial(make_optimizer, name, kernel),
        step_as=partial(make_optimizer, name, "loop"), meaning="it does not step as the loop does",
    )  # fmt: skip


def make_optimizer(name: str, kernel: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return one of torch's optimizers with a kernel; AdamW for a name that torch has no kernels of."""
    kind, settings = _OPTIMIZERS.get(name, _OPTIMIZERS["adamw"])
    return kind(list(parameters), **settings, **_KERNEL_WORDS[kernel])


def _padding(strategy: Strategy, model: nn.Module, rows: Sequence[Any]) -> Iterator[Knob]:
    if not strategy.padding_free:
        return
    fits = _is_causal(model) and all(_can_be_joined(row) for row in rows)
    obstacle = "" if fits else f"sequences of {type(model).__name__} cannot be concatenated"
    apart = strategy.attention_kernel == "flash"
    yield Knob(
        name="padding_free", value="yes", collate=partial(join_rows, model, apart=apart), obstacle=obstacle,
        note="a mask in place of flash attention's variable lengths" if apart else "",
        meaning="joined sequences see each other, or lie at other positions",
    )  # fmt: skip


def _can_be_joined(row: Any) -> bool:
    tokens, labels = row.get("input_ids"), row.get("labels")
    whole = isinstance(tokens, Tensor) and isinstance(labels, Tensor) and tokens.dim() == 1
    return bool(whole and tokens.shape == labels.shape)


def join_rows(model: nn.Module, rows: list[Any], *, apart: bool = False) -> Inputs:
    """Return rows as one row without padding, positions counted anew in each.

    A model that takes no positions gets none: nothing tells it where a sequence starts.

    Args:
        model: the small model.
        rows: causal sequences.
        apart: whether attention is told where each starts, as flash attention is; from positions alone otherwise,
            which not every class of transformers makes its mask of.
    """
    import inspect

    from transformers import DataCollatorWithFlattening

    flat = DataCollatorWithFlattening(return_tensors="pt")([
        {key: row[key] for key in ("input_ids", "labels")} for row in rows
    ])  # fmt: skip
    if apart:
        flat["attention_mask"] = _keep_apart(flat["position_ids"])
    known = inspect.signature(type(model).forward).parameters
    return {key: value for key, value in flat.items() if key != "position_ids" or "position_ids" in known}


def _keep_apart(position_ids: Tensor) -> Tensor:
    """Return the causal mask of joined sequences, (1, 1, tokens, tokens): 0 where a token sees another."""
    sequence = position_ids.eq(0).cumsum(-1)
    sees = sequence.eq(sequence.mT).tril()
    return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]


def _offload(strategy: Strategy) -> Iterator[Knob]:
    if strategy.activation_offload:
        yield Knob(
            name="activation_offload", value="yes", around=_on_host, draws_again=True,
            note="every saved tensor copied away and back; CUDA streams are not checked",
            meaning="what comes back is not what was saved",
        )  # fmt: skip


def _on_host() -> AbstractContextManager[Any]:
    return saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda copied: copied.clone())


def _sharding(strategy: Strategy) -> Iterator[Knob]:
    if not is_sharded(strategy):
        return
    stage, size = strategy.zero_stage, strategy.mesh.data_parallel_size
    how = "DistributedDataParallel" if stage < 2 else "FSDP2"
    note = f"{how} on 2 gloo ranks" + (f", not {size}" if size != 2 else "")
    if stage == 1:
        note += "; how optimizer states are sharded is not checked"
    yield Knob(name=SHARDING, value=f"zero {stage}" if stage else "replicas", note=note,
               meaning="ranks do not add up to the mean over them")  # fmt: skip


def is_sharded(strategy: Strategy) -> bool:
    """Return whether several ranks see different sequences, or share a replica."""
    return strategy.mesh.data_parallel_size > 1 or strategy.zero_stage > 0


def _compile(strategy: Strategy) -> Iterator[Knob]:
    if strategy.compile:
        yield Knob(
            name="compile", value="yes", prepare=torch.compile,  # type: ignore[arg-type]
            note="inductor's code for the CPU", meaning="compiled code computes something else",
        )  # fmt: skip


def _only_on_gpus(strategy: Strategy) -> Iterator[Knob]:
    """Yield what a CPU cannot say anything about."""
    if strategy.layer_kernels != "none":
        text = f"{strategy.layer_kernels}'s layers are Triton kernels, which run on a GPU only"
        yield Knob(name="layer_kernels", value=strategy.layer_kernels, obstacle=text)
    if strategy.offload != "none":
        yield Knob(name="offload", value=strategy.offload, obstacle="there is no GPU here to offload from")
    if strategy.allocator != "native":
        text = "it places CUDA memory, of which there is none here"
        yield Knob(name="allocator", value=strategy.allocator, obstacle=text)
    for axis in ("cp", "tp", "pp", "ep"):
        degree = getattr(strategy.mesh, axis)
        if degree > 1:
            yield Knob(name=f"mesh.{axis}", value=str(degree), obstacle="only data-parallel ranks are started here")

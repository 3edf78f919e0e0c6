"""Somebody's training configuration, read back as a Strategy: the inverse of `brim.exporters`.

What is not said takes the target's own default, so a config that leaves things out is read as the run it starts.
How each knob travels stands at the head of `exporters.words`; what is no knob of a Strategy (learning rate, adapters,
dtype) is passed over, and what would change the knobs but cannot be one (`every_n_layers`, FSDP) is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from brim.errors import InvalidConfig, UnknownName, quoted
from brim.spec.strategy import (
    Allocator,
    AttentionKernel,
    Checkpointing,
    LayerKernels,
    LossKernel,
    Mesh,
    Offload,
    OptimizerKernel,
    Strategy,
)
from brim.tables.dialects import Dialect, find_dialect
from brim.tables.read import find_optimizer, list_optimizers

Words = Mapping[str, Any]

LIGER_LAYERS = ("rope", "rms_norm", "swiglu", "geglu", "layer_norm")
"""Liger's switches that replace layers; all are on unless turned off. Source: liger-kernel monkey_patch.py."""
SOURCE = "trainer args"
MICRO_BATCH = 8
"""HF's default. Source: transformers training_args.py, per_device_train_batch_size."""


def read_trainer_args(keywords: Words, *, target: str, version: str | None = None) -> Strategy:
    """Return the strategy that a configuration describes.

    Args:
        keywords: every setting of the run in one mapping: the config class's own keywords, `attn_implementation` (also
            inside `model_init_kwargs`), `num_processes`, `PYTORCH_CUDA_ALLOC_CONF`, a DeepSpeed config under
            `deepspeed`, an Accelerate config under `accelerate`. `Export.settings` is one. For the target
            `deepspeed` the bare JSON is taken too.
        target: whose words they are, one of the export targets.
        version: of the package that decides the words; the newest dialect if None.

    Raises:
        UnknownName: no such target, version or optimizer.
        InvalidConfig: a value of the wrong kind, or one that no strategy can hold.
    """
    dialect = find_dialect(target, version)
    words = _flatten(keywords, dialect)
    checkpointing, offloaded = _read_checkpointing(words, dialect)
    layer_kernels, loss_kernel = _read_kernels(words, dialect)
    zero = _mapping(_mapping(words, "deepspeed"), "zero_optimization")
    stage = _whole(zero, "stage", 0, least=0)
    micro, steps = _read_batch(words)
    return Strategy(
        micro_batch_size=micro, gradient_accumulation_steps=steps, activation_checkpointing=checkpointing,
        attention_kernel=_read_attention(words), loss_kernel=loss_kernel, optimizer_kernel=_read_optimizer(words),
        layer_kernels=layer_kernels, padding_free=_flag(words, "padding_free", False), activation_offload=offloaded,
        allocator=_read_allocator(words, dialect), compile=_flag(words, "torch_compile", False), zero_stage=stage,
        offload=_read_offload(zero), mesh=_read_mesh(words, micro * steps, stage),
    )  # fmt: skip


def _flatten(keywords: Words, dialect: Dialect) -> dict[str, Any]:
    """Return the words in one mapping, with nested ones beside the others where they are the only ones."""
    if "train_micro_batch_size_per_gpu" in keywords or "zero_optimization" in keywords:
        keywords = {"deepspeed": keywords}
    words = {"optim": dialect.optim_default, **_mapping(keywords, "model_init_kwargs"), **keywords}
    if "accelerate" in words:
        words = {**words, **_mapping(words, "accelerate")}
    for word in ("fsdp", "fsdp_config", "parallelism_config", "deepspeed_config"):
        if words.get(word):
            raise InvalidConfig(source=dialect.target, path=word, problem="is not read yet; only data parallelism is")
    if isinstance(words.get("deepspeed"), str):
        raise InvalidConfig(source=dialect.target, path="deepspeed", problem="is a file name; put its contents here")
    return words


def _read_batch(words: Words) -> tuple[int, int]:
    """Return micro-batch and accumulation; a DeepSpeed config must agree with the keywords beside it."""
    config = _mapping(words, "deepspeed")
    return (
        _agreed(words, "per_device_train_batch_size", config, "train_micro_batch_size_per_gpu", MICRO_BATCH),
        _agreed(words, "gradient_accumulation_steps", config, "gradient_accumulation_steps", 1),
    )


def _agreed(words: Words, word: str, config: Words, key: str, default: int) -> int:
    if config.get(key, "auto") == "auto":
        return _whole(words, word, default)
    said = _whole(config, key, default)
    if word in words and _whole(words, word, default) != said:
        raise InvalidConfig(source="deepspeed", path=key, problem=f"is {said}, but {word} is {words[word]}")
    return said


def _read_checkpointing(words: Words, dialect: Dialect) -> tuple[Checkpointing, bool]:
    """Return what is recomputed, and whether saved activations are kept in host memory."""
    if dialect.activation_offload == "use_gradient_checkpointing":
        word = words.get(dialect.activation_offload, "unsloth")
        return ("full" if word else "none"), word == "unsloth"
    offloaded = _flag(words, "activation_offloading", False)
    on = next(
        (_flag(words, word, False) for word in _both_spellings(dialect.checkpointing) if words.get(word) is not None),
        dialect.checkpointing_default,
    )
    if not on:
        return "none", offloaded
    options = _options(words, dialect)
    if _whole(options, "every_n_layers", 1) != 1:
        raise InvalidConfig(source=dialect.target, path="every_n_layers", problem="other than 1 is not planned")
    selective = _flag(options, "selective", False)
    return ("selective" if selective else "full"), offloaded or _flag(options, "offload", False)


def _both_spellings(word: str) -> tuple[str, ...]:
    """Return the dialect's word and the other name of the same setting: each is an alias of the other."""
    return tuple(dict.fromkeys((word, "activation_checkpointing", "gradient_checkpointing")))


def _options(words: Words, dialect: Dialect) -> Words:
    for word in _both_spellings(dialect.checkpointing):
        if words.get(f"{word}_kwargs") is not None:
            return _mapping(words, f"{word}_kwargs")
    return {}


def _read_attention(words: Words) -> AttentionKernel:
    word = words.get("attn_implementation") or "sdpa"
    if word in ("eager", "sdpa"):
        return cast(AttentionKernel, word)
    if isinstance(word, str) and "flash" in word:
        return "flash"
    raise InvalidConfig(source="from_pretrained", path="attn_implementation", problem=f"{_short(word)} is not planned")


def _read_kernels(words: Words, dialect: Dialect) -> tuple[LayerKernels, LossKernel]:
    """Return layer and loss kernels: what the words say, else the only ones the trainer has."""
    kinds = {word: kind for kind, word in dialect.loss_kernels.items() if word}
    default = next(iter(dialect.loss_kernels))
    loss = {**kinds, "chunked_nll": "chunked"}.get(str(words.get("loss_type")), default)
    if "unsloth" in dialect.layer_kernels:
        return "unsloth", cast(LossKernel, loss)
    if not _flag(words, "use_liger_kernel", False):
        return "none", cast(LossKernel, loss)
    switches = _mapping(words, "liger_kernel_config")
    layers = any(_flag(switches, layer, True) for layer in LIGER_LAYERS)
    # TRL from 1.15 on keeps its own loss; elsewhere Liger brings one.
    if loss != "chunked" and _flag(switches, "fused_linear_cross_entropy", True):
        loss = "fused"
    return ("liger" if layers else "none"), cast(LossKernel, loss)


def _read_optimizer(words: Words) -> OptimizerKernel:
    """Return the kernel that an HF optimizer name stands for."""
    word = words["optim"]
    for row in list_optimizers():
        for kernel, name in row.hf.items():
            if name == word:
                return cast(OptimizerKernel, kernel)
    if not isinstance(word, str):
        raise InvalidConfig(source="optim", path="optim", problem=f"{_short(word)} is no name")
    try:
        return cast(OptimizerKernel, find_optimizer(word).kernels[0])
    except UnknownName:
        known = [name for row in list_optimizers() for name in row.hf.values()]
        raise UnknownName(kind="optim", name=word, known=known) from None


def _read_allocator(words: Words, dialect: Dialect) -> Allocator:
    """Return the allocator mode; Unsloth turns expandable segments on unless told otherwise."""
    said = str(words.get("PYTORCH_CUDA_ALLOC_CONF") or words.get("PYTORCH_ALLOC_CONF") or "")
    if not said and dialect.target == "unsloth":
        return "expandable_segments"
    return "expandable_segments" if "expandable_segments:true" in said.replace(" ", "").lower() else "native"


def _read_offload(zero: Words) -> Offload:
    if _mapping(zero, "offload_param").get("device", "none") != "none":
        return "parameters"
    return "none" if _mapping(zero, "offload_optimizer").get("device", "none") == "none" else "optimizer"


def _read_mesh(words: Words, sequences_per_rank: int, stage: int) -> Mesh:
    """Return replicas, or shards from ZeRO stage 1 on; DeepSpeed's global batch tells the ranks if nothing else."""
    total = _mapping(words, "deepspeed").get("train_batch_size", "auto")
    if "num_processes" in words or total == "auto":
        ranks = _whole(words, "num_processes", 1)
    else:
        ranks, rest = divmod(_whole({"train_batch_size": total}, "train_batch_size", 1), sequences_per_rank)
        if rest or not ranks:
            problem = f"is {total}, not a multiple of micro-batch x accumulation = {sequences_per_rank}"
            raise InvalidConfig(source="deepspeed", path="train_batch_size", problem=problem)
    return Mesh(dp_shard=ranks) if stage else Mesh(dp_replicate=ranks)


def _whole(words: Words, key: str, default: int, least: int = 1) -> int:
    value = words.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidConfig(source=SOURCE, path=key, problem=f"must be a whole number from {least}, is {_short(value)}")
    return value


def _flag(words: Words, key: str, default: bool) -> bool:
    value = words.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidConfig(source=SOURCE, path=key, problem=f"must be true or false, is {_short(value)}")
    return value


def _mapping(words: Words, key: str) -> Words:
    value = words.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidConfig(source=SOURCE, path=key, problem=f"must hold keys and values, is {_short(value)}")
    return value


def _short(value: object) -> str:
    return quoted(value) if isinstance(value, str) else quoted(repr(value)).strip("'\"")

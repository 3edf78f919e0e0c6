"""The real model without its weights: built on the meta device, then given fake parameters.

Random initialisation and PEFT's wrapping fail or crawl on fake tensors, so both happen on the meta device first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from brim.cost.modeling import find_modeling
from brim.cost.setting import attention_kernel
from brim.errors import BrimError, MissingExtra, ProbeFailed, quoted
from brim.probes.adapters import adapt
from brim.probes.checkpointing import checkpoint
from brim.probes.dtypes import torch_dtype
from brim.probes.experts import separate_experts
from brim.probes.fused_adapters import fuse_adapters
from brim.probes.fused_layers import fuse_layers
from brim.probes.losses import replace_loss
from brim.probes.quantized import quantize_base
from brim.spec.recipe import Dtype, Recipe
from brim.spec.strategy import AttentionKernel, Strategy

_CUT = "_brim_cut"

BuildModel = Callable[[], torch.nn.Module]


def build_from_config(
    config: Mapping[str, Any], architecture: str, attention: AttentionKernel, dtype: Dtype | None = None
) -> torch.nn.Module:
    """Return transformers' own model of a config, on whatever device is the default one.

    With a dtype, weights and buffers are made as `from_pretrained(dtype=...)` makes them: buffers that a model's code
    computes in the default dtype are then in it, rotary frequencies stay in fp32. Without, everything is in fp32.

    Flash attention is asked for as SDPA, because the package `flash-attn` need not be here; the kernel is chosen later.
    An architecture without SDPA in its code gets eager attention.

    Raises:
        MissingExtra: transformers is not installed. ProbeFailed: it cannot build this config.
    """
    kind = find_class(architecture)
    try:
        known = make_config(config)
        kernel = attention_kernel(attention, find_modeling(config["model_type"]))
        if not getattr(kind, "_supports_sdpa", True):
            kernel = "eager"
        made_in = {} if dtype is None else {"dtype": torch_dtype(dtype)}
        return kind._from_config(known, attn_implementation="eager" if kernel == "eager" else "sdpa", **made_in)
    except Exception as error:  # whatever a model's own constructor raises
        raise ProbeFailed(f"{architecture} cannot be built from its config: {_first_line(error)}") from error


def find_class(architecture: str) -> Any:
    """Return a class of transformers.

    Raises:
        MissingExtra: transformers is not installed. ProbeFailed: it has no such class.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtra(package="transformers", extra="trace", purpose="--by trace") from None
    kind = getattr(transformers, architecture, None)
    if kind is None:
        text = f"transformers {transformers.__version__} has no class {quoted(architecture)}; install a newer one"
        raise ProbeFailed(text, architecture=architecture)
    return kind


def make_config(config: Mapping[str, Any]) -> Any:
    """Return a `config.json` as transformers' own object, complete enough to train."""
    import transformers

    own = copy.deepcopy(dict(config))  # transformers fills in the rotary numbers of what it is given
    settings = {key: value for key, value in own.items() if key not in ("model_type", "architectures", "dtype")}
    known = transformers.AutoConfig.for_model(config["model_type"], **settings)
    if getattr(known, "is_encoder_decoder", False) and getattr(known, "decoder_start_token_id", None) is None:
        known.decoder_start_token_id = 0  # which token the decoder's inputs begin with changes no tensor's size
    return known


def prepare_model(
    build_model: BuildModel, recipe: Recipe, strategy: Strategy, *,
    shorten: Callable[[torch.nn.Module], object] | None = None,
) -> torch.nn.Module:  # fmt: skip
    """Return the model as the trainer has it when training starts, its parameters on the meta device.

    Args:
        build_model: returns the model; called with the meta device as default.
        recipe: what is done to it before training.
        strategy: how it is run.
        shorten: takes layers away that need not run, before anything is done to them.

    Raises:
        ProbeFailed: the model cannot be built, wrapped or checkpointed.
    """
    try:
        with torch.device("meta"):
            model = build_model()
        if shorten is not None:
            shorten(model)
        if not recipe.engine.fused_experts:
            separate_experts(model)
        _cast_parameters(model, torch_dtype(recipe.weight_dtype))
        quantize_base(model, recipe)
        if getattr(model, "config", None) is not None:
            model.config.use_cache = False
        fuse_layers(model, strategy)
        checkpoint(model, strategy, recipe.engine)
        model = adapt(model, recipe)
        fuse_adapters(model, recipe, strategy)
        replace_loss(model, recipe, strategy)
    except BrimError:
        raise
    except Exception as error:  # whatever a user's own constructor raises
        raise ProbeFailed(f"the model cannot be built without weights: {_first_line(error)}") from error
    return model.train()


def _cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Buffers keep their dtype: transformers computes rotary frequencies in fp32 whatever the weights are."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def give_tensors(model: torch.nn.Module) -> None:
    """Replace every parameter and buffer by an empty one on the CPU: without data inside a fake mode, real outside.

    Parameters that modules share stay shared.
    """
    parameters: dict[int, torch.nn.Parameter] = {}
    buffers: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in parameters:
                    parameters[id(parameter)] = torch.nn.Parameter(_empty(parameter), parameter.requires_grad)
                module._parameters[name] = parameters[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffers.setdefault(id(buffer), _empty(buffer))


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def find_layers(model: torch.nn.Module) -> torch.nn.ModuleList | None:
    """Return the repeated layers, after which come the final norm, the head and the loss: the heaviest list.

    Of an encoder and a decoder that is the decoder, also once it has been cut down to a few layers.
    """
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) > 0]
    sizes = [sum(parameter.numel() for parameter in layers.parameters()) for layers in lists]
    if not sizes:
        return None
    return next((one for one in lists if hasattr(one, _CUT)), lists[sizes.index(max(sizes))])


def cut_layers(layers: torch.nn.ModuleList, away: slice) -> None:
    """Take layers out of a list, which remains the one that `find_layers` finds."""
    del layers[away]
    setattr(layers, _CUT, True)


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {quoted(line)[1:-1]}"

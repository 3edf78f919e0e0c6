"""From the last hidden state to the loss, as the trainer and its loss kernel do it: what of the logits is stored.

transformers' own code runs unless something replaces it: another version's loss, a kernel that writes over the logits,
logits in chunks, or no logits at all.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from brim.errors import ProbeFailed
from brim.probes.loss_kernels import (
    IGNORED,
    ChunkedLogProb,
    InPlaceCrossEntropy,
    LigerLinearCrossEntropy,
    OldLigerLinearCrossEntropy,
    ScoredPositions,
    UnslothLinearCrossEntropy,
)
from brim.spec.recipe import Engine, Recipe
from brim.spec.strategy import LayerKernels, Strategy
from brim.tables.read import find_kernels

Score = Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Any]]
"""Loss and logits from a model, its last hidden state (batch, length, width) and labels (batch, length)."""

_CHUNK_TOKENS, _NUM_CHUNKS = 128, 8
"""Source: lit_gpt/utils.py chunked_cross_entropy and finetune/lora.py lm_head_chunk_size; torchtune
modules/loss/ce_chunked_output_loss.py num_output_chunks."""
_CAUSAL = ("ForCausalLM", "LMHeadModel")


def replace_loss(model: torch.nn.Module, recipe: Recipe, strategy: Strategy) -> None:
    """Let the model compute its loss as the strategy's loss kernel and the engine do.

    Training on pairs has a loss of its own and is left alone.

    Raises:
        ProbeFailed: the model has no output matrix over a vocabulary that the kernel could take over.
    """
    if recipe.preference is not None:
        return
    get_inner = getattr(model, "get_base_model", None)
    inner = get_inner() if get_inner is not None else model
    kernel, engine = strategy.loss_kernel, recipe.engine
    if kernel == "dense" and not _is_changed(inner, engine, strategy.layer_kernels):
        return
    if not _is_causal(inner):
        name = type(inner).__name__
        text = f"{name} has no output matrix that a {kernel} loss takes over; trace it with loss kernel dense"
        raise ProbeFailed(text)
    if kernel == "dense":
        in_place = find_kernels(strategy.layer_kernels).loss_in_place
        _install(inner, functools.partial(_score_dense, engine=engine, in_place=in_place))
    elif kernel == "chunked":
        _install(inner, _keep_chunks(engine) if engine.keeps_loss_chunks else _score_tiles)
    else:
        # Source: Liger-Kernel transformers/model/llama.py lce_forward (skip_logits = self.training)
        fused = _FUSED.get(strategy.layer_kernels, _score_liger)
        _install(inner, fused, only_training=strategy.layer_kernels != "unsloth")


def _is_changed(model: Any, engine: Engine, kernels: LayerKernels) -> bool:
    """Whether a causal model's dense loss is not the one of the installed transformers."""
    old = engine.frees_narrow_logits or engine.copies_shifted_logits or not engine.upcasts_logits
    return _is_causal(model) and (old or find_kernels(kernels).loss_in_place)


def _is_causal(model: Any) -> bool:
    get_head = getattr(model, "get_output_embeddings", None)
    causal = type(model).__name__.endswith(_CAUSAL) and get_head is not None and get_head() is not None
    return causal and getattr(model, "base_model", model) is not model


def _install(model: Any, score: Score, *, only_training: bool = False) -> None:
    """Give the model a forward that ends in `score`.

    Source: trl/trainer/utils.py add_fused_lm_head and Liger-Kernel lce_forward replace it in the same way: what the
    backbone returns is held until the model returns.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    own = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None or (only_training and not self.training):
            return own(*args, labels=labels, **kwargs)
        outputs = self.base_model(*args, **kwargs)
        loss, logits = score(self, outputs.last_hidden_state, labels)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    model.forward = types.MethodType(forward, model)


def _score_dense(
    model: Any, hidden: torch.Tensor, labels: torch.Tensor, *, engine: Engine, in_place: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits at once.

    Source: transformers 4.45 models/llama/modeling_llama.py LlamaForCausalLM.forward (`logits = logits.float()`, then
    `shift_logits = logits[..., :-1, :].contiguous()`); 4.48 loss/loss_utils.py ForCausalLMLoss shifts the same way.
    """
    logits = _find_logits(model, hidden)
    if engine.frees_narrow_logits:
        logits = logits.float()
    return _cross_entropy(logits, labels, engine, in_place), logits


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, engine: Engine, in_place: bool) -> torch.Tensor:
    wide = logits.float() if engine.upcasts_logits else logits
    if engine.copies_shifted_logits:
        scored, targets = _slice_whole(wide[..., :-1, :]).contiguous(), labels[..., 1:].contiguous()
    else:
        scored, targets = wide, _shift(labels)
    scored, targets = scored.view(-1, scored.shape[-1]), targets.view(-1)
    if in_place:
        return InPlaceCrossEntropy.apply(scored, targets).sum() / (targets != IGNORED).sum()
    return torch.nn.functional.cross_entropy(scored, targets, ignore_index=IGNORED)


def _slice_whole(tensor: torch.Tensor) -> torch.Tensor:
    """The last `:` of `[..., :-1, :]` as a slice of its own, whose backward pass fills another tensor of this size.

    Source: pytorch aten/src/ATen/TensorIndexing.h applySlice: 2.4 leaves a slice out where `length == stop`, which is
    never so of `:`; later ones where `length <= stop`. Engines that copy shifted logits are of that time.
    """
    return torch.ops.aten.slice.Tensor(tensor, -1, 0, tensor.shape[-1])


def _shift(labels: torch.Tensor) -> torch.Tensor:
    """Source: transformers loss/loss_utils.py ForCausalLMLoss (5.x), which pads labels rather than copies logits."""
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()


def _find_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Source: transformers models/{gemma2,granite,cohere}, the lines after `lm_head`."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    if getattr(config, "logits_scaling", None) is not None:
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None) is not None:
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = logits / cap
        logits = torch.tanh(logits)
        logits = logits * cap
    return logits


def _keep_chunks(engine: Engine) -> Score:
    """Logits in chunks, the probabilities of every one of which are kept."""
    return _score_chunks_of_tokens if engine.frees_narrow_logits else _score_eighths


def _score_chunks_of_tokens(
    model: Any, hidden: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Source: Lightning-AI/lit-gpt lit_gpt/model.py GPT.forward (lm_head_chunk_size), lit_gpt/utils.py
    chunked_cross_entropy; Lightning Fabric plugins/precision/half.py convert_output casts every chunk to fp32."""
    logits = [_find_logits(model, part) for part in hidden.split(_CHUNK_TOKENS, dim=1)]
    logits = [chunk.float() for chunk in logits]
    logits[-1] = logits[-1][..., :-1, :]
    parts = [chunk.reshape(-1, chunk.shape[-1]) for chunk in logits]
    targets = [chunk.reshape(-1) for chunk in labels[..., 1:].split(_CHUNK_TOKENS, dim=1)]
    losses = [
        torch.nn.functional.cross_entropy(part, target, reduction="none")
        for part, target in zip(parts, targets, strict=False)
    ]
    return torch.cat(losses).mean(), logits


def _score_eighths(model: Any, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Source: pytorch/torchtune modules/transformer.py chunked_output, modules/loss/ce_chunked_output_loss.py (each
    chunk is cast to fp32 alone), recipes/full_finetune_single_device.py (labels shifted, an ignored one appended)."""
    logits = [_find_logits(model, part) for part in hidden.tensor_split(_NUM_CHUNKS, dim=1)]
    shifted = torch.hstack((labels[..., 1:], torch.full_like(labels[..., :1], IGNORED)))
    total: Any = 0.0
    for chunk, target in zip(logits, shifted.tensor_split(_NUM_CHUNKS, dim=1), strict=True):
        flat = chunk.reshape(-1, chunk.shape[-1])
        total = total + torch.nn.functional.cross_entropy(flat.float(), target.reshape(-1), reduction="sum")
    return total / (shifted != IGNORED).sum(), logits


def _score_tiles(model: Any, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Logits in tiles that are recomputed; evaluation runs the same.

    Source: trl/trainer/utils.py add_fused_lm_head (1.16): only positions with a label are scored, all of them here but
    a sequence's last; trl/trainer/sft_trainer.py asks for log-probabilities, entropies and hits.
    """
    head = model.get_output_embeddings()
    states, targets = hidden[:, :-1], labels[:, 1:]
    mask = targets != IGNORED
    rows = ScoredPositions.apply(states, mask)
    found = ChunkedLogProb.apply(rows, head.weight, head.bias, targets.reshape(-1))
    spread = [one.new_zeros(mask.shape).masked_scatter(mask, one) for one in found]
    return -spread[0].sum() / mask.sum().clamp(min=1), None


def _score_liger(model: Any, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Source: Liger-Kernel transformers/model/loss_utils.py LigerForCausalLMLoss."""
    weight = model.get_output_embeddings().weight
    return LigerLinearCrossEntropy.apply(hidden.view(-1, hidden.shape[-1]), weight, _shift(labels).view(-1)), None


def _score_old_liger(model: Any, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Source: fms-acceleration fms_acceleration_foak fused_ops/liger_ce/fused_linear_cross_entropy_loss.py lce_forward,
    which copies the hidden states to drop the last."""
    states, targets = hidden[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    weight = model.get_output_embeddings().weight
    return OldLigerLinearCrossEntropy.apply(states.view(-1, states.shape[-1]), weight, targets.view(-1)), None


def _score_unsloth(model: Any, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Source: unsloth models/llama.py _CausalLM_fast_forward; unsloth_zoo fused_losses/chunked_logprob.py."""
    weight = model.get_output_embeddings().weight
    rows = hidden.reshape(-1, hidden.shape[-1])
    return UnslothLinearCrossEntropy.apply(rows, weight, _shift(labels).view(-1)), None


_FUSED: dict[str, Score] = {"foak": _score_old_liger, "unsloth": _score_unsloth}

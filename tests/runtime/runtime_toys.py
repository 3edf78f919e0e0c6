"""Tiny random models, ragged batches and the one big batch that accumulation is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

IGNORED = -100
LENGTH = 12
EXACT = 1e-5
SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def build_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))


def build_mixtral(coefficient: float = 0.5) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        **SIZES, num_local_experts=3, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=coefficient, attn_implementation="eager",
    )  # fmt: skip
    return MixtralForCausalLM(config)


def make_rows(lengths: Sequence[int], *, unlabelled: Sequence[int] = (), seed: int = 0) -> list[dict[str, Tensor]]:
    """Return rows padded to one length; row i has `lengths[i]` tokens, the first third of them not trained on."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        tokens = torch.randint(3, 31, (LENGTH,), generator=draw)
        mask = (torch.arange(LENGTH) < length).long()
        labels = tokens.clone()
        labels[mask == 0] = IGNORED
        labels[: length // 3 if number % 3 else 0] = IGNORED
        if number in unlabelled:
            labels[:] = IGNORED
        rows.append({"input_ids": tokens * mask, "attention_mask": mask, "labels": labels})
    return rows


def stack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def cut(rows: Sequence[Mapping[str, Tensor]], size: int) -> list[dict[str, Tensor]]:
    return [stack(rows[start : start + size]) for start in range(0, len(rows), size)]


def read_gradient(model: nn.Module) -> Tensor:
    """Return the whole gradient as one vector."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([grad.detach().flatten().double() for grad in grads])


def differ(found: Tensor, truth: Tensor) -> float:
    """Return the relative distance; where the truth is no gradient at all, how large the one found is."""
    return float((found - truth).norm() / (truth.norm() or 1.0))


def train_whole(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the gradient of one big batch; the model is left without gradients."""
    model.zero_grad()
    model(**batch).loss.backward()
    gradient = read_gradient(model)
    model.zero_grad()
    return gradient


def find_routed_truth(model: nn.Module, rows: Sequence[Mapping[str, Tensor]], size: int) -> Tensor:
    """Return the gradient of a window of the Mixtral: of one big batch, and of the mean router loss of its pieces."""
    micro, model.config.output_router_logits = cut(rows, size), False
    plain = train_whole(model, stack(rows))
    model.config.output_router_logits = True
    torch.stack([model(**batch).aux_loss * 0.5 / len(micro) for batch in micro]).sum().backward()
    routed = read_gradient(model)
    model.zero_grad()
    return plain + routed


class Recorder(torch.optim.SGD):
    """Keeps the gradient that each step was given; moves nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.model, self.seen = model, []

    def step(self, closure: Any = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self.seen.append(read_gradient(self.model))
        return result

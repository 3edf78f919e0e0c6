"""Mixtures of experts: which expert a token goes to is data, so it is stated; and experts as transformers 4 had them.

transformers 5 holds all experts in one parameter and multiplies in groups, whose memory does not depend on who gets
which token. Code that loops over experts (transformers 4, and some models still) runs with the counts of the stated
assignment: what it keeps is the same in sum, and the busiest expert sets its temporaries.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

Choose = Callable[[tuple[int, ...], int], torch.Tensor]


def balance_experts(model: torch.nn.Module, moe_imbalance: float) -> Choose:
    """Return who gets which token: every expert as many, or the busiest `moe_imbalance` times an even share.

    Args:
        model: its config says how many experts there are.
        moe_imbalance: tokens of the busiest expert as a multiple of an even share; 1.0 is balanced.
    """
    counts = _count_experts(getattr(model, "config", None))

    def choose(shape: tuple[int, ...], count: int) -> torch.Tensor:
        if moe_imbalance <= 1.0 or count not in counts:
            return spread_evenly(shape, count)
        return spread_unevenly(shape, count, moe_imbalance)

    return choose


def spread_evenly(shape: tuple[int, ...], count: int) -> torch.Tensor:
    """Return indices that visit every number below `count` equally often, none twice in a row of the last dim."""
    return (torch.arange(torch.Size(shape).numel()) % max(count, 1)).reshape(shape)


def spread_unevenly(shape: tuple[int, ...], count: int, imbalance: float) -> torch.Tensor:
    """Return indices of which number 0 has `imbalance` even shares, at most one per row, and the others the rest."""
    visits, total = shape[-1], torch.Size(shape).numel()
    rows = total // visits
    busy = min(rows, round(imbalance * total / count))
    if count <= visits:
        return spread_evenly(shape, count)
    places = torch.arange(rows)
    # Rows that visit the busiest expert lie evenly between the others.
    visited = (places + 1) * busy // rows > places * busy // rows
    chosen = torch.empty(rows, visits, dtype=torch.long)
    is_rest = torch.ones_like(chosen, dtype=torch.bool)
    is_rest[visited, 0] = False
    chosen[~is_rest] = 0
    chosen[is_rest] = 1 + torch.arange(int(is_rest.sum())) % (count - 1)
    return chosen.reshape(shape)


def _count_experts(config: Any) -> frozenset[int]:
    found: set[int] = set()
    for name, value in vars(config).items() if config is not None else ():
        if "experts" in name and isinstance(value, int):
            found.add(value)
        elif hasattr(value, "to_dict"):
            found |= _count_experts(value)
    return frozenset(found)


_LETTERS = ("mixtral", "minimax", "phimoe")
_LINEAR_ROUTERS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


def separate_experts(model: torch.nn.Module) -> int:
    """Take fused experts apart as transformers 4 had them, in place, and return how many blocks there were.

    Every expert becomes three linear layers under their former names, which adapters and quantisation then find. Models
    whose experts were one parameter in transformers 4 too (GPT-OSS, Llama 4) are left alone.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    blocks = [one for one in model.modules() if _is_fused(getattr(one, "experts", None))]
    for block in blocks:
        block.experts = SeparateExperts(block.experts, letters=model_type in _LETTERS)
        if model_type in _LINEAR_ROUTERS:
            _separate_router(block)
    if blocks:
        _rename(model)
    return len(blocks)


def _rename(model: torch.nn.Module) -> None:
    """Give the model's config another model type: PEFT moves adapters to fused experts by that name.

    Source: peft utils/transformers_weight_conversion.py convert_peft_config_for_transformers.
    """
    config: Any = model.config
    renamed = copy.copy(config)
    renamed.model_type = f"{config.model_type}_separate"
    for module in model.modules():
        if vars(module).get("config") is config:
            module.config = renamed  # type: ignore[assignment]


def _is_fused(experts: Any) -> bool:
    weight = getattr(experts, "gate_up_proj", None)
    whole = isinstance(weight, torch.nn.Parameter) and not getattr(experts, "has_bias", False)
    return whole and not getattr(experts, "is_transposed", False)


class SeparateExpert(torch.nn.Module):
    """Source: transformers 4.46 models/mixtral/modeling_mixtral.py MixtralBlockSparseTop2MLP."""

    def __init__(self, hidden: int, inner: int, act_fn: Any, names: tuple[str, str, str]) -> None:
        """Make the gate, up and down matrices under the given names, without data."""
        super().__init__()
        self.act_fn, self._names = act_fn, names
        for name, (wide_in, wide_out) in zip(names, ((hidden, inner), (hidden, inner), (inner, hidden)), strict=True):
            setattr(self, name, torch.nn.Linear(wide_in, wide_out, bias=False, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the expert's output for its tokens."""
        gate, up, down = (getattr(self, name) for name in self._names)
        return down(self.act_fn(gate(x)) * up(x))  # type: ignore[no-any-return]


class SeparateExperts(torch.nn.ModuleList):
    """One expert after the other on its share of the tokens, added into one output.

    Source: transformers 4.46 models/mixtral/modeling_mixtral.py MixtralSparseMoeBlock.forward.
    """

    def __init__(self, fused: Any, *, letters: bool) -> None:
        """Take the sizes of a fused module of experts."""
        count, twice, hidden = fused.gate_up_proj.shape
        names = ("w1", "w3", "w2") if letters else ("gate_proj", "up_proj", "down_proj")
        super().__init__(SeparateExpert(hidden, twice // 2, fused.act_fn, names) for _ in range(count))

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the experts' outputs.

        Args:
            hidden: (tokens, width). chosen: (tokens, visits), expert numbers. weights: (tokens, visits).
        """
        total = torch.zeros_like(hidden)
        mask = torch.nn.functional.one_hot(chosen, num_classes=len(self)).permute(2, 1, 0)
        for number, expert in enumerate(self):
            visit, token = torch.where(mask[number])
            rows = hidden[None, token].reshape(-1, hidden.shape[-1])
            made = expert(rows) * weights[token, visit, None]
            total.index_add_(0, token, made.to(hidden.dtype))
        return total


def _separate_router(block: Any) -> None:
    """Make the router a linear layer, with the softmax and the choice outside of it."""
    router = block.gate
    count, hidden = router.weight.shape
    block.top_k, block.normalises = router.top_k, getattr(router, "norm_topk_prob", True)
    block.gate = torch.nn.Linear(hidden, count, bias=False, device="meta")
    block.forward = MethodType(_run_block, block)


def _run_block(block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Source: transformers 4.46 models/qwen2_moe/modeling_qwen2_moe.py Qwen2MoeSparseMoeBlock.forward."""
    rows = hidden_states.view(-1, hidden_states.shape[-1])
    logits = block.gate(rows)
    weights = torch.nn.functional.softmax(logits, dim=1, dtype=torch.float)
    weights, chosen = torch.topk(weights, block.top_k, dim=-1)
    if block.normalises:
        weights /= weights.sum(dim=-1, keepdim=True)
    total = block.experts(rows, chosen, weights.to(rows.dtype))
    if hasattr(block, "shared_expert"):
        shared = block.shared_expert(rows)
        total = total + torch.nn.functional.sigmoid(block.shared_expert_gate(rows)) * shared
    return total.reshape(hidden_states.shape)  # type: ignore[no-any-return]

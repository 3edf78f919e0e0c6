"""Mixtures of experts: which expert a token goes to is data, so it is stated.

Which implementation of experts runs is transformers' own choice for the card; with tokens assigned, a loop over
experts runs with the counts of the assignment.
"""

from __future__ import annotations

from collections.abc import Callable
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

"""What ranks tell each other: one small collective per window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Return whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def gather_numbers(
    numbers: Sequence[float], device: torch.device | str = "cpu", group: Any = None
) -> list[list[float]]:  # fmt: skip
    """Return the numbers of every rank, in rank order; only one's own without a process group.

    Args:
        numbers: as many on every rank.
        device: where the tensors of the collective live; NCCL needs the rank's GPU.
        group: process group of the data-parallel ranks; the default group if None.
    """
    if not is_distributed():
        return [list(numbers)]
    mine = torch.tensor(numbers, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return [row.tolist() for row in everyone]


def reduce_unused(model: Any) -> None:
    """Let ranks reduce the same under FSDP2: a parameter that a rank did not use counts there with a gradient of 0.

    An expert without a token has no gradient on its rank, and without this ranks hand FSDP2's reduce-scatter different
    numbers of bytes, which gloo ends with a lost connection and NCCL with a hang.

    Leaves out: what no rank used in a step gets 0 too, where a single process has no gradient; Adam then moves it by
    its momentum and decay. Torch without this switch (2.13 has it): there all ranks must use the same parameters.
    """
    switch = getattr(model, "set_reduce_scatter_unused_params", None)
    if switch is not None:
        switch(True)


def gather_head(model: Any) -> None:
    """Let FSDP2 gather a model's head before a forward pass that reads its weight and never calls it.

    TRL multiplies by `lm_head.weight`. Accelerate shards the head together with the last norm, whose call gathers both;
    where it finds no last norm (image-text models) the weight is still sharded, and TRL's `full_tensor` hands each rank
    the gradient of its own rows alone, never reduced. Gathered by FSDP2, it is reduced as everything else.
    Source: trl/trainer/utils.py `add_fused_lm_head`, accelerate/utils/fsdp_utils.py `fsdp2_prepare_model`.
    """
    head = None
    with suppress(NotImplementedError, AttributeError):  # a model without a head
        head = model.get_output_embeddings()
    if hasattr(head, "unshard"):
        head.unshard()


def share_from_first(value: Any, group: Any = None) -> Any:
    """Return the first rank's value on every rank: all of them measure on the same batch and decide the same."""
    if not is_distributed():
        return value
    first = 0 if group is None else dist.get_global_rank(group, 0)
    box = [value]
    dist.broadcast_object_list(box, src=first, group=group)
    return box[0]


def share_inputs(
    inputs: Mapping[str, Any] | None, device: torch.device | str, group: Any = None
) -> Mapping[str, Any] | None:
    """Return the first rank's micro-batch on every rank, on its own device; None if the first rank has none.

    It travels by the host: a tensor on a GPU would be unpickled on that same GPU by every rank.
    """
    if is_distributed():
        inputs = share_from_first(_move(inputs, "cpu"), group)
    return _move(inputs, device)


def _move(inputs: Mapping[str, Any] | None, device: torch.device | str) -> Mapping[str, Any] | None:
    if inputs is None:
        return None
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}

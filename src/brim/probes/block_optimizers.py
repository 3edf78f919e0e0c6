"""The memory of bitsandbytes' optimizers: the states its kernels work on, without the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

BLOCK_ELEMENTS = 256
"""Elements of an 8-bit state that share an fp32 scale. Source: bitsandbytes optim/optimizer.py init_state."""
LEAST_QUANTISED = 4096
"""Smaller tensors keep fp32 states. Source: bitsandbytes optim/optimizer.py min_8bit_size."""
LEAST_PAGED = 100_000
"""Smaller tensors are not paged, elements. Source: bitsandbytes optim/optimizer.py get_state_buffer."""


class BlockOptimizer(torch.optim.Optimizer):
    """States of bitsandbytes in fp32 or in 8 bits with block scales, some of them paged; steps change no weight.

    bitsandbytes' kernels run on real CUDA tensors only. They update in place and allocate nothing.

    Source: bitsandbytes 0.50 optim/optimizer.py Optimizer1State, Optimizer2State; backends/cuda/ops.py
    _optimizer_update_32bit_impl, _optimizer_update_8bit_blockwise_impl.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, num_states: int, bits: int, paged: bool) -> None:
        """Start without states.

        Args:
            groups: parameter groups; the key `optim_bits` overrides `bits`.
            num_states: states per parameter, 2 for Adam, 1 for Lion.
            bits: 32 or 8 bits per element of a state.
            paged: whether states of large tensors live in managed memory.
        """
        super().__init__(groups, {"optim_bits": bits})
        self.num_states, self.paged = num_states, paged
        self.maps: list[torch.Tensor] = []
        """Values that 8 bits stand for, one table per state, shared by all parameters."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make what states are missing."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    if not self.maps and _is_quantised(parameter, group["optim_bits"]):
                        self.maps = [_make_map(parameter) for _ in range(self.num_states)]
                    self.state[parameter].update(self._make_state(parameter, group["optim_bits"], paged=self.paged))
                parameter.grad = parameter.grad.contiguous()

    @torch.no_grad()
    def load(self) -> None:
        """Make all states as if read from a checkpoint: none is paged, and every parameter gets tables of its own.

        Source: bitsandbytes optim/optimizer.py load_state_dict moves each tensor to the parameter's device with
        `Tensor.to`, which allocates in the ordinary way; step makes states only where there are none.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self._make_state(parameter, group["optim_bits"], paged=False)
                if "absmax1" in state:
                    state |= {f"qmap{one}": _make_map(parameter) for one in range(1, self.num_states + 1)}
                self.state[parameter].update(state)

    def _make_state(self, parameter: torch.Tensor, bits: int, *, paged: bool) -> dict[str, Any]:
        quantised = _is_quantised(parameter, bits)
        dtype = torch.uint8 if quantised else torch.float32
        state: dict[str, Any] = {"step": 0}
        for one in range(1, self.num_states + 1):
            state[f"state{one}"] = torch.zeros_like(parameter, dtype=dtype)
            state[f"state{one}"].is_paged = paged and parameter.numel() >= LEAST_PAGED  # type: ignore[attr-defined]
        for one in range(1, self.num_states + 1) if quantised else ():
            blocks = -(-parameter.numel() // BLOCK_ELEMENTS)
            state[f"absmax{one}"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
        return state


def _is_quantised(parameter: torch.Tensor, bits: int) -> bool:
    return bits == 8 and parameter.numel() >= LEAST_QUANTISED


def _make_map(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros(256, dtype=torch.float32, device=parameter.device)

"""The rows memory is counted in, the moments it is counted at, and the answer they make."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from brim.cost.correction import Calibration
from brim.spec.model import STRICT

Source = Literal["rule", "formula", "trace", "trial"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Bytes of one device at one moment, by what they hold (the rows of torch's own MemTracker)."""

    __pydantic_config__ = STRICT

    parameters: int = 0
    """Weights in their storage dtype: frozen base, adapters, quantisation scales, bytes."""
    buffers: int = 0
    """Model buffers such as rotary tables, bytes."""
    gradients: int = 0
    """Gradients of trained weights, bytes."""
    optimizer_states: int = 0
    """Moments and master weights, bytes."""
    activations: int = 0
    """What the forward pass keeps for the backward pass, bytes."""
    temporaries: int = 0
    """What one operation needs while it runs: logits chain, dequantised weights, optimizer copies, bytes."""
    communication: int = 0
    """Buffers of collectives, bytes."""
    inputs: int = 0
    """Token ids, labels, masks, bytes."""
    overhead: int = 0
    """Library workspaces that live in the allocator, bytes."""

    @property
    def total_bytes(self) -> int:
        """Sum of all rows, bytes."""
        return sum(getattr(self, row.name) for row in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A point of the step, and what is in memory then."""

    __pydantic_config__ = STRICT

    name: str
    """Which point, for example `loss` or `optimizer step`."""
    ledger: Ledger
    """What is in memory."""

    @property
    def total_bytes(self) -> int:
        """Bytes allocated at this moment."""
        return self.ledger.total_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """How long one optimizer step takes: `fixed + accumulation x micro_batch`."""

    __pydantic_config__ = STRICT

    fixed_seconds: float
    """Optimizer and other cost paid once per step, seconds."""
    micro_batch_seconds: float
    """Forward and backward of one micro-batch, seconds."""
    step_seconds: float
    """The whole step, seconds."""
    tokens_per_second_per_device: float
    """Tokens of the effective batch over step time and devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldTensor:
    """Tensors in memory at the peak that are alike: same place in the model, shape, dtype and operator."""

    __pydantic_config__ = STRICT

    bytes: int
    """Bytes of all of them together."""
    count: int
    """How many they are."""
    row: str
    """Ledger row they count in."""
    module: str
    """Path of the module that made them, layers as `*`; the parameter's own name for weights, gradients, states."""
    shape: tuple[int, ...]
    """Shape of each."""
    dtype: str
    """Element type, PyTorch's name."""
    op: str
    """Operator that made them; empty for what was there before the step."""
    line: str
    """File and line of the model's code that ran; empty in the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a strategy costs on a workload, by one answerer. Peak = max over moments."""

    __pydantic_config__ = STRICT

    source: Source
    """Who answered."""
    moments: tuple[Moment, ...]
    """Every moment that was costed, in order of the step; empty for the rule of thumb."""
    peak_allocated_bytes: int
    """Most bytes the framework's allocator hands out at once."""
    peak_reserved_bytes: int
    """Most bytes the allocator holds, fragmentation included."""
    device_bytes: int
    """What the driver's tool shows: reserved, plus the context of the process."""
    peak_moment: str
    """Name of the moment of the peak."""
    step_time: StepTime | None = None
    """Speed, where the answerer knows the device; None otherwise."""
    margin_bytes: int = 0
    """How far this answerer has been wrong, bytes: the p90 of its error times the peak."""
    notes: tuple[str, ...] = ()
    """What was assumed, one sentence each."""
    tensors: tuple[HeldTensor, ...] = ()
    """The largest of what is in memory at the peak, largest first; empty where the answerer knows no tensors."""
    calibration: Calibration | None = None
    """What measured runs corrected; None if the answer is as it was counted."""

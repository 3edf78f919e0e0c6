"""How the job is run: result-neutral knobs only. The planner turns these and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from brim.spec.model import STRICT

Checkpointing = Literal["none", "selective", "full"]
AttentionKernel = Literal["eager", "sdpa", "flash"]
LossKernel = Literal["dense", "chunked", "fused"]
OptimizerKernel = Literal["loop", "foreach", "fused"]
LayerKernels = Literal["none", "liger", "unsloth", "foak"]
Allocator = Literal["native", "expandable_segments"]
Offload = Literal["none", "optimizer", "parameters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Degrees of each parallel axis; their product is the number of devices (`ep` lies inside data parallelism)."""

    __pydantic_config__ = STRICT

    dp_replicate: int = 1
    """Data-parallel replicas."""
    dp_shard: int = 1
    """Ranks that share one sharded replica."""
    cp: int = 1
    """Context-parallel ranks."""
    tp: int = 1
    """Tensor-parallel ranks."""
    pp: int = 1
    """Pipeline stages."""
    ep: int = 1
    """Expert-parallel ranks."""

    @property
    def data_parallel_size(self) -> int:
        """Ranks that see different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def num_devices(self) -> int:
        """Devices the mesh spans."""
        return self.data_parallel_size * self.cp * self.tp * self.pp


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One way to run a workload; changing it never changes the training result."""

    __pydantic_config__ = STRICT

    micro_batch_size: int
    """Sequences per data-parallel rank per forward (HF `per_device_train_batch_size`)."""
    gradient_accumulation_steps: int
    """Micro-batches per optimizer step; derived from the effective batch."""
    activation_checkpointing: Checkpointing = "none"
    """What is recomputed in backward: nothing, all but attention outputs (`selective`), or whole layers (`full`)."""
    attention_kernel: AttentionKernel = "sdpa"
    """Attention implementation (HF `attn_implementation`)."""
    loss_kernel: LossKernel = "dense"
    """How logits meet the loss: all at once, in chunks, or never stored."""
    optimizer_kernel: OptimizerKernel = "fused"
    """Optimizer implementation: one tensor at a time, foreach, or fused."""
    layer_kernels: LayerKernels = "none"
    """Package of fused layer kernels, key of the kernels table."""
    padding_free: bool = False
    """Whether sequences of a micro-batch are concatenated without padding."""
    activation_offload: bool = False
    """Whether saved activations are kept in host memory."""
    allocator: Allocator = "native"
    """CUDA caching allocator mode."""
    compile: bool = False
    """Whether the model is compiled."""
    zero_stage: int = 0
    """What is sharded over data-parallel ranks: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters."""
    offload: Offload = "none"
    """What is kept in host memory between uses."""
    mesh: Mesh = field(default_factory=Mesh)
    """Parallel degrees."""

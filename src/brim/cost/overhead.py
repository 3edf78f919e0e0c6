"""What a process takes besides the model: inputs, what the loop's variables hold, library workspaces, the context."""

from __future__ import annotations

from brim.cost.layers import mask_bytes
from brim.cost.parameters import layer_linears
from brim.cost.setting import Setting
from brim.cost.tape import ZERO, Size, per_token
from brim.spec.device import Device
from brim.spec.model import ModelShape
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.units import KIB, MIB

_INPUT_BYTES_PER_TOKEN = 3 * 8  # token ids, labels and mask, int64
_BATCHES_AHEAD = 2  # accelerate's loader has moved the next micro-batch when this one runs

_CONTEXT_MIB_PER_CAPABILITY = {5: 180, 6: 200, 7: 310, 8: 420, 9: 520, 10: 560, 12: 480}
_DEFAULT_CONTEXT_MIB = 450


def input_bytes(setting: Setting) -> Size:
    """Return the bytes of the micro-batch on the device, the next one and the attention mask included."""
    return per_token(_INPUT_BYTES_PER_TOKEN * _BATCHES_AHEAD) + mask_bytes(setting)


def held_logits(workload: Workload, strategy: Strategy, setting: Setting) -> Size:
    """Return the logits that a variable of the loop keeps alive through the backward pass.

    They are the fp32 copy where a wrapper casts the model's output: accelerate's `convert_outputs_to_fp32` under
    mixed precision, Lightning's plugins, transformers before 4.46.
    """
    engine, head = workload.recipe.engine, workload.model.head
    if not engine.logits_alive_in_backward or strategy.loss_kernel != "dense" or not head:
        return ZERO
    width = 4 if engine.frees_narrow_logits else setting.compute_bytes
    return per_token(width * head[-1].out_features)


def workspace_bytes(device: Device) -> int:
    """Return the matrix library's workspaces: one for the forward thread, one for autograd's.

    Source: aten/src/ATen/cuda/CublasHandlePool.cpp parseChosenWorkspaceSize: `:4096:2:16:8` (8.125 MiB),
    32 MiB from compute capability 9.0. A CPU's has none that is kept.
    """
    if device.vendor == "cpu":
        return 0
    hopper = device.compute_capability is not None and device.compute_capability[0] >= 9
    one = 32 * MIB if hopper else 2 * 4096 * KIB + 8 * 16 * KIB
    return 2 * one


def unpacking_bytes(shape: ModelShape, setting: Setting) -> int:
    """Return the buffer that a package unpacks quantised matrices into, bytes: as large as the largest, and its scales.

    It is there from the first step on. Source: unsloth kernels/utils.py _scratch, fast_dequantize; bitsandbytes
    functional.py quantize_4bit: an fp32 scale for each block of the matrix when unpacked.
    """
    if not setting.unpacking_buffer or setting.quantization is None:
        return 0
    linears = [linear for group in shape.groups for linear, copies in layer_linears(group) if copies == 1]
    largest = max((linear.num_weights for linear in linears if setting.adapts(linear)), default=0)
    return largest * setting.compute_bytes + 4 * (largest // setting.quantization.block_size)


def context_bytes(device: Device) -> int:
    """Return what the process holds on the device outside the allocator: context, kernels, library handles.

    Source: an idle PyTorch process that has run one matrix product, as users report it in nvidia-smi by card:
    about 300 MiB on Turing, 400-500 on Ampere and Ada, 500-600 on Hopper and Blackwell. Drivers move it by 100 MiB.
    A CPU held to a size has none.
    """
    if device.vendor == "cpu":
        return 0
    if device.compute_capability is None:
        return _DEFAULT_CONTEXT_MIB * MIB
    return _CONTEXT_MIB_PER_CAPABILITY.get(device.compute_capability[0], _DEFAULT_CONTEXT_MIB) * MIB

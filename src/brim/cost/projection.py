"""Tapes of matrix products: casts, quantised weights, adapters.

Read from peft 0.21 (tuners/lora/layer.py), bitsandbytes (autograd/_functions.py), torch 2.13 autograd formulas.
"""

from __future__ import annotations

from fractions import Fraction

from brim.cost.eight_bit import multiply_eight_bit
from brim.cost.setting import Setting
from brim.cost.tape import ZERO, Size, Tape, Tensor, fixed, per_token
from brim.spec.model import Linear

FUSED_GATE = "gated activation"
"""Name of what a fused gate makes out of the projections it keeps."""


def project(
    tape: Tape, x: Tensor, linear: Linear, setting: Setting, *,
    copies: int = 1, tokens: Fraction | int = 1, is_output: bool = False,
) -> Tensor:  # fmt: skip
    """Record one matrix product, with its adapter if it has one.

    Args:
        x: the input, `tokens x in_features` elements a token.
        copies: matrices of this shape that run together (experts).
        tokens: rows per token of the micro-batch (experts a token visits).
        is_output: the output matrix, which loaders leave unquantised and `all-linear` leaves without adapter.
    """
    c = setting.compute_bytes
    is_expert = copies > 1 and setting.fused_experts
    quantised = setting.quantization is not None and not is_expert and not is_output
    if quantised and setting.quantization is not None and setting.quantization.kind == "int8":
        output = multiply_eight_bit(tape, x, linear, setting, tokens)
    else:
        output = _multiply(tape, x, linear, setting, copies, tokens, quantised=quantised, is_output=is_output)
    if setting.code.adds_bias and linear.bias:
        element = max(c, setting.residual_bytes if setting.autocast else c)
        output = tape.op("bias", [output], per_token(round(element * linear.out_features * tokens)))
    named = linear.name in setting.adapter_targets
    if setting.adapts(linear) and not is_expert and (named or not is_output):
        output = _adapt(tape, x, output, linear, setting, tokens)
        tape.hold(x)  # the caller of a module has its argument until it returns
    return output


def _multiply(
    tape: Tape, x: Tensor, linear: Linear, setting: Setting, copies: int, tokens: Fraction | int, *,
    quantised: bool, is_output: bool,
) -> Tensor:  # fmt: skip
    """A product in the compute dtype, with the matrix as it is or unpacked from 4 bits."""
    working, trains = _working_weight(linear, setting, quantised), setting.trains_base
    buffered = setting.unpacking_buffer and setting.adapts(linear)
    narrow = _cast_input(tape, x, linear, setting, tokens)
    weight_copy = [] if quantised else _cast_weight(tape, linear, setting, copies, is_output)
    output = tape.op(
        linear.name, [narrow], per_token(round(setting.compute_bytes * linear.out_features * tokens)),
        saves=[*weight_copy, narrow] if trains else weight_copy,
        clings=[narrow] if quantised and _keeps_inputs(setting) else (),
        scratch=ZERO if buffered else working, grad_scratch=working,
        weight_grad=fixed(linear.num_parameters * copies * setting.weight_bytes) if trains else ZERO,
    )  # fmt: skip
    tape.hold(x, *weight_copy)
    return _widen_output(tape, x, narrow, output, linear, setting) if quantised else output


def _widen_output(tape: Tape, x: Tensor, narrow: Tensor, output: Tensor, linear: Linear, setting: Setting) -> Tensor:
    """A 4-bit product answers in the dtype it was asked in, autocast or not.

    Source: bitsandbytes nn/modules.py Linear4bit.forward; auto_gptq qlinear_tritonv2.py QuantLinear.forward.
    """
    if narrow is x:
        return output
    widened = tape.op(f"{linear.name} widen", [output], per_token(output.size.per_token * 4 // setting.compute_bytes))
    tape.hold(x)
    return widened


def _keeps_inputs(setting: Setting) -> bool:
    """Source: bitsandbytes before 0.44 autograd/_functions.py MatMul4Bit: `ctx.tensors`, which no hook sees."""
    return setting.quantization is not None and setting.quantization.keeps_inputs


def _cast_input(tape: Tape, x: Tensor, linear: Linear, setting: Setting, tokens: Fraction | int) -> Tensor:
    """Under autocast each product makes its own 16-bit copy of an fp32 input (only weights are cached)."""
    c = setting.compute_bytes
    wide = x.size.per_token > round(c * linear.in_features * tokens)
    needs = (setting.autocast or setting.quantization is not None) and wide
    return tape.op(f"{linear.name} cast", [x], per_token(round(c * linear.in_features * tokens))) if needs else x


def _working_weight(linear: Linear, setting: Setting, quantised: bool) -> Size:
    """A quantised matrix is expanded for each product, forward and backward, and dropped at once."""
    return fixed(linear.num_weights * setting.compute_bytes) if quantised else ZERO


def _cast_weight(tape: Tape, linear: Linear, setting: Setting, copies: int, is_output: bool) -> list[Tensor]:
    """Autocast keeps the 16-bit copy of an fp32 weight until backward: the product saves it.

    A copy of a trained weight is cached beside that until the forward pass ends, a frozen one's is not.

    Source: torch/csrc/autograd formulas: linear saves its weight operand, which is the cast copy;
    aten/src/ATen/autocast_mode.cpp cached_cast.
    """
    stored = setting.output_bytes if is_output else setting.rest_bytes
    if not setting.autocast or stored <= setting.compute_bytes:
        return []
    size = fixed(linear.num_weights * copies * setting.compute_bytes)
    name, cached = f"{linear.name} weight copy", setting.trains_base
    return [tape.op(name, (), size, saves_output=True, needs_grad=True, held=cached)]


def _adapt(tape: Tape, x: Tensor, base: Tensor, linear: Linear, setting: Setting, tokens: Fraction | int) -> Tensor:
    """LoRA beside a matrix: down to the rank, up again, scaled, added.

    Source: peft tuners/lora/layer.py Linear.forward: the input is cast to the adapter's dtype, the sum is made
    in the wider dtype and cast back; tuners/lora/bnb.py Linear4bit.forward casts the adapter's part before the sum.
    Fused forms add to the matrix's own result.
    """
    c, width = setting.compute_bytes, round(linear.out_features * tokens)
    a = c if setting.autocast else setting.adapter_bytes
    out = base.size
    if setting.fused_adapters:
        _keep_for_fused(tape, x, setting)
        return base
    source = _adapter_input(tape, x, linear, setting, tokens)
    down = tape.op(
        "adapter down", [source], per_token(round(a * setting.adapter_rank * tokens)),
        saves=[source, *_cast_adapter(tape, linear.in_features, setting)],
    )  # fmt: skip
    up = tape.op(
        "adapter up", [down], per_token(a * width), saves=[down, *_cast_adapter(tape, linear.out_features, setting)]
    )
    scaled = tape.op("adapter scale", [up], per_token(a * width))
    if a * width > out.per_token and not setting.bitsandbytes:
        wide = tape.op("adapter sum", [base, scaled], per_token(a * width), grad_scratch=out)
        tape.hold(x, source)
        return tape.op("adapter narrow", [wide], out)
    if a * width > out.per_token:
        scaled = tape.op("adapter narrow", [scaled], out)
    elif a * width < out.per_token:  # the sum promotes it as it goes; its gradient is cast back
        scaled = tape.op("adapter promotion", [scaled], ZERO)
    total = tape.op("adapter sum", [base, scaled], out, passes_grad=True)
    tape.hold(source)
    return total


def _keep_for_fused(tape: Tape, x: Tensor, setting: Setting) -> None:
    """The input is kept, and what of it dropout leaves; of an MLP's last matrix the kept projections give the input.

    Source: unsloth kernels/fast_lora.py LoRA_QKV, LoRA_W, LoRA_MLP.
    """
    if setting.adapter_dropout:
        tape.op("adapter dropout", [x], x.size, saves_output=True)
    if x.name != FUSED_GATE:
        tape.keep(x)


def _cast_adapter(tape: Tape, width: int, setting: Setting) -> list[Tensor]:
    """Autocast's 16-bit copy of an adapter's fp32 matrix, kept as every cast weight is."""
    if not setting.autocast or setting.adapter_bytes <= setting.compute_bytes:
        return []
    size = fixed(setting.compute_bytes * setting.adapter_rank * width)
    return [tape.op("adapter weight copy", (), size, saves_output=True, needs_grad=True, held=True)]


def _adapter_input(tape: Tape, x: Tensor, linear: Linear, setting: Setting, tokens: Fraction | int) -> Tensor:
    """The input in the adapter's dtype, dropped out; under autocast cast once more to 16 bit, a copy of its own.

    Source: peft tuners/lora/bnb.py: beside bitsandbytes' matrices the input is left alone under autocast.
    """
    count = round(linear.in_features * tokens)
    wanted, present = setting.adapter_bytes * count, x.size.per_token
    casts = wanted > present and not (setting.autocast and setting.bitsandbytes)
    source = tape.op("adapter cast", [x], per_token(wanted)) if casts else x
    if setting.adapter_dropout:
        mask = tape.op("adapter mask", (), per_token(count), needs_grad=False)
        source = tape.op("adapter dropout", [source], source.size, saves=[mask])
    narrow = per_token(setting.compute_bytes * count)
    if setting.autocast and source.size.per_token > narrow.per_token:
        source = tape.op("adapter autocast", [source], narrow)
    return source

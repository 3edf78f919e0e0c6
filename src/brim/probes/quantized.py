"""Linears whose frozen weights take 4 or 8 bits, as bitsandbytes and GPTQ store, keep and unpack them.

No kernel of theirs runs here: each stand-in makes the storages that the real layer makes, in the same order, with
whatever values happen to be in them. Packed weights and scales are parameters that do not train, so that they count
among the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from brim.errors import ProbeFailed
from brim.probes.dtypes import torch_dtype
from brim.spec.recipe import Quantization, Recipe

_SCALES_PER_BLOCK = 256
_FOUR_BIT_VALUES, _EIGHT_BIT_VALUES = 16, 256
_OUTLIER_COLUMNS = 7
"""Columns of the input with a value above the threshold of 6. Source: LLM.int8() (arXiv 2208.07339), section 3.2."""
_NIBBLES_PER_WORD = 8
_EMBEDDINGS = ("lm_head", "embed_tokens", "wte", "wpe")


def quantize_base(model: torch.nn.Module, recipe: Recipe) -> None:
    """Put the recipe's quantised linears in the place of a meta-device model's own, and upcast the rest if asked.

    Fused experts are no `nn.Linear` and stay as they are.

    Source: transformers integrations/bitsandbytes.py replace_with_bnb_linear; peft utils/other.py
    prepare_model_for_kbit_training, which upcasts before the adapters are there.

    Raises:
        ProbeFailed: a storage format whose layers do not train.
    """
    quantization = recipe.quantization
    if quantization is None:
        return
    if quantization.kind not in _LAYERS:
        known = ", ".join(sorted(_LAYERS))
        raise ProbeFailed(f"quantization {quantization.kind}: not traced yet; use --by formula, or one of {known}")
    for name, linear in list(_list_replaced(model)):
        model.set_submodule(name, _LAYERS[quantization.kind](linear, quantization, recipe))
    if quantization.upcast_rest:
        _upcast(model)
        if quantization.narrow_embeddings:
            _narrow_embeddings(model)


def _narrow_embeddings(model: torch.nn.Module) -> None:
    """Source: trl 0.13 trainer/utils.py peft_module_casting_to_bf16."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if any(word in name for word in _EMBEDDINGS) and weight is not None and weight.dtype == torch.float32:
            module.to(torch.bfloat16)


def _list_replaced(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield every matrix that quantised loading replaces: all but the output embedding and what is tied to it."""
    from transformers.pytorch_utils import Conv1D

    spared = _list_spared(model)
    for name, module in model.named_modules():
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and not _is_spared(name, spared):
            yield name, module


def _list_spared(model: torch.nn.Module) -> set[str]:
    """Source: transformers quantizers/base.py get_keys_to_not_convert: output embedding, tied weights, last module."""
    spared = {list(model.named_parameters())[-1][0].removesuffix(".weight")}
    spared |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    if outputs is None:
        return spared
    return spared | {name for name, module in model.named_modules() if module is outputs}


def _is_spared(name: str, spared: Iterable[str]) -> bool:
    """Source: transformers quantizers/quantizers_utils.py should_convert_module."""
    return any(name == one or name.startswith(f"{one}.") or name.endswith(one) for one in spared)


def _upcast(model: torch.nn.Module) -> None:
    """Every 16-bit parameter to fp32; a bias goes back to the layer's dtype in its first forward pass."""
    quantised = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    inner = {id(parameter) for module in quantised for parameter in module.parameters()}
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and id(parameter) not in inner:
            parameter.data = parameter.data.to(torch.float32)


class QuantizedLinear(torch.nn.Linear):
    """A frozen matrix in few bits. It is an `nn.Linear` so that PEFT finds it, whatever its weight looks like."""

    def __init__(self, linear: torch.nn.Module, quantization: Quantization, recipe: Recipe) -> None:
        """Take shape and bias from a linear."""
        torch.nn.Module.__init__(self)
        width = linear.weight.shape  # type: ignore[union-attr]
        self.out_features, self.in_features = width if isinstance(linear, torch.nn.Linear) else width[::-1]
        self.keeps_inputs = quantization.keeps_inputs
        self.loaded_dtype, self.compute_dtype = torch_dtype(recipe.weight_dtype), torch_dtype(recipe.compute_dtype)
        bias = linear.bias
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach(), False)  # type: ignore[arg-type]
        self._store(quantization)

    def _store(self, quantization: Quantization) -> None:
        raise NotImplementedError

    def _keep(self, name: str, shape: int | tuple[int, ...], dtype: torch.dtype) -> None:
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))

    def dequantize(self) -> torch.Tensor:
        """Return the matrix unpacked, (out, in)."""
        raise NotImplementedError

    @property
    def W_q(self) -> torch.Tensor:
        """What makes PEFT call `dequantize` for the matrix itself (DoRA).

        Source: peft utils/integrations.py dequantize_module_weight.
        """
        return self.weight


class FourBitLinear(QuantizedLinear):
    """nf4 or fp4.

    Source: bitsandbytes functional.py quantize_4bit, quantize_blockwise: two values a byte, a scale per block, the
    table of values; nested, scales in 8 bit with a scale per 256 of them, their mean, and a table of 256 values.
    """

    def _store(self, quantization: Quantization) -> None:
        count = self.in_features * self.out_features
        blocks = -(-count // quantization.block_size)
        self.nested = quantization.double_quant
        if self.bias is not None:  # nn/modules.py Linear4bit.forward narrows it once and for all
            self.bias.data = self.bias.data.to(self.compute_dtype)
        self._keep("weight", (-(-count // 2), 1), torch.uint8)
        self._keep("absmax", blocks, torch.uint8 if self.nested else torch.float32)
        self._keep("code", _FOUR_BIT_VALUES, torch.float32)
        if self.nested:
            self._keep("nested_absmax", -(-blocks // _SCALES_PER_BLOCK), torch.float32)
            self._keep("nested_code", _EIGHT_BIT_VALUES, torch.float32)
            self._keep("offset", (), torch.float32)

    def dequantize(self) -> torch.Tensor:
        """Return the matrix in the dtype it was loaded in; nested scales are unpacked for the time it takes.

        Source: bitsandbytes functional.py dequantize_4bit.
        """
        scales = torch.empty_like(self.absmax, dtype=torch.float32) if self.nested else self.absmax
        matrix = scales.new_empty((self.out_features, self.in_features), dtype=self.loaded_dtype)
        del scales
        return matrix

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the product in the input's dtype. Source: bitsandbytes nn/modules.py Linear4bit.forward."""
        return _FourBitProduct.apply(input.to(self.compute_dtype), self).to(input.dtype)


class _FourBitProduct(torch.autograd.Function):
    """Source: bitsandbytes autograd/_functions.py MatMul4Bit.

    What it keeps hangs on the context, out of checkpointing's sight.

    Leaves out: the fused kernel that 0.50 runs on at most 1536 rows on some cards, which unpacks nothing forward, and
    that version's second copy of unpacked nested scales (3 % of the unpacked matrix).
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: FourBitLinear) -> torch.Tensor:
        ctx.layer = layer
        ctx.input = input if layer.keeps_inputs and ctx.needs_input_grad[0] else None
        return torch.nn.functional.linear(input, layer.dequantize().to(input.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None]:  # type: ignore[override]
        if not ctx.needs_input_grad[0]:
            return None, None
        return torch.matmul(gradient, ctx.layer.dequantize().to(gradient.dtype)), None


class EightBitLinear(QuantizedLinear):
    """int8 with a scale per output row, inputs quantised on the way. Source: bitsandbytes nn/modules.py Int8Params."""

    def _store(self, quantization: Quantization) -> None:
        self._keep("weight", (self.out_features, self.in_features), torch.int8)
        self._keep("SCB", self.out_features, torch.float32)

    def dequantize(self) -> torch.Tensor:
        """Return the matrix in fp32. Source: bitsandbytes _ops.py int8_vectorwise_dequant."""
        return self.weight * self.SCB.view(-1, 1) * (1 / 127)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the product in the input's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return _EightBitProduct.apply(input, self, bias)


class _EightBitProduct(torch.autograd.Function):
    """Source: bitsandbytes autograd/_functions.py MatMul8bitLt, threshold 6: it keeps its input as it came.

    What it keeps hangs on the context, out of checkpointing's sight. How many columns hold outliers is data; 7 stand
    in for them.
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: EightBitLinear, bias: torch.Tensor | None) -> torch.Tensor:
        rows = input.reshape(-1, input.shape[-1])
        codes, row_scales = _quantize_rows(rows.to(torch.float16))
        outliers = rows.new_empty((rows.shape[0], min(_OUTLIER_COLUMNS, rows.shape[1])))
        output = _multiply_codes(codes, layer, rows.dtype, bias)
        output = output.addmm(outliers, output.new_empty((outliers.shape[1], output.shape[1])))
        del codes, row_scales
        ctx.layer, ctx.shape, ctx.dtype = layer, input.shape, rows.dtype
        columns = rows.new_empty(outliers.shape[1], dtype=torch.int64)
        ctx.kept = (rows, outliers, columns) if ctx.needs_input_grad[0] else None
        return output.reshape(*input.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:  # type: ignore[override]
        if not ctx.needs_input_grad[0]:
            return None, None, None
        gradient = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        matrix = ctx.layer.weight.to(ctx.dtype, copy=True).mul_(ctx.layer.SCB.unsqueeze(1).mul(1 / 127))
        return torch.matmul(gradient.to(ctx.dtype), matrix).view(ctx.shape), None, None


def _quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Source: bitsandbytes backends/cuda/ops.py int8_vectorwise_quant; the mask of outliers lives until it returns."""
    scales = rows.new_empty(rows.shape[0], dtype=torch.float32)
    codes = torch.empty_like(rows, dtype=torch.int8)
    mask = rows.abs() >= 6.0
    del mask
    return codes, scales


def _multiply_codes(
    codes: torch.Tensor, layer: EightBitLinear, dtype: torch.dtype, bias: torch.Tensor | None
) -> torch.Tensor:
    """Sums in int32, scaled to fp16, then in the wanted dtype.

    Source: bitsandbytes backends/default/ops.py int8_scaled_mm; backends/cuda/ops.py int8_mm_dequant.
    """
    sums = codes.new_empty((codes.shape[0], layer.out_features), dtype=torch.int32)
    scaled = torch.empty_like(sums, dtype=torch.float16)
    if bias is not None:
        scaled.add_(bias)
    return scaled.to(dtype)


class GptqLinear(QuantizedLinear):
    """GPTQ in 4 bits. Source: auto_gptq nn_modules/qlinear/qlinear_tritonv2.py QuantLinear.

    The matrix is unpacked to 16 bits for each product, forward and backward, and nothing of the input is kept. What is
    `weight` here is `qweight` there.
    """

    def _store(self, quantization: Quantization) -> None:
        groups = -(-self.in_features // quantization.block_size)
        if self.bias is not None:
            self.bias.data = self.bias.data.to(torch.float16)
        self._keep("weight", (self.in_features // _NIBBLES_PER_WORD, self.out_features), torch.int32)
        self._keep("qzeros", (groups, self.out_features // _NIBBLES_PER_WORD), torch.int32)
        self._keep("scales", (groups, self.out_features), torch.float16)
        self._keep("g_idx", self.in_features, torch.int32)

    def dequantize(self) -> torch.Tensor:
        """Return the matrix as it is unpacked, (in, out). Source: triton_utils/dequant.py dequant248."""
        shape = (self.in_features, self.out_features)
        dtype = torch.bfloat16 if self.compute_dtype is torch.bfloat16 else torch.float16
        return self.scales.new_empty(shape, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the product in the input's dtype."""
        rows = _GptqProduct.apply(input.reshape(-1, input.shape[-1]), self)
        output = rows.to(input.dtype).reshape(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias


class _GptqProduct(torch.autograd.Function):
    """Source: auto_gptq nn_modules/triton_utils/dequant.py QuantLinearFunction, quant_matmul_248."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: GptqLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, input.dtype
        matrix = layer.dequantize()
        return input.to(matrix.dtype) @ matrix

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None]:  # type: ignore[override]
        if not ctx.needs_input_grad[0]:
            return None, None
        matrix = ctx.layer.dequantize()
        return (gradient.to(matrix.dtype) @ matrix.t()).to(ctx.dtype), None


_LAYERS: dict[str, Any] = {
    "nf4": FourBitLinear, "fp4": FourBitLinear, "int8": EightBitLinear, "gptq-int4": GptqLinear,
}  # fmt: skip

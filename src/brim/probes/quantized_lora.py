"""PEFT's LoRA layers over quantised linears: the tensors of `lora.bnb`, without bitsandbytes.

Imported only where peft is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora

from brim.probes.quantized import EightBitLinear, FourBitLinear


class BnbLora(lora.Linear):
    """LoRA over an 8-bit linear: under autocast the input is not cast to the adapter's dtype.

    Source: peft tuners/lora/bnb.py Linear8bitLt.forward, which asks for CUDA's autocast where this asks for the CPU's.
    """

    clones_result = False

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the base's product and the adapter's added to it."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if self.clones_result:
            result = result.clone()
        converts = not torch.is_autocast_enabled("cpu")
        for name in self.active_adapters:
            dtype = result.dtype
            if converts:
                x = x.to(self.lora_A[name].weight.dtype)
            if name in getattr(self, "lora_variant", {}):
                result = self.lora_variant[name].forward(self, active_adapter=name, x=x, result=result)
                result = result.to(dtype) if converts else result
                continue
            output = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
            result = result + (output.to(dtype) if converts else output)
        return result


class FourBitLora(BnbLora):
    """LoRA over a 4-bit linear, whose product is cloned first. Source: peft tuners/lora/bnb.py Linear4bit.forward."""

    clones_result = True


LORA_LAYERS = {FourBitLinear: FourBitLora, EightBitLinear: BnbLora}
"""Which LoRA layer goes over which linear; GPTQ's (peft tuners/lora/gptq.py) makes the tensors of the plain one."""

"""Keys and values of grouped heads repeated to all heads before the kernel, where the engine's transformers does so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from brim.spec.recipe import Engine


@contextlib.contextmanager
def repeat_heads(engine: Engine) -> Iterator[None]:
    """Let transformers copy keys and values for every query head while the context lasts, if the engine does.

    Source: transformers 4.45 models/mistral/modeling_mistral.py MistralFlashAttention2.forward (Mixtral and Qwen 2 too,
    not Llama; until 4.48), and every SDPA class of that time; integrations/sdpa_attention.py use_gqa_in_sdpa since.
    """
    if not engine.repeats_kv:
        yield
        return
    from transformers.integrations import sdpa_attention

    module: Any = sdpa_attention
    original = module.use_gqa_in_sdpa
    module.use_gqa_in_sdpa = lambda *_: False
    try:
        yield
    finally:
        module.use_gqa_in_sdpa = original

"""How transformers writes each architecture, where that decides which tensors stay: facts of code, not of a config.

Source: transformers 5.23 models/<model_type>/modeling_*.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Modeling:
    """What the code of an architecture does beside its shapes."""

    norm_order: Literal["before", "branch", "after"] = "before"
    """Normalisations before each branch; of each branch's output (OLMo 2); or of the sum (BERT)."""
    norm_product: Literal["narrow", "wide", "offset", "unwidened"] = "narrow"
    """An RMS norm's weight multiplies the value cast back (Llama), the fp32 value (OLMo 2), or is itself cast to fp32
    first (Gemma); `unwidened`: the 16-bit input is kept beside its fp32 copy (T5)."""
    softmax: Literal["fp32", "autocast", "stream"] = "fp32"
    """dtype of eager attention's softmax: fp32; fp32 only under autocast; that of the residual stream."""
    softcap: bool = False
    """Whether attention scores pass through a tanh cap."""
    has_sdpa: bool = True
    """Whether SDPA is implemented; eager attention runs otherwise."""
    has_flash: bool = True
    """Whether flash attention is implemented; SDPA runs otherwise."""
    always_masks: bool = False
    """Whether SDPA is given a mask though every sequence is full."""
    copies_heads: bool = False
    """Whether grouped keys and values are indexed out of the fused projection, and several spread to all heads."""
    position_bias: bool = False
    """Whether self-attention adds a learned bias to its scores."""
    adds_bias: bool = False
    """Whether a bias is added beside its matrix product, in its own dtype, rather than inside."""
    widens_inner: bool = False
    """Whether the feed-forward's last matrix gets its input in the dtype of its weight."""
    embedding_norm: bool = False
    """Whether embeddings are normalised before the first layer."""
    drops_output: bool = False
    """Whether the last normalisation of a stack is dropped out."""
    keeps_cache: bool = False
    """Whether the decoder fills its cache of keys and values though the model's config turns it off."""
    wide_router: bool = False
    """Whether the router runs on an fp32 copy of its input."""
    wide_routes: bool = False
    """Whether the weights of the chosen experts stay fp32."""
    clamps_gate: bool = False
    """Whether experts clamp gate and up projections and multiply by a written-out sigmoid (gpt-oss)."""


_PLAIN = Modeling()
_GEMMA = Modeling(norm_product="offset")
_OLMO = Modeling(norm_order="branch", norm_product="wide")
_BERT = Modeling(norm_order="after", softmax="autocast", embedding_norm=True)
_T5 = Modeling(
    norm_product="unwidened", softmax="autocast", position_bias=True, has_flash=False, widens_inner=True,
    drops_output=True, keeps_cache=True,
)  # fmt: skip
_DEEPSEEK = Modeling(wide_router=True, wide_routes=True)
_MODELING = {
    "mixtral": Modeling(wide_routes=True),
    "gemma": _GEMMA, "gemma3": _GEMMA, "gemma3_text": _GEMMA, "gemma4": _GEMMA, "gemma4_text": _GEMMA,
    "gemma2": Modeling(norm_product="offset", softcap=True, has_sdpa=False),
    "olmo2": _OLMO, "olmo3": _OLMO,
    "gpt_oss": Modeling(norm_product="wide", softmax="stream", has_sdpa=False, clamps_gate=True),
    "deepseek_v2": _DEEPSEEK, "deepseek_v3": _DEEPSEEK, "kimi_k2": _DEEPSEEK, "glm4_moe": _DEEPSEEK,
    "bloom": Modeling(has_sdpa=False, has_flash=False, embedding_norm=True),
    "gpt2": Modeling(softmax="autocast"),
    "falcon": Modeling(softmax="autocast", always_masks=True, copies_heads=True, adds_bias=True),
    "bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "bart": _BERT,
    "modernbert": Modeling(embedding_norm=True),
    "t5": _T5, "mt5": _T5,
}  # fmt: skip


def find_modeling(model_type: str) -> Modeling:
    """Return the facts of an architecture's code; the plain ones are Llama's."""
    return _MODELING.get(model_type, _PLAIN)


def list_families() -> frozenset[str]:
    """Return the families whose code is not Llama's: their name decides what the formula says."""
    return frozenset(_MODELING)

"""What is kept of embeddings, before the first layer: the input of their normalisation, and the masks of dropout."""

from __future__ import annotations

from brim.cost.dropout_masks import embedding_masks, list_stacks
from brim.cost.setting import Setting
from brim.cost.tape import ZERO, Size, fixed, per_token
from brim.spec.model import ModelShape

_STATISTICS_BYTES = 8


def kept_by_embeddings(shape: ModelShape, setting: Setting) -> Size:
    """Return what all stacks keep of their embeddings until the end of the backward pass, bytes.

    Under autocast, layer_norm keeps an fp32 copy of its input and, of a narrow weight, of that.

    Leaves out: frozen embeddings through which a gradient flows, as adapters with checkpointing have it.
    Source: transformers models/bert BertEmbeddings, models/bart BartEncoder.forward.
    """
    return embedding_masks(shape, setting) + _kept_by_norms(shape, setting)


def _kept_by_norms(shape: ModelShape, setting: Setting) -> Size:
    if not (setting.code.embedding_norm and setting.trains_base):
        return ZERO
    copied, width = setting.autocast and setting.residual_bytes < 4, shape.hidden_size
    element = 4 if copied else setting.residual_bytes
    one = per_token(element * width + _STATISTICS_BYTES) + fixed(4 * width if copied else 0)
    return one.times(len(list_stacks(shape)))

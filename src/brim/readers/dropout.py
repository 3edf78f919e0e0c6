"""What a config has dropped out while the model trains; every architecture spells it its own way."""

from __future__ import annotations

from typing import NamedTuple

from brim.readers.config_fields import ConfigFields
from brim.spec.model import Dropout


class _Key(NamedTuple):
    """A key of the config, and transformers' own value where a config leaves it out."""

    name: str
    default: float = 0.0


_BERT = {
    "attention_dropout": _Key("attention_probs_dropout_prob", 0.1), "hidden_dropout": _Key("hidden_dropout_prob", 0.1),
    "embedding_dropout": _Key("hidden_dropout_prob", 0.1),
}  # fmt: skip
_T5 = dict.fromkeys(
    ("attention_dropout", "hidden_dropout", "embedding_dropout", "activation_dropout"), _Key("dropout_rate", 0.1)
)
_ATTENTION = {"attention_dropout": _Key("attention_dropout")}
_HIDDEN = _ATTENTION | {"hidden_dropout": _Key("hidden_dropout")}
# Source: transformers 5.24 models/*/configuration_*.py and modeling_*.py. ModernBERT drops the output of attention out
# as it does its weights, not that of the feed-forward; OPT and BLOOM leave embeddings whole.
_PLACES: dict[str, dict[str, _Key]] = {
    "bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "t5": _T5, "mt5": _T5, "bloom": _HIDDEN, "falcon": _HIDDEN,
    "bart": _ATTENTION | {
        "hidden_dropout": _Key("dropout", 0.1), "embedding_dropout": _Key("dropout", 0.1),
        "activation_dropout": _Key("activation_dropout"),
    },
    "vit": {place: _Key(key.name) for place, key in _BERT.items()},
    "modernbert": _ATTENTION | {
        "hidden_dropout": _Key("attention_dropout"), "embedding_dropout": _Key("embedding_dropout"),
        "activation_dropout": _Key("mlp_dropout"),
    },
    "gpt2": {
        "attention_dropout": _Key("attn_pdrop", 0.1), "hidden_dropout": _Key("resid_pdrop", 0.1),
        "embedding_dropout": _Key("embd_pdrop", 0.1),
    },
    "gpt_neox": _HIDDEN | {"embedding_dropout": _Key("hidden_dropout")},
    "opt": _ATTENTION | {"hidden_dropout": _Key("dropout", 0.1)},
    "phi": _ATTENTION | {"hidden_dropout": _Key("resid_pdrop"), "embedding_dropout": _Key("embd_pdrop")},
    "phi3": _ATTENTION | {"hidden_dropout": _Key("resid_pdrop")},
}  # fmt: skip


def read_dropout(fields: ConfigFields) -> Dropout:
    """Return the fractions of a config by the place they act on, 0 to 1.

    Raises:
        InvalidConfig: one is not a number from 0 to 1.
    """
    places = _PLACES.get(fields.model_type, _ATTENTION)
    return Dropout(**{place: fields.fraction(key.name, key.default) for place, key in places.items()})

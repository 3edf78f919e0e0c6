"""What to say of a model that computes no loss: which classes beside it do."""

from __future__ import annotations

from typing import Any

_MOST_NAMES = 3
_USUAL = ("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "ForSequenceClassification")


def explain_no_loss(model: Any) -> str:
    """Return in one line what is missing and what to pass: classes that are the same model with a head."""
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    names = _list_heads(kind)
    named = f" such as {', '.join(names)}" if names else ""
    return (
        f"{kind} returns no loss to train on; pass a config.json whose architectures names a class with one{named}, "
        "or a build_model of your own"
    )


def _list_heads(kind: str) -> list[str]:
    try:
        import transformers
    except ImportError:
        return []
    stem = kind.removesuffix("EncoderModel").removesuffix("Model")
    others = sorted(name for name in dir(transformers) if name.startswith(f"{stem}For"))
    usual = [stem + suffix for suffix in _USUAL if stem + suffix in others]
    return list(dict.fromkeys([*usual, *others]))[:_MOST_NAMES] if stem else []

"""The class that is trained -> the matrices after the last layer."""

from __future__ import annotations

from dataclasses import dataclass

from brim.readers.config_fields import ConfigFields, describe
from brim.spec.model import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What follows the last layer."""

    linears: tuple[Linear, ...] = ()
    """Matrices; the last gives the logits."""
    vocab_size: int = 0
    """Rows of a head over tokens, else 0."""
    tied: bool = False
    """Whether the last matrix is the token embedding."""
    other_parameters: int = 0
    """Norms and separate biases, elements."""


def read_architecture(fields: ConfigFields, default: str) -> str:
    """Return the class that is trained: `architectures[0]`, or the natural one if the config names none.

    Raises:
        InvalidConfig: `architectures` is no list of names.
    """
    names = fields.values.get("architectures")
    if names is None:
        return default
    if not isinstance(names, (list, tuple)):
        fields.refuse("architectures", f"must be a list, not {describe(names)}")
    if not names:
        return default
    if not isinstance(names[0], str) or not 0 < len(names[0]) <= 200:
        fields.refuse("architectures", f"must hold class names, not {describe(names[0])}")
    return names[0]


def class_suffix(fields: ConfigFields, architecture: str, prefixes: tuple[str, ...]) -> str:
    """Return what follows the architecture's name in the class name, for example `ForCausalLM`.

    Raises:
        UnsupportedModel: the class belongs to another architecture.
    """
    for prefix in sorted(prefixes, key=len, reverse=True):
        if architecture.startswith(prefix):
            return architecture.removeprefix(prefix)
    fields.unsupported(f"class {architecture[:60]} ({fields.model_type})")


def language_head(
    fields: ConfigFields,
    width: int,
    *,
    bias: bool = False,
    before: tuple[Linear, ...] = (),
    name: str = "lm_head",
    tied: bool | None = None,
) -> Head:
    """Return an output head over the vocabulary; `tied` None means as `tie_word_embeddings` says."""
    vocab_size = fields.number("vocab_size")
    return Head(
        linears=(*before, Linear(name=name, in_features=width, out_features=vocab_size, bias=bias)),
        vocab_size=vocab_size,
        tied=fields.flag("tie_word_embeddings") if tied is None else tied,
    )


def label_head(fields: ConfigFields, width: int, name: str, *, bias: bool, before: tuple[Linear, ...] = ()) -> Head:
    """Return a classification head over `num_labels` classes."""
    return Head(linears=(*before, Linear(name=name, in_features=width, out_features=fields.num_labels(), bias=bias)))


def span_head(width: int) -> Head:
    """Return the head of extractive question answering: start and end of the span."""
    return Head(linears=(Linear(name="qa_outputs", in_features=width, out_features=2, bias=True),))

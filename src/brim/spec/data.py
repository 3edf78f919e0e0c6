"""What is trained on: how many sequences there are and how long they are."""

from __future__ import annotations

from dataclasses import dataclass

from brim.spec.model import STRICT


@dataclass(frozen=True, slots=True, kw_only=True)
class DataProfile:
    """Size and lengths of a dataset, as far as known."""

    __pydantic_config__ = STRICT

    name: str | None = None
    """Hub id or file the user gave; None when no dataset was named."""
    num_sequences: int | None = None
    """Sequences in one epoch; None if unknown."""
    seq_len: int
    """Tokens a sequence is cut or filled to; sizes the plan."""
    packing: bool = False
    """Whether sequences are filled to `seq_len`, so that no token is padding."""

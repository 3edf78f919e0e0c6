"""What every reader finds before a head is chosen."""

from __future__ import annotations

from dataclasses import dataclass

from brim.spec.model import Embedding, LayerGroup, Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """One stack of layers and what surrounds it, before a head is chosen."""

    hidden_size: int
    """Width of the residual stream, elements."""
    embeddings: tuple[Embedding, ...]
    """Lookup tables; the first is the token embedding."""
    groups: tuple[LayerGroup, ...]
    """Layers."""
    other_parameters: int = 0
    """Final and embedding norms, elements."""
    stem: tuple[Linear, ...] = ()
    """Matrices before the first layer."""

"""Proofs: that accumulation is exact, and that a strategy changes nothing but memory and time."""

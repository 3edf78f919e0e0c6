"""What a child process is asked to run, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from brim.planner.record import Plan

Ending = Literal["done", "oom", "failed", "lost"]
"""It ran; it ran out of memory; it raised something else; the process was killed, crashed or hung."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A strategy to be run for a few optimizer steps."""

    plan: Plan
    """The job, with the strategy that is run."""
    config: Mapping[str, Any]
    """The model's `config.json`."""
    capacity_bytes: int
    """What the device may hold: of a GPU, less what it has for a smaller one."""
    on_cpu: bool
    """Whether it runs on a capped CPU."""
    script: str | None = None
    """The user's own `train.py:make_trainer`; None for a model of the config with random weights."""
    meeting: str | None = None
    """Where the ranks of this run find each other: a prefix in torchrun's store; None for one rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What running it showed."""

    ending: Ending
    """How it ended."""
    problem: str = ""
    """One line on what went wrong; empty if nothing did."""
    device: str = ""
    """What the driver calls the card, or `cpu`."""
    driver: str | None = None
    """Release of the driver; None where there is none."""
    versions: tuple[tuple[str, str], ...] = ()
    """Package and release of what took part."""
    peak_allocated_bytes: int | None = None
    """Most bytes the allocator handed out at once."""
    peak_reserved_bytes: int | None = None
    """Most bytes the allocator held."""
    device_bytes: int | None = None
    """Most bytes in use on the card, all programs."""
    num_retries: int = 0
    """Times the allocator emptied its pool to go on."""
    num_steps: int = 0
    """Optimizer steps that were run."""
    longest_tokens: int | None = None
    """Tokens of the longest sequence."""
    real_fraction: float = 1.0
    """Share of tokens that are no padding."""
    seconds: Mapping[int, float] = field(default_factory=dict)
    """Seconds of an optimizer step, by the number of micro-batches in it."""
    notes: tuple[str, ...] = ()
    """What was assumed, one sentence each."""

"""What is seen of a running job, and what is said of it: numbers and sentences, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from brim.spec.model import STRICT
from brim.units import format_size

Severity = Literal["note", "warning", "danger"]
Fact = int | float | str


LEAST_MISSING_RATIO = 1.03
"""Measured over predicted peak from which on something is taken to be missing: the formula's own shortfall is 0.8 % at
the 90th percentile of published runs (`tables/accuracy.toml`)."""
LEAST_SCORES_SHARE, MOST_SCORES_SHARE = 0.3, 3.0
"""Share of attention's scores that a kernel may keep beyond what is planned. Measured: 1.0 to 2.9
(benchmarks/results/watch_forecast.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Something seen in a run that its user should know; never a reason to stop it."""

    __pydantic_config__ = STRICT

    code: str
    """Stable short name, for example `fragmentation`; a run says each once, those of memory once for each split."""
    severity: Severity
    """`danger`: the run will stop, or trains something else. `warning`: it may, or wastes time. `note`: to be known."""
    text: str
    """One sentence: what was seen, with both numbers and units, and what would work."""
    step: int = 0
    """Optimizer step at which it was seen, from 1."""
    facts: dict[str, int | float | str] = field(default_factory=dict)
    """The numbers of the sentence, by name: what planning again starts from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """Other ways to run that would stay within the budget; None where there is none or nobody can say."""

    longest_tokens: int | None = None
    """Length that sequences can be cut to."""
    micro_batch_size: int | None = None
    """Largest smaller micro-batch."""
    gradient_accumulation_steps: int | None = None
    """Its accumulation, at the same effective batch."""
    activation_checkpointing: str | None = None
    """Cheapest checkpointing that fits at the same micro-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """A running job in numbers, those of the worst rank; None is what nobody can say."""

    step: int
    """Optimizer steps since the run began."""
    micro_batch_size: int = 1
    """Sequences per rank and forward pass."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    capacity_bytes: int | None = None
    """Memory of the card."""
    budget_bytes: int | None = None
    """Bytes that tensors may take by the plan."""
    peak_allocated_bytes: int | None = None
    """Most that tensors took in training steps after the first."""
    aside_bytes: int | None = None
    """Most that they took in evaluation or saving, where that is more."""
    peak_reserved_bytes: int | None = None
    """Most that the allocator held."""
    rank: int = 0
    """Whose peak it is."""
    first_step: int = 0
    """Step of the first settled reading."""
    first_allocated_bytes: int | None = None
    """Peak of tensors by then, evaluation included."""
    first_reserved_bytes: int | None = None
    """Held by the allocator then."""
    num_retries: int = 0
    """Times the allocator emptied its pool since the run began."""
    num_ooms: int = 0
    """Allocations refused since the run began."""
    seen_tokens: int | None = None
    """Longest sequence so far, padding included."""
    coming_tokens: int | None = None
    """Longest sequence still to come."""
    seen_estimate_bytes: int | None = None
    """Formula's peak at the longest sequence so far."""
    coming_estimate_bytes: int | None = None
    """Formula's peak at the longest still to come."""
    seen_scores_bytes: int = 0
    """How much more the former would be if attention kept its scores."""
    coming_scores_bytes: int = 0
    """How much more the latter would be."""
    fitting: Fitting = Fitting()
    """What would stay within the budget."""
    step_seconds: float | None = None
    """One optimizer step, evaluation and saving left out."""
    estimate_seconds: float | None = None
    """The same as predicted, for as many tokens."""
    first_token_seconds: float | None = None
    """Time of a token, padding included, in the first steps."""
    token_seconds: float | None = None
    """The same lately, over two stretches the faster one."""
    tokens_per_second: float | None = None
    """Real tokens per second and device."""
    padding_fraction: float | None = None
    """Share of the tokens that were run and are padding."""
    expandable: bool = False
    """Whether segments of the allocator can grow."""
    allocator_variable: str = "PYTORCH_ALLOC_CONF"
    """Environment variable that this torch reads."""

    @property
    def ratio(self) -> float | None:
        """Measured over predicted peak, at the lengths that were run."""
        if not self.seen_estimate_bytes or self.peak_allocated_bytes is None:
            return None
        return self.peak_allocated_bytes / self.seen_estimate_bytes

    @property
    def scores_share(self) -> float | None:
        """What is missing in the estimate, as a share of attention's scores; None where they do not explain it.

        Scores grow with the square of the length and are small where it is short, so that a few percent that are
        missing there are most of the peak later. Less than `LEAST_MISSING_RATIO` may be the formula's own error; more
        than `MOST_SCORES_SHARE` of them no kernel keeps: it is something else, as is less than the least share.
        """
        if self.ratio is None or self.ratio < LEAST_MISSING_RATIO or not self.seen_scores_bytes:
            return None
        missing = (self.peak_allocated_bytes or 0) - (self.seen_estimate_bytes or 0)
        share = missing / self.seen_scores_bytes
        return share if LEAST_SCORES_SHARE <= share <= MOST_SCORES_SHARE else None

    def correct(self, estimate_bytes: int, scores_bytes: int = 0) -> int:
        """Return a predicted peak in the light of what was measured: the larger of the ways to be wrong that fit it.

        Where the formula is low, as if by a factor: activations are larger than it knows, and grow; or as if attention
        kept its scores, where they explain it. Where it is high, as if by a constant, such as workspaces that this
        device has not: what grows, grows as it says.

        Args:
            estimate_bytes: the formula's peak.
            scores_bytes: how much more that would be if attention kept its scores.
        """
        if self.ratio is None or self.peak_allocated_bytes is None or self.seen_estimate_bytes is None:
            return estimate_bytes
        found = correct_peak(estimate_bytes, self.seen_estimate_bytes, self.peak_allocated_bytes)
        if self.scores_share is None:
            return found
        return max(found, estimate_bytes + round(self.scores_share * scores_bytes))

    @property
    def coming_peak_bytes(self) -> int | None:
        """Peak at the longest sequence still to come: the formula's, corrected by what was measured."""
        if self.ratio is None or self.coming_estimate_bytes is None or self.peak_allocated_bytes is None:
            return None
        return max(self.peak_allocated_bytes, self.correct(self.coming_estimate_bytes, self.coming_scores_bytes))


def correct_peak(estimate_bytes: int, known_estimate_bytes: int, known_bytes: int) -> int:
    """Return a predicted peak corrected by one that is known: by its factor if that is above 1, else its difference."""
    if known_bytes > known_estimate_bytes:
        return round(estimate_bytes * known_bytes / known_estimate_bytes)
    return max(1, estimate_bytes + known_bytes - known_estimate_bytes)


def describe_progress(sight: Sight) -> str:
    """Return one line on how the first steps went, beside the budget and the estimate."""
    words = []
    if sight.peak_allocated_bytes is not None:
        limit = f" of a budget of {format_size(sight.budget_bytes)}" if sight.budget_bytes else ""
        said = f" (estimate {format_size(sight.seen_estimate_bytes)})" if sight.seen_estimate_bytes else ""
        words.append(f"tensors peak at {format_size(sight.peak_allocated_bytes)}{limit}{said}")
    if sight.peak_reserved_bytes is not None and sight.capacity_bytes:
        words.append(f"{format_size(sight.peak_reserved_bytes)} reserved of {format_size(sight.capacity_bytes)}")
    if sight.step_seconds is not None:
        said = f" (estimate {sight.estimate_seconds:.3g} s)" if sight.estimate_seconds else ""
        words.append(f"{sight.step_seconds:.3g} s a step{said}")
    if sight.tokens_per_second:
        words.append(f"{sight.tokens_per_second:,.0f} tokens/s")
    return f"step {sight.step}: {', '.join(words)}" if words else f"step {sight.step}"

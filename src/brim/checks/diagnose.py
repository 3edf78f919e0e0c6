"""Name what is wrong with an accumulated gradient, from the weight that each micro-batch got in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

CLOSE = 2e-3
"""Relative difference within which a factor is taken for a number such as k; fits in fp32 are good to 1e-5."""

NOT_DIVIDED = "not divided by the accumulation steps"
DIVIDED_TWICE = "divided twice by the accumulation steps"
RANK_FACTOR = "rank factor forgotten or applied twice"
MEAN_OF_MEANS = "mean of means: every micro-batch weighs the same, whatever it counts"
WRONG_COUNT = "wrong count"
BY_SEQUENCES = "weighted by sequences, not by what the loss counts"
PARTIAL_WINDOW = "partial window divided by the configured number of micro-batches"
DROPPED = "micro-batches dropped"
TAIL_DROPPED = "tail dropped: the last partial window is not stepped"
TAIL_LEAKS = "tail leaks: the last partial window is added to the next one"
AUXILIARY = "auxiliary loss scaled wrongly"
CLIPPED = "clipped before accumulation: each micro-batch is clipped on its own"
NOT_SEPARABLE = "not separable: no weighting of micro-batches gives this gradient"
PADDING = "padding, not accumulation: a padded batch differs from its sequences run alone"

_IDENTITIES = {
    "not_divided": NOT_DIVIDED, "divided_twice": DIVIDED_TWICE, "rank_factor": RANK_FACTOR,
    "mean_of_means": MEAN_OF_MEANS, "wrong_count": WRONG_COUNT, "by_sequences": BY_SEQUENCES,
    "partial_window": PARTIAL_WINDOW, "dropped": DROPPED, "tail_dropped": TAIL_DROPPED, "tail_leaks": TAIL_LEAKS,
    "auxiliary": AUXILIARY, "clipped": CLIPPED, "not_separable": NOT_SEPARABLE, "padding": PADDING,
}  # fmt: skip
"""What tables call the causes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One optimizer step, taken apart."""

    found: Tensor
    """The gradient that the loop stepped with."""
    means: Sequence[Tensor]
    """Gradient of each micro-batch's own mean loss, auxiliary parts left out."""
    shares: Sequence[float]
    """The weight that each of them must get: its terms over the window's."""
    num_terms: int
    """What the loss averages over in the whole window, by the measured rule."""
    rows: Sequence[int]
    """Sequences of each micro-batch."""
    auxiliary: Sequence[Tensor] = ()
    """Gradient of each micro-batch's auxiliary part; none if the loss has none."""
    accumulation_steps: int
    """Micro-batches per rank that the loop was told to accumulate."""
    num_ranks: int = 1
    """Data-parallel ranks."""
    other_counts: Mapping[str, int] = field(default_factory=dict)
    """What other rules count in the whole window, by name."""
    noise: float = CLOSE
    """Relative size of what a fit may leave over; larger where gradients are in 16 bit."""


def name_cause(evidence: Evidence) -> str:
    """Return what is wrong with a gradient, in one line; it must differ from the truth.

    The gradient is written as a sum of the micro-batches' own gradients (least squares); the weights tell the bug.
    """
    weights, auxiliary, residual = _solve(evidence)
    if residual > evidence.noise:
        return NOT_SEPARABLE
    labelled = [index for index, share in enumerate(evidence.shares) if share]
    ratios = [weights[index] / evidence.shares[index] for index in labelled]
    cause = next(_name_weights(evidence, weights, labelled, ratios), None)
    if cause is not None:
        return cause
    if auxiliary is not None and not _near(auxiliary * len(evidence.means), 1.0):
        factor = auxiliary * len(evidence.means)
        return f"{AUXILIARY}: {factor:.4g} times its weight{_explain_factor(factor, evidence)}"
    if _clips(evidence, weights, labelled):
        return CLIPPED
    return f"micro-batches weigh {', '.join(f'{ratio:.4g}' for ratio in ratios)} times what they should"


def identify_cause(cause: str) -> tuple[str, ...]:
    """Return the short names of a cause, for tables: `not_divided`, `mean_of_means`, ...; `scaled` if it has none."""
    found = [identity for identity, name in _IDENTITIES.items() if name in cause]
    return tuple(found) or ("scaled",)


def is_made_of(found: Tensor, vectors: Sequence[Tensor]) -> bool:
    """Return whether a gradient is a sum of others, each with some weight."""
    return _fit(found, vectors)[1] <= CLOSE


def _fit(found: Tensor, vectors: Sequence[Tensor]) -> tuple[list[float], float]:
    """Return the weights under which vectors come nearest to a gradient, and the part of its norm that they leave over.

    Vectors of nothing weigh nothing.
    """
    weights = [0.0] * len(vectors)
    used = [index for index, vector in enumerate(vectors) if float(vector.norm())]
    if not used:
        return weights, 1.0
    matrix = torch.stack([vectors[index] for index in used], dim=1)
    solved = torch.linalg.lstsq(matrix, found.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    for index, value in zip(used, solved.tolist(), strict=True):
        weights[index] = value
    return weights, float((matrix @ solved - found).norm() / max(float(found.norm()), 1e-30))


def _solve(evidence: Evidence) -> tuple[list[float], float | None, float]:
    """Return the weight of each micro-batch's mean and of the auxiliary parts' sum, and what they leave over."""
    basis = list(evidence.means)
    if len(evidence.auxiliary):
        basis.append(torch.stack(list(evidence.auxiliary)).sum(0))
    weights, residual = _fit(evidence.found, basis)
    return weights[: len(evidence.means)], (weights[-1] if len(evidence.auxiliary) else None), residual


def _name_weights(
    evidence: Evidence, weights: Sequence[float], labelled: Sequence[int], ratios: Sequence[float]
) -> Iterator[str]:
    """Yield the names that the weights fit, the surest first."""
    if len(labelled) > 1 and any(abs(ratio) < CLOSE for ratio in ratios):
        missing = sum(abs(ratio) < CLOSE for ratio in ratios)
        yield f"{DROPPED}: {missing} of {len(ratios)} have no part in the step"
    factor = _one_number(ratios)
    if factor is not None:
        if not _near(factor, 1.0):
            yield _name_factor(factor, evidence)
        return  # the weights are right: it is not the mean that is wrong
    means = _one_number([weights[index] * len(evidence.means) for index in labelled])
    if means is not None:
        yield _with_factor(means, evidence, MEAN_OF_MEANS)
    rows = sum(evidence.rows)
    by_rows = _one_number([weights[index] * rows / evidence.rows[index] for index in labelled])
    if by_rows is not None:
        yield _with_factor(by_rows, evidence, BY_SEQUENCES)


def _with_factor(factor: float, evidence: Evidence, name: str) -> str:
    return name if _near(factor, 1.0) else f"{_name_factor(factor, evidence)}, and {name}"


def _name_factor(factor: float, evidence: Evidence) -> str:
    """Return what multiplies a gradient whose direction is right."""
    steps, ranks = evidence.accumulation_steps, evidence.num_ranks
    here = len(evidence.means) / ranks
    known = {
        PARTIAL_WINDOW: (here / steps,),
        NOT_DIVIDED: (here, steps),
        DIVIDED_TWICE: (1 / here, 1 / steps),
        f"{RANK_FACTOR} ({ranks} ranks)": (ranks, 1 / ranks),
        f"{NOT_DIVIDED}, and {RANK_FACTOR} ({ranks} ranks)": (here * ranks, steps * ranks),
        f"{DIVIDED_TWICE}, and {RANK_FACTOR} ({ranks} ranks)": (1 / (here * ranks), ranks / here),
    }
    for name, values in known.items():
        if any(_near(factor, value) and not _near(value, 1.0) for value in values):
            return f"{name} (gradient x {factor:.4g})"
    total = evidence.num_terms
    for name, count in evidence.other_counts.items():
        if count and _near(factor, total / count, close=evidence.noise / 10):
            return f"{WRONG_COUNT}: divided by {count} ({name}) where the loss has {total} terms (x {factor:.4g})"
    return f"scaled by {factor:.4g}"


def _explain_factor(factor: float, evidence: Evidence) -> str:
    name = _name_factor(factor, evidence)
    return "" if name.startswith("scaled") else f", {name}"


def _clips(evidence: Evidence, weights: Sequence[float], labelled: Sequence[int]) -> bool:
    """Return whether the largest micro-batches were cut to one norm, and the others left as they are."""
    sizes = [abs(weights[index]) * float(evidence.means[index].norm()) for index in labelled]
    ratios = [weights[index] / evidence.shares[index] for index in labelled]
    limit = max(sizes)
    cut = [_near(size, limit, close=2e-2) for size in sizes]
    return sum(cut) > 1 and all(cut[i] or _near(ratios[i], max(ratios), close=2e-2) for i in range(len(cut)))


def _one_number(values: Sequence[float]) -> float | None:
    """Return the number that all values are; None if they differ."""
    if not values:
        return None
    middle = sum(values) / len(values)
    return middle if all(_near(value, middle) for value in values) else None


def _near(value: float, wanted: float, close: float = CLOSE) -> bool:
    return abs(value - wanted) <= close * abs(wanted)

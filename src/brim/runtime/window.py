"""A window: the micro-batches of one optimizer step on all ranks, and the weight that each one's loss gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brim.losses.form import LossForm
from brim.runtime.ranks import gather_numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What the weights of one optimizer step are made of."""

    form: LossForm
    """What the loss averages over."""
    counts: tuple[int, ...]
    """Terms of each of this rank's micro-batches."""
    num_terms: int
    """Terms of the whole window, all ranks together."""
    num_micro_batches: int
    """Micro-batches of the window, all ranks together."""
    most_micro_batches: int
    """Micro-batches of the rank that has the most."""
    num_ranks: int
    """Ranks whose gradients are averaged."""

    def scale(self, index: int, loss: Tensor, auxiliary: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return what micro-batch `index` runs backward from.

        The mean over n of the window's N terms gets n / N, auxiliary parts 1 / K for K micro-batches; both times the
        number of ranks, since data parallelism averages gradients over them. Summed over the window, and averaged over
        ranks, this is the loss of the whole batch.

        Args:
            index: which of this rank's micro-batches; beyond the last one the weight is 0.
            loss: as the model returned it, auxiliary parts included.
            auxiliary: those parts by kind, with their graph.
        """
        if index >= len(self.counts):
            return loss * 0.0
        part = self.form.sum_auxiliary(auxiliary or {})
        split = self.num_ranks / max(self.num_micro_batches, 1)
        return (loss - part) * self.weigh(index) + part * split

    def weigh(self, index: int) -> float:
        """Return the factor of the mean of micro-batch `index`."""
        if self.form.reduction == "sum":
            return float(self.num_ranks)
        return self.counts[index] * self.num_ranks / self.num_terms if self.num_terms else 0.0

    def prepare(self, index: int, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the inputs of a micro-batch; where none of its terms counts, one is added that gets no weight."""
        count = self.counts[index] if index < len(self.counts) else int(self.form.rule.count(inputs))
        return inputs if count else self.form.rule.add_term(inputs)


def open_window(
    form: LossForm, batches: Sequence[Mapping[str, Any]], device: torch.device | str = "cpu", group: Any = None,
    ask: Callable[[], None] = lambda: None,
) -> Window:  # fmt: skip
    """Return the window of this rank's micro-batches. A collective: every rank calls it once per optimizer step.

    Args:
        form: what the loss averages over.
        batches: the micro-batches of this rank, as keyword arguments of the model; may be none.
        device: where the collective's tensors live.
        group: data-parallel process group; the default one if None.
        ask: called before the collective, once nothing of this rank can fail any more.
    """
    # one wait for the device, however many micro-batches there are
    counts = torch.stack([form.rule.count(batch) for batch in batches]).tolist() if batches else []
    ask()
    everyone = gather_numbers((sum(counts), len(counts)), device, group)
    return Window(
        form=form, counts=tuple(counts), num_terms=int(sum(terms for terms, _ in everyone)),
        num_micro_batches=int(sum(number for _, number in everyone)),
        most_micro_batches=int(max(number for _, number in everyone)), num_ranks=len(everyone),
    )  # fmt: skip

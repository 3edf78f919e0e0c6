"""One micro-batch as the model's forward takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from brim.cost.setting import is_masked
from brim.errors import ProbeFailed
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

MakeInputs = Callable[[], Mapping[str, torch.Tensor]]

_IMAGE_MODELS = ("ForImageClassification",)


def plan_inputs(workload: Workload, strategy: Strategy, model: torch.nn.Module) -> MakeInputs:
    """Token ids and labels, and a mask where one reaches the model: an all-ones mask is dropped by transformers."""
    if workload.model.architecture.endswith(_IMAGE_MODELS):
        raise ProbeFailed(f"inputs of {workload.model.architecture}: not traced yet; pass make_inputs")
    shape = (strategy.micro_batch_size, workload.data.seq_len)
    per_sequence = workload.model.architecture.endswith("ForSequenceClassification")
    masked = is_masked(workload, strategy)

    def make() -> Mapping[str, torch.Tensor]:
        inputs = {"input_ids": torch.zeros(shape, dtype=torch.long)}
        inputs["labels"] = torch.zeros(shape[:1] if per_sequence else shape, dtype=torch.long)
        if masked:
            inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
        return inputs

    return make

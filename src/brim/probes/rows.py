"""Sequences that share a row: laid end to end, told apart by their positions."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from brim.cost.setting import is_flattened
from brim.errors import ProbeFailed
from brim.probes.inputs import MakeInputs
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

_PER_TOKEN = ("input_ids", "labels", "token_type_ids")


def shares_rows(workload: Workload, strategy: Strategy) -> bool:
    """Whether a row holds several sequences: those of a micro-batch, or those that packing has put into one."""
    return is_flattened(workload, strategy) and (strategy.micro_batch_size > 1 or workload.data.packing)


def flatten(make_inputs: MakeInputs, workload: Workload, strategy: Strategy, model: Any) -> MakeInputs:
    """Return a maker of micro-batches as one row each, if that is how they are run.

    Source: trl trainer/sft_trainer.py DataCollatorForLanguageModeling with padding_free: token ids, labels, positions,
    boundaries and the number of each token's sequence, no mask.

    Raises:
        ProbeFailed: the model takes no positions.
    """
    if not is_flattened(workload, strategy):
        return make_inputs
    takes = inspect.signature(_base(model).forward).parameters
    if "position_ids" not in takes:
        text = f"{type(_base(model)).__name__} takes no position_ids, so its sequences cannot share a row"
        raise ProbeFailed(f"{text}; turn padding-free off")
    has_boundaries = any(one.kind == inspect.Parameter.VAR_KEYWORD for one in takes.values())

    def make() -> Mapping[str, Any]:
        inputs = make_inputs()
        return inputs if "position_ids" in inputs else _lay_out(inputs, has_boundaries)

    return make


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _lay_out(inputs: Mapping[str, Any], has_boundaries: bool) -> dict[str, Any]:
    others = sorted(set(inputs) - {*_PER_TOKEN, "attention_mask"})
    if others:
        raise ProbeFailed(f"sequences with {others[0]} cannot share a row; turn padding-free off")
    batch, length = inputs["input_ids"].shape
    row: dict[str, Any] = {name: one.reshape(1, -1) for name, one in inputs.items() if name in _PER_TOKEN}
    row["position_ids"] = torch.arange(length).repeat(batch)[None]
    if has_boundaries:
        row["cu_seq_lens_q"] = row["cu_seq_lens_k"] = torch.arange(batch + 1, dtype=torch.int32) * length
        row["max_length_q"] = row["max_length_k"] = length
        row["seq_idx"] = torch.arange(batch, dtype=torch.int32).repeat_interleave(
            length, output_size=batch * length
        )[None]
    return row


@contextlib.contextmanager
def row_masks(workload: Workload, strategy: Strategy) -> Iterator[None]:
    """Let transformers build the masks of the target while the context lasts.

    Whether positions start anew inside a row is data, which tensors without data do not have; it is answered by what
    is known of the workload. Flash attention reads boundaries and gets no mask.

    Source: transformers masking_utils.py find_packed_sequence_indices, flash_attention_mask.
    """
    try:
        from transformers import masking_utils
    except ImportError:
        yield
        return
    shares = shares_rows(workload, strategy)
    original, interface = masking_utils.find_packed_sequence_indices, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS

    def find(position_ids: torch.Tensor) -> torch.Tensor | None:
        found = original(position_ids)
        return found if shares else None

    masking_utils.find_packed_sequence_indices = find
    if strategy.attention_kernel == "flash":
        interface["sdpa"] = masking_utils.flash_attention_mask
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original
        if strategy.attention_kernel == "flash":
            del interface["sdpa"]

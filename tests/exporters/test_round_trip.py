"""Reader after exporter is the identity, for everything a target can express."""

from __future__ import annotations

from dataclasses import replace

import pytest
from export_plans import make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.errors import Inexpressible
from brim.exporters import export_plan
from brim.readers.trainer_args import read_trainer_args
from brim.spec.strategy import Mesh
from brim.tables.dialects import list_dialects
from brim.tables.read import list_optimizers

DIALECTS = [pytest.param(row, id=f"{row.target}-{row.name}") for row in list_dialects()]
NAMED = [(row.name, kernel) for row in list_optimizers() for kernel in row.hf]
"""Optimizers with a kernel that HF has a name for."""


@st.composite
def plans(draw, row):
    """Draw a plan, mostly of what the dialect can express; what it cannot is refused and passed over."""

    def pick(*values):
        return draw(st.sampled_from(values))

    optimizer, kernel = pick(*NAMED)
    stage, ranks = pick(*row.zero_stages), pick(1, 2, 8)
    plan = make_plan(
        row.target, method=pick("full", "lora", "qlora"), seq_len=pick(256, 4096),
        packing=row.packing and pick(True, False), micro_batch_size=draw(st.integers(1, 512)),
        gradient_accumulation_steps=draw(st.integers(1, 4096)),
        activation_checkpointing=pick(*row.checkpointing_kinds), attention_kernel=pick("eager", "sdpa", "flash"),
        optimizer_kernel=kernel, loss_kernel=pick(*row.loss_kernels), layer_kernels=pick(*row.layer_kernels),
        padding_free=row.padding_free and pick(True, False), allocator=pick("native", "expandable_segments"),
        activation_offload=bool(row.activation_offload) and pick(True, False),
        compile=row.compile and pick(True, False),
        zero_stage=stage, offload=pick(*row.offloads), mesh=Mesh(dp_shard=ranks) if stage else Mesh(dp_replicate=ranks),
    )  # fmt: skip
    recipe = replace(plan.workload.recipe, optimizer=optimizer)
    return replace(plan, workload=replace(plan.workload, recipe=recipe))


@pytest.mark.parametrize("row", DIALECTS)
def test_reading_an_export_gives_the_strategy_back(row) -> None:
    seen = []

    @settings(max_examples=60, deadline=None)
    @given(plan=plans(row))
    def check(plan) -> None:
        try:
            export = export_plan(plan, row.target, version=row.since)
        except Inexpressible:
            return
        seen.append(plan.strategy)
        assert read_trainer_args(export.settings, target=row.target, version=row.since) == plan.strategy
        compile(export.files[0].text, "train.py", "exec")

    check()
    assert len(seen) >= 5, "nearly every drawn plan was refused"

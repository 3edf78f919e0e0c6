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
KNOBS = {
    "micro_batch_size": st.integers(1, 512),
    "gradient_accumulation_steps": st.integers(1, 4096),
    "activation_checkpointing": st.sampled_from(["none", "selective", "full"]),
    "attention_kernel": st.sampled_from(["eager", "sdpa", "flash"]),
    "optimizer_kernel": st.sampled_from(["loop", "foreach", "fused"]),
    "padding_free": st.booleans(),
    "activation_offload": st.booleans(),
    "allocator": st.sampled_from(["native", "expandable_segments"]),
    "compile": st.booleans(),
    "offload": st.sampled_from(["none", "optimizer", "parameters"]),
}


@st.composite
def plans(draw, row):
    knobs = {name: draw(values) for name, values in KNOBS.items()}
    knobs["loss_kernel"] = draw(st.sampled_from(sorted(row.loss_kernels)))
    knobs["layer_kernels"] = draw(st.sampled_from(row.layer_kernels))
    knobs["zero_stage"] = draw(st.sampled_from(row.zero_stages))
    ranks = draw(st.sampled_from([1, 2, 8]))
    knobs["mesh"] = Mesh(dp_shard=ranks) if knobs["zero_stage"] else Mesh(dp_replicate=ranks)
    if knobs["offload"] not in row.offloads:
        knobs["offload"] = "none"
    plan = make_plan(
        row.target, method=draw(st.sampled_from(["full", "lora", "qlora"])), seq_len=draw(st.sampled_from([256, 4096])),
        packing=row.packing and draw(st.booleans()), **knobs,
    )  # fmt: skip
    optimizer = draw(st.sampled_from([optimizer.name for optimizer in list_optimizers()]))
    recipe = replace(plan.workload.recipe, optimizer=optimizer)
    return replace(plan, workload=replace(plan.workload, recipe=recipe))


@pytest.mark.parametrize("row", DIALECTS)
def test_reading_an_export_gives_the_strategy_back(row) -> None:
    seen = []

    @settings(max_examples=150, deadline=None)
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
    assert seen, "every drawn plan was refused"

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from planner_toys import make_job

from brim.planner.rules import RULES, broken_rule
from brim.spec.strategy import Mesh, Strategy

PLAIN = {"micro_batch_size": 4, "gradient_accumulation_steps": 8, "loss_kernel": "chunked"}


def reason(job: dict[str, Any], **knobs: Any) -> str | None:
    return broken_rule(make_job(**job).workload, Strategy(**PLAIN | knobs))


def test_a_plain_strategy_breaks_no_rule() -> None:
    assert reason({}) is None


@pytest.mark.parametrize(
    ("job", "knobs", "text"),
    [
        ({}, {"micro_batch_size": 5},
         "micro-batch 5 x accumulation 8 x 1 rank is 40 sequences, not the effective batch 32"),
        ({}, {"mesh": Mesh(dp_replicate=2), "micro_batch_size": 2}, "the mesh spans 2 devices, there are 1"),
        ({}, {"zero_stage": 2}, "ZeRO stage 2 shards over data-parallel ranks, and there is only 1"),
        ({"gpu": "h100:2"}, {"mesh": Mesh(dp_replicate=2), "micro_batch_size": 2, "zero_stage": 3},
         "sharding and offload of model states are not planned yet; every rank holds a whole replica"),
        ({}, {"offload": "optimizer"},
         "sharding and offload of model states are not planned yet; every rank holds a whole replica"),
        ({"gpu": "t4", "dtype": "bf16"}, {}, "bf16 needs compute capability 8.0, t4 has 7.5; use dtype fp16"),
        ({"gpu": "v100", "quantization": "int8"}, {},
         "int8 weights need compute capability 7.5, v100-sxm2-16gb has 7.0; use nf4"),
        ({"gpu": "t4"}, {"attention_kernel": "flash"},
         "flash attention needs compute capability 8.0, t4 has 7.5; use sdpa"),
        ({"dtype": "fp32"}, {"attention_kernel": "flash"},
         "flash attention needs dtype bf16 or fp16, not fp32; use sdpa"),
        ({"model": "t5-small"}, {"attention_kernel": "flash"},
         "transformers has no flash attention for t5; use sdpa"),
        ({"model": "gpt-oss-20b"}, {}, "transformers has no SDPA attention for gpt_oss; use eager"),
        ({"trainer": "transformers"}, {"activation_checkpointing": "selective", "loss_kernel": "dense"},
         "transformers has no setting for selective checkpointing; use full or none"),
        ({}, {"loss_kernel": "dense"}, "trl has no dense loss; it has chunked"),
        ({}, {"layer_kernels": "liger"}, "trl has no liger layer kernels; it has none"),
        ({"optimizer": "paged_adamw_8bit"}, {"optimizer_kernel": "foreach"},
         "paged-adamw-8bit has no foreach kernel; it has fused"),
        ({}, {"activation_offload": True}, "trl does not keep activations in host memory"),
        ({"trainer": "unsloth"}, {"activation_offload": True, "loss_kernel": "fused", "layer_kernels": "unsloth"},
         "activation offload moves the inputs of checkpointed layers; it needs full checkpointing"),
        ({"trainer": "unsloth", "seq_len": 256},
         {"activation_offload": True, "activation_checkpointing": "full", "loss_kernel": "fused",
          "layer_kernels": "unsloth"},
         "unsloth offloads activations from 512 tokens on, not at 256"),
    ],
)  # fmt: skip
def test_a_broken_rule_says_why(job: dict[str, Any], knobs: dict[str, Any], text: str) -> None:
    assert reason(job, **knobs) == text


def test_wide_heads_refuse_flash() -> None:
    workload = make_job().workload
    group = workload.model.groups[0]
    wide = replace(group, attention=replace(group.attention, head_dim=512))
    workload = replace(workload, model=replace(workload.model, name="wide", groups=(wide,)))
    strategy = Strategy(**PLAIN | {"attention_kernel": "flash"})
    assert broken_rule(workload, strategy) == "flash attention takes heads up to 256 wide, wide has 512; use sdpa"


def test_an_unknown_card_is_not_held_back() -> None:
    assert reason({"gpu": "24GiB", "dtype": "bf16"}, attention_kernel="flash") is None


@pytest.mark.parametrize("trainer", ["trl", "accelerate", "plain"])
def test_selective_checkpointing_where_there_is_a_word_for_it(trainer: str) -> None:
    loss = "chunked" if trainer == "trl" else "dense"
    assert reason({"trainer": trainer}, activation_checkpointing="selective", loss_kernel=loss) is None


def test_every_rule_says_what_it_is_for() -> None:
    assert all(rule.__doc__ for rule in RULES)

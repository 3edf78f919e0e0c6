"""Plans by trace for architectures that no formula table has: the trace answers the search itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import brim
from brim import api
from brim.api.answerers import find_answerer
from brim.api.jobs import read_job
from brim.errors import DoesNotFit, UnsupportedModel
from brim.planner.candidates import list_variants
from brim.planner.options import read_options
from brim.report.plan import describe_speed

JAMBA = {
    "architectures": ["JambaForCausalLM"], "model_type": "jamba", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "num_experts": 2,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "use_mamba_kernels": False, "pad_token_id": 0,
}  # fmt: skip
PEGASUS = {
    "architectures": ["PegasusForConditionalGeneration"], "model_type": "pegasus", "d_model": 64, "encoder_layers": 4,
    "decoder_layers": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 64, "is_encoder_decoder": True,
}  # fmt: skip
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 500,
    "text_config": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "vocab_size": 512,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "projection_dim": 32,
    },
}  # fmt: skip
CONFIGS = {"jamba": JAMBA, "pegasus": PEGASUS, "llava": LLAVA}
JOB = {"method": "lora", "gpu": "a100-80gb", "seq_len": 64, "effective_batch_size": 8}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = tmp_path / request.param
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[request.param]), encoding="utf-8")
    return str(folder)


def test_the_trace_answers_the_search_itself(model: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="--by trace"):
        brim.plan(model, **JOB)
    plan = brim.plan(model, by="trace", **JOB)
    strategy = plan.strategy
    assert plan.effective_batch_size == 8 == strategy.micro_batch_size * strategy.gradient_accumulation_steps
    assert plan.estimate.source == "trace" and plan.estimate.step_time is None
    assert api.describe_plan(plan)["estimate"]["source"] == "trace"
    assert any("the trace answered the search itself" in text for text in plan.assumptions)
    assert any("the step time is unknown" in text for text in plan.assumptions)
    assert "does not know model_type" in describe_speed(plan)
    brim.save_plan(plan, tmp_path / "plan.json")
    assert brim.load_plan(tmp_path / "plan.json") == plan


def test_what_is_chosen_was_traced(model: str) -> None:
    plan = brim.plan(model, by="trace", micro_batch_size=4, **JOB)
    knobs = {"micro_batch_size": 4, "activation_checkpointing": plan.strategy.activation_checkpointing}
    (alone,) = brim.estimate(model, by=("trace",), **knobs, **JOB)
    assert alone.peak_allocated_bytes == plan.estimate.peak_allocated_bytes


@pytest.mark.parametrize("model", ["jamba"], indirect=True)
def test_few_strategies_are_traced(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from brim.probes import answer

    asked, trace_step = [], answer.trace_step

    def note(*args: Any, **named: Any) -> Any:
        asked.append(args[1])
        return trace_step(*args, **named)

    monkeypatch.setattr(answer, "trace_step", note)
    brim.plan(model, by="trace", **JOB)
    assert len(asked) <= 3 + 2 * len({one.activation_checkpointing for one in asked})


def test_guesses_are_near_what_is_traced(model: str) -> None:
    options = read_options({**JOB, "by": "trace", "activation_checkpointing": "none"})
    job = read_job(model, options, known_only=False)
    proposed, traced = (find_answerer("trace", job) for _ in range(2))
    knobs = list_variants(job.workload, job.fixed)[0]
    for split in ((1, 8), (4, 2), (8, 1)):
        strategy = knobs.at(*split)
        exact = traced.estimate(job.workload, strategy).peak_allocated_bytes
        assert 0.97 < proposed.peak(job.workload, strategy) / exact < 1.2


@pytest.mark.parametrize("model", ["jamba"], indirect=True)
def test_what_does_not_fit_says_so_in_one_line(model: str) -> None:
    with pytest.raises(DoesNotFit) as caught:
        brim.plan(model, by="trace", **{**JOB, "gpu": "470MiB", "activation_checkpointing": "none"})
    assert "\n" not in str(caught.value)
    assert caught.value.facts["source"] == "trace"

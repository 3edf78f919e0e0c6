"""Real steps in this process: what they take is what was predicted, and what others' probes forget is in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_job import LENGTH, make_plan, make_request, write_script

from brim.planner.record import Plan
from brim.trials.observe import find_held, observe
from brim.trials.perform import FEW, MANY, perform
from brim.trials.request import Answer
from brim.units import MIB

NUM_PARAMETERS = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64) + 64 + 2 * 256 * 64


def run(plan: Plan, capacity_bytes: int = 64 * MIB, script: str | None = None) -> Answer:
    return perform(make_request(plan, capacity_bytes, script))


@pytest.mark.parametrize(
    "trainer", ["plain", "accelerate", "transformers", pytest.param("trl", marks=pytest.mark.slow)]
)
def test_a_real_step_takes_what_the_formula_says(trainer: str, tmp_path: Path) -> None:
    capacity_mib = 2048 if trainer == "trl" else 64  # its tile alone is predicted at half a gibibyte
    plan = make_plan(tmp_path, f"{capacity_mib}MiB", trainer=trainer, micro_batch_size=4)
    answer = run(plan, capacity_mib * MIB)
    assert answer.ending == "done", answer.problem
    assert answer.peak_allocated_bytes is not None
    if trainer != "trl":  # whose tile of 4,096 tokens is cut to the few there are
        assert answer.peak_allocated_bytes == pytest.approx(plan.estimate.peak_allocated_bytes, rel=0.08)
    assert answer.longest_tokens == LENGTH and answer.real_fraction == 1.0
    assert set(answer.seconds) == {FEW, MANY} and answer.device == "cpu"
    assert dict(answer.versions)["torch"]


@pytest.mark.parametrize("method", ["lora", pytest.param("qlora", marks=pytest.mark.slow)])
def test_adapters_run_too(method: str, tmp_path: Path) -> None:
    plan = make_plan(tmp_path, method=method, micro_batch_size=2)
    answer = run(plan)
    assert answer.ending == "done", answer.problem
    assert answer.peak_allocated_bytes == pytest.approx(plan.estimate.peak_allocated_bytes, rel=0.12)


def test_optimizer_states_are_counted(tmp_path: Path) -> None:
    """A probe without them says that it fits, and the run dies at its first update."""
    adamw = run(make_plan(tmp_path, micro_batch_size=1, trainer="plain"))
    sgd = run(make_plan(tmp_path, micro_batch_size=1, optimizer="sgd", trainer="plain"))
    assert adamw.peak_allocated_bytes is not None and sgd.peak_allocated_bytes is not None
    assert adamw.peak_allocated_bytes - sgd.peak_allocated_bytes == pytest.approx(8 * NUM_PARAMETERS, rel=0.05)
    between = (adamw.peak_allocated_bytes + sgd.peak_allocated_bytes) // 2
    assert run(make_plan(tmp_path, micro_batch_size=1, trainer="plain"), between).ending == "oom"
    assert run(make_plan(tmp_path, micro_batch_size=1, optimizer="sgd", trainer="plain"), between).ending == "done"


def test_the_same_answer_twice(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, micro_batch_size=2)
    first, second = run(plan), run(plan)
    assert first.peak_allocated_bytes == second.peak_allocated_bytes


def test_without_accumulation_gradients_do_not_wait(tmp_path: Path) -> None:
    whole = run(make_plan(tmp_path, micro_batch_size=8))
    assert set(whole.seconds) == {1, FEW}
    plan = make_plan(tmp_path, micro_batch_size=8)
    assert whole.peak_allocated_bytes == pytest.approx(plan.estimate.peak_allocated_bytes, rel=0.08)


def test_checkpointing_is_really_on(tmp_path: Path) -> None:
    without, full = (
        run(make_plan(tmp_path, micro_batch_size=8, activation_checkpointing=kind)) for kind in ("none", "full")
    )
    assert find_held(full) < 0.8 * find_held(without)  # type: ignore[operator]


def test_the_users_trainer_runs_on_its_longest_row_and_nothing_is_touched(tmp_path: Path) -> None:
    """Others' probes step the user's weights, save checkpoints and call the user's callbacks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    script = write_script(tmp_path / "mine")
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=256, max_position_embeddings=128)  # fmt: skip
    weights = tmp_path / "mine" / "weights.pt"
    torch.save(LlamaForCausalLM(config).state_dict(), weights)
    before = weights.read_bytes()
    plan = make_plan(tmp_path, micro_batch_size=4)
    answer = run(plan, script=script)
    assert answer.ending == "done", answer.problem
    assert answer.longest_tokens == 50 and answer.real_fraction == 1.0
    assert weights.read_bytes() == before
    written = {path.name for path in (tmp_path / "mine").rglob("*") if "__pycache__" not in str(path)}
    assert written <= {"train.py", "weights.pt", "out"}
    seen = observe(plan, answer, 64 * MIB)
    assert seen.workload.data.seq_len == 50 and seen.fits


def test_a_users_trainer_takes_the_strategy_of_the_plan(tmp_path: Path) -> None:
    script = write_script(tmp_path / "mine")
    peaks = {}
    for size in (1, 8):
        for kind in ("none", "full"):
            plan = make_plan(tmp_path, micro_batch_size=size, activation_checkpointing=kind)
            answer = run(plan, script=script)
            assert answer.peak_allocated_bytes is not None, answer.problem
            peaks[size, kind] = answer.peak_allocated_bytes
    assert peaks[1, "none"] < peaks[8, "full"] < peaks[8, "none"]


def test_what_a_script_raises_is_said_with_its_place(tmp_path: Path) -> None:
    answer = run(make_plan(tmp_path), script=write_script(tmp_path, 'raise ValueError("no such column")'))
    assert answer.ending == "failed"
    assert "no such column" in answer.problem and "train.py:" in answer.problem


def test_an_out_of_memory_is_known_by_its_type_however_it_is_wrapped(tmp_path: Path) -> None:
    wrapped = 'raise RuntimeError("step failed") from torch.OutOfMemoryError("x")'
    assert run(make_plan(tmp_path), script=write_script(tmp_path / "a", wrapped)).ending == "oom"
    only_text = 'raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")'
    assert run(make_plan(tmp_path), script=write_script(tmp_path / "b", only_text)).ending == "failed"


def test_an_out_of_memory_while_the_script_makes_its_trainer_is_one(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import torch\n\n\ndef make_trainer():\n    return torch.zeros(2**28)\n", encoding="utf-8")
    assert run(make_plan(tmp_path), script=f"{script}:make_trainer").ending == "oom"


def test_what_cannot_be_started_names_the_way_out(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    other = replace(plan.workload.recipe, engine=replace(plan.workload.recipe.engine, name="unsloth"))
    answer = run(replace(plan, workload=replace(plan.workload, recipe=other)))
    assert answer.ending == "failed" and "--script train.py:make_trainer" in answer.problem

from __future__ import annotations

from planner_toys import GIB, MIB, make_plan, toy_answerer


def test_reasons_say_what_limits() -> None:
    answerer = toy_answerer(base_bytes=10 * GIB, sequence_bytes=3 * GIB)
    plan = make_plan(answerer, gpu="rtx-4090", effective_batch_size=32)
    assert plan.strategy.micro_batch_size == 2
    assert plan.reasons == (
        "micro-batch 2 x accumulation 16 x 1 rank = 32 sequences, exactly the effective batch (given by the user)",
        "peak 16.00 GiB at loss, 5.16 GiB below the budget",
        "micro-batch 4 would be over by 0.84 GiB at loss",
        "no checkpointing: nothing is computed twice",
        "budget 21.16 GiB: 90 % of the 23.51 GiB left of 23.51 GiB after the process's own context",
        "step time by formula (unmeasured on this card)",
    )


def test_checkpointing_is_explained_by_what_it_replaces() -> None:
    needed = make_plan(toy_answerer(sequence_bytes=16 * GIB), gpu="rtx-4090")
    assert "full checkpointing: without it even micro-batch 1 is over by 0.84 GiB" in needed.reasons
    pays = make_plan(toy_answerer(sequence_bytes=10 * GIB, launch_seconds=0.5), gpu="rtx-4090")
    assert pays.strategy.activation_checkpointing == "full"
    assert any("pays: without it micro-batch 1 is the best that fits" in reason for reason in pays.reasons)


def test_no_seconds_where_the_speed_is_unknown() -> None:
    plan = make_plan(toy_answerer(timed=False))
    assert plan.estimate.step_time is None and plan.schedule.epoch_seconds is None
    assert plan.reasons[-1] == (
        "24GiB: no speed is known for this set-up: ranked by recomputation and by tokens per micro-batch"
    )


def test_a_whole_batch_in_one_micro_batch_says_so() -> None:
    plan = make_plan(toy_answerer(sequence_bytes=MIB, launch_seconds=1.0), effective_batch_size=8)
    assert plan.strategy.gradient_accumulation_steps == 1
    assert "the whole batch fits in one micro-batch per rank, so nothing is accumulated" in plan.reasons


def test_what_was_fixed_is_named() -> None:
    plan = make_plan(micro_batch_size=4, activation_checkpointing="full")
    assert "kept as asked: activation_checkpointing full, micro_batch_size 4" in plan.reasons

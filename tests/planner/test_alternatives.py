from __future__ import annotations

from planner_toys import GIB, make_plan, toy_answerer


def test_alternatives_show_their_price() -> None:
    plan = make_plan(toy_answerer(base_bytes=10 * GIB, sequence_bytes=3 * GIB, launch_seconds=0.02), gpu="rtx-4090")
    reasons = {
        (row.strategy.micro_batch_size, row.strategy.activation_checkpointing): row.reason for row in plan.rejected
    }
    assert reasons[(4, "none")] == "over by 0.84 GiB at loss"
    assert reasons[(1, "none")].startswith("1.09x slower: 32 micro-batches per step instead of 16")
    assert "full checkpointing recomputes the forward pass" in reasons[(16, "full")]

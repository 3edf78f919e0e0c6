from __future__ import annotations

import pytest
from planner_toys import GIB, MIB, make_plan, toy_answerer

SLOW_LAUNCHES = toy_answerer(base_bytes=GIB, sequence_bytes=3000 * MIB, launch_seconds=0.05)


def text(size: int, **options: object) -> str | None:
    plan = make_plan(options.pop("answerer", SLOW_LAUNCHES), effective_batch_size=size, gpu="8GiB", **options)
    return next((warning.text for warning in plan.warnings if warning.code == "awkward_batch"), None)


def test_a_prime_batch_is_told_what_its_neighbour_gains() -> None:
    # 97 runs one by one, 0.15 s each; 96 runs in pairs, (2 x 0.1 + 0.05) / 2 = 0.125 s each.
    assert text(97) == (
        "effective batch 97 over 1 rank splits only into micro-batches of 1, 97: 96 instead of 97 sequences would be "
        "1.20x faster per sequence, with micro-batch 2 instead of 1"
    )


@pytest.mark.parametrize("size", [96, 100, 3, 16, 90])
def test_batches_that_split_well_are_left_alone(size: int) -> None:
    assert text(size) is None


def test_nothing_is_said_where_it_is_not_known_or_not_asked() -> None:
    assert text(97, micro_batch_size=1) is None
    assert text(97, answerer=toy_answerer(base_bytes=GIB, sequence_bytes=3000 * MIB, timed=False)) is None
    assert text(97, answerer=toy_answerer(base_bytes=GIB, sequence_bytes=3000 * MIB, launch_seconds=0.001)) is None

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.errors import IndivisibleBatch, InvalidInput
from brim.planner.batch import BatchRequest, choose_batch, exact_splits, is_power_of_two, nearest_multiples
from brim.tables.read import find_task

INSTRUCTION = find_task("instruction-tuning")


@given(local=st.integers(1, 4096), ranks=st.integers(1, 64))
def test_splits_multiply_back_and_are_all(local: int, ranks: int) -> None:
    splits = list(exact_splits(local * ranks, ranks))
    assert all(micro * steps * ranks == local * ranks for micro, steps in splits)
    assert [micro for micro, _ in splits] == [micro for micro in range(1, local + 1) if local % micro == 0]


@given(sequences=st.integers(1, 10_000), ranks=st.integers(2, 64))
def test_no_split_of_an_indivisible_batch(sequences: int, ranks: int) -> None:
    assert bool(list(exact_splits(sequences, ranks))) == (sequences % ranks == 0)


@given(number=st.integers(1, 10**9), unit=st.integers(1, 10**6))
def test_nearest_multiples_enclose(number: int, unit: int) -> None:
    nearest = nearest_multiples(number, unit)
    assert nearest and all(choice % unit == 0 and choice > 0 and abs(choice - number) < unit for choice in nearest)


def test_powers_of_two() -> None:
    assert [number for number in range(1, 20) if is_power_of_two(number)] == [1, 2, 4, 8, 16]


def batch(seq_len: int = 2048, ranks: int = 1, **said: int) -> int:
    return choose_batch(BatchRequest(**said), INSTRUCTION, seq_len=seq_len, ranks=ranks).sequences


def test_default_is_the_low_end_of_the_task() -> None:
    target = choose_batch(BatchRequest(), INSTRUCTION, seq_len=2048, ranks=8)
    assert (target.sequences, target.tokens, target.low, target.high) == (32, 65_536, 32, 64)
    assert target.reason == "low end of the optimal range of instruction-tuning, 32-64 sequences"


def test_default_moves_up_to_what_splits() -> None:
    target = choose_batch(BatchRequest(), INSTRUCTION, seq_len=2048, ranks=3)
    assert target.sequences == 33
    assert "33 is the next above 32 that splits exactly over 3 ranks" in target.reason
    assert batch(micro_batch_size=5, ranks=2) == 40


def test_both_fixed_make_the_batch() -> None:
    assert batch(micro_batch_size=4, gradient_accumulation_steps=6, ranks=2) == 48


@given(
    sequences=st.integers(1, 5000), ranks=st.integers(1, 32), micro=st.none() | st.integers(1, 40),
    steps=st.none() | st.integers(1, 40),
)  # fmt: skip
def test_a_batch_is_kept_exactly_or_refused(sequences: int, ranks: int, micro: int | None, steps: int | None) -> None:
    request = BatchRequest(sequences=sequences, micro_batch_size=micro, gradient_accumulation_steps=steps)
    unit = ranks * (micro or 1) * (steps or 1)
    try:
        target = choose_batch(request, INSTRUCTION, seq_len=128, ranks=ranks)
    except IndivisibleBatch as error:
        assert sequences % unit and all(near % unit == 0 for near in error.nearest)
    except InvalidInput:
        assert sequences % unit or (micro and steps and sequences != unit)
    else:
        assert target.sequences == sequences and sequences % unit == 0


@given(tokens=st.integers(1, 10**7), seq_len=st.integers(1, 10**5), ranks=st.integers(1, 16))
def test_tokens_become_the_nearest_exact_sequences(tokens: int, seq_len: int, ranks: int) -> None:
    try:
        target = choose_batch(BatchRequest(tokens=tokens), INSTRUCTION, seq_len=seq_len, ranks=ranks)
    except InvalidInput:
        assert tokens < seq_len * ranks
        return
    assert target.sequences % ranks == 0
    assert abs(target.tokens - tokens) <= seq_len * ranks


@pytest.mark.parametrize(
    ("said", "ranks", "text"),
    [
        ({"sequences": 100}, 8,
         "effective batch 100 sequences cannot be split over 8 data-parallel ranks; nearest: 96 or 104"),
        ({"sequences": 4}, 8, "effective batch 4 sequences cannot be split over 8 data-parallel ranks; nearest: 8"),
        ({"sequences": 32, "micro_batch_size": 5}, 1,
         "effective batch 32 sequences cannot be split over 1 data-parallel rank in micro-batches of 5; "
         "nearest: 30 or 35"),
        ({"sequences": 100, "gradient_accumulation_steps": 3}, 8,
         "effective batch 100 sequences cannot be split over 8 ranks in 3 accumulation steps; nearest: 96 or 120"),
        ({"sequences": 64, "micro_batch_size": 4, "gradient_accumulation_steps": 8}, 1,
         "effective batch 64 sequences is not micro-batch 4 x accumulation 8 x 1 rank = 32 sequences; "
         "leave one of them out"),
        ({"tokens": 1000}, 2,
         "effective batch 1,000 tokens is less than the 2 sequences of 2,048 tokens one step takes at least; "
         "smallest: 4,096 tokens"),
        ({"tokens": 100_000, "sequences": 32}, 1,
         "effective batch given twice, 32 sequences and 100,000 tokens; give one"),
    ],
)  # fmt: skip
def test_refusals_name_the_nearest(said: dict[str, int], ranks: int, text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        choose_batch(BatchRequest(**said), INSTRUCTION, seq_len=2048, ranks=ranks)
    assert str(refused.value) == text

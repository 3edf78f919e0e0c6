"""Tapes: sizes add up, tensors live as long as Python and autograd hold them, and everything is given back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from time_jobs import job, read_card, way

from brim.cost.blocks import cost_head, cost_layer
from brim.cost.setting import read_setting
from brim.cost.tape import ZERO, Instant, Size, Tape, Tensor, fixed, highest, per_token, run_backward, run_forward

CARDS = (
    "gpt2", "meta-llama/Llama-3.1-8B", "google/gemma-2-2b", "mistralai/Mixtral-8x7B-v0.1", "deepseek-ai/DeepSeek-V3",
    "google-t5/t5-small",
)  # fmt: skip
sizes = st.builds(Size, st.integers(-(2**40), 2**40), st.integers(-(2**20), 2**20))
ONE = fixed(1)


def totals(instants: list[Instant]) -> list[int]:
    """Return the fixed bytes of every instant, in order."""
    return [instant.total.fixed for instant in instants]


def run_both(tape: Tape, *given_tensors: Tensor):  # type: ignore[no-untyped-def]
    """Return the run after both passes, and how many instants belong to the forward pass."""
    run = run_forward(tape, given_tensors, keeps=True)
    split = len(run.instants)
    run_backward(tape, run)
    return run, split


@given(sizes, sizes, st.integers(0, 2**30), st.integers(0, 100))
def test_sizes_add_as_their_bytes_do(one: Size, other: Size, tokens: int, factor: int) -> None:
    """Adding, taking away and repeating sizes commutes with asking for their bytes."""
    assert (one + other).at(tokens) == one.at(tokens) + other.at(tokens)
    assert (one - other).at(tokens) == one.at(tokens) - other.at(tokens)
    assert one.times(factor).at(tokens) == factor * one.at(tokens)
    assert one + ZERO == one and one - one == ZERO


def test_sizes_are_named_by_what_they_depend_on() -> None:
    """`fixed` bytes do not grow with tokens, `per_token` bytes do."""
    assert (fixed(7).at(10), per_token(7).at(10)) == (7, 70)


def test_a_given_tensor_counts_only_if_it_is_kept() -> None:
    """The input of a block belongs to the caller, until an operation saves it."""
    for saves, seen in (((), [2, 7]), (("x",), [12, 17])):
        tape, x = Tape(), Tensor("x", fixed(10))
        y = tape.op("y", [x], fixed(2), saves=[x] if saves else ())
        tape.op("z", [y], fixed(5))
        assert totals(run_forward(tape, [x], keeps=True).instants) == seen


def test_a_tensor_goes_after_its_last_use() -> None:
    """Without a backward pass a chain holds two neighbours at a time."""
    tape, x = Tape(), Tensor("x", fixed(0))
    for size in (1, 10, 100, 1000):
        x = tape.op("step", [x], fixed(size), saves_output=True)
    assert totals(run_forward(tape, [], keeps=False).instants) == [1, 11, 110, 1100]
    assert totals(run_forward(tape, [], keeps=True).instants) == [1, 11, 111, 1111]


def test_a_held_tensor_stays_until_the_block_returns() -> None:
    """A Python variable outlives the last operation that reads it."""
    tape, x = Tape(), Tensor("x", fixed(0))
    a = tape.op("a", [x], fixed(100), held=True)
    b = tape.op("b", [a], fixed(10))
    tape.op("c", [b], fixed(1))
    run = run_forward(tape, [x], keeps=True)
    assert totals(run.instants) == [100, 110, 111]
    assert sum(size.fixed for size, _ in run.live.values()) == 1


def test_scratch_is_there_only_while_the_operation_runs() -> None:
    """An operation's working space shows in one instant and is gone in the next."""
    tape, x = Tape(), Tensor("x", fixed(0))
    y = tape.op("y", [x], fixed(1), scratch=fixed(50))
    tape.op("z", [y], fixed(2))
    assert totals(run_forward(tape, [x], keeps=True).instants) == [1, 51, 3]


def test_what_backward_needs_is_kept_and_the_rest_passes() -> None:
    """A saved tensor counts as kept from its making to its release, any other as passing."""
    tape, x = Tape(), Tensor("x", fixed(0))
    a = tape.op("a", [x], fixed(3))
    b = tape.op("b", [a], fixed(4), saves=[a])
    tape.op("c", [b], fixed(5))
    run, split = run_both(tape, x)
    assert [(instant.kept.fixed, instant.passing.fixed) for instant in run.instants[:split]] == [(3, 0), (3, 4), (3, 9)]
    assert run.kept == ZERO


def test_what_hangs_on_the_graph_outlives_the_backward_pass() -> None:
    """A node's own attribute stays as long as the graph does, with or without checkpointing; without graph it goes."""
    tape, x = Tape(), Tensor("x", ZERO)
    a = tape.op("a", [x], fixed(16))
    b = tape.op("b", [a], fixed(4), clings=[a])
    tape.op("c", [b], fixed(1))
    for keeps, clings, left in ((True, None, 16 + 1), (False, True, 16 + 1), (False, None, 1)):
        run = run_forward(tape, [x], keeps=keeps, clings=clings)
        assert sum(size.fixed for size, _ in run.live.values()) == left
    for clings, left in ((True, 16), (False, 0)):
        run = run_forward(tape, [x], keeps=True)
        run_backward(tape, run, clings=clings)
        assert run.kept == fixed(left)


def test_a_chain_backward_by_hand() -> None:
    """x(8, kept) -> a(16) -> b(32, kept) -> c(64): each gradient has its tensor's size, one follows the other."""
    tape, x = Tape(), Tensor("x", fixed(8))
    a = tape.op("a", [x], fixed(16), saves=[x], weight_grad=fixed(1000))
    b = tape.op("b", [a], fixed(32), saves_output=True, grad_scratch=fixed(500))
    tape.op("c", [b], fixed(64))
    run, split = run_both(tape, x)
    assert totals(run.instants[:split]) == [24, 56, 104]
    back = [(instant.op, instant.total.fixed) for instant in run.instants[split:]]
    assert back == [
        ("backward", 8 + 32 + 64),  # the caller has dropped c; its gradient comes back
        ("c", 8 + 32 + 64 + 32),  # gradient of b
        ("c", 8 + 32 + 64 + 32),
        ("b", 8 + 32 + 32 + 500),  # scratch
        ("b", 8 + 32 + 32 + 16),  # gradient of a
        ("b", 8 + 32 + 32 + 16),
        ("a", 8 + 16 + 8 + 1000),  # gradient of x, weight gradient made
        ("a", 8 + 16 + 8 + 1000),
    ]


def test_a_residual_sum_hands_one_gradient_to_both_branches() -> None:
    """A sum passes its output's gradient on: no copy for the stream, one addition where the branches meet."""
    tape, x = Tape(), Tensor("x", ONE)
    branch = tape.op("branch", [x], ONE)
    tape.op("sum", [x, branch], ONE, passes_grad=True)
    run, split = run_both(tape, x)
    assert totals(run.instants[split:]) == [1, 1, 2, 1]
    assert len(run.live) == 1


def test_an_in_place_gradient_replaces_what_was_kept() -> None:
    """A loss that writes its gradient over the logits holds one tensor of their size, not two."""
    peaks = {}
    for in_place in (True, False):
        tape, x = Tape(), Tensor("x", ONE)
        logits = tape.op("logits", [x], fixed(100), saves=[x])
        tape.op("loss", [logits], fixed(2), saves=[logits], grad_in_place=in_place)
        run, split = run_both(tape, x)
        peaks[in_place] = max(totals(run.instants[split:]))
    assert peaks == {True: 1 + 2 + 100, False: 1 + 2 + 200}


def test_no_gradient_flows_where_none_is_needed() -> None:
    """An operation on constants saves nothing for backward and gets no gradient."""
    tape, x = Tape(), Tensor("x", ONE, needs_grad=False)
    mask = tape.op("mask", [x], fixed(10), saves=[x])
    y = Tensor("y", ONE)
    tape.op("out", [mask, y], ONE, saves=[mask])
    run, split = run_both(tape, x, y)
    assert totals(run.instants[:split]) == [10, 11]
    assert max(totals(run.instants[split:])) == 10 + 1 + 1


@st.composite
def tapes(draw: st.DrawFn) -> tuple[Tape, Tensor]:
    """Random blocks: every operation reads earlier tensors, the last reads all that nobody has read."""
    tape, stream = Tape(), Tensor("x", Size(draw(st.integers(0, 9)), draw(st.integers(0, 9))))
    made, unread = [stream], [stream]
    for number in range(draw(st.integers(0, 8))):
        inputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique_by=id))
        saves = draw(st.lists(st.sampled_from(made), max_size=2, unique_by=id))
        made.append(draw_op(draw, tape, f"op {number}", inputs, saves))
        unread = [tensor for tensor in [*unread, made[-1]] if all(tensor is not read for read in inputs)]
    draw_op(draw, tape, "result", unread, [])
    return tape, stream


def draw_op(draw: st.DrawFn, tape: Tape, name: str, inputs: list[Tensor], saves: list[Tensor]) -> Tensor:
    """Record an operation with random flags and return its output."""
    size = Size(draw(st.integers(0, 9)), draw(st.integers(0, 9)))
    scratch = Size(draw(st.integers(0, 3)), 0)
    return tape.op(
        name, inputs, size, saves=saves, saves_output=draw(st.booleans()), scratch=scratch, grad_scratch=scratch,
        passes_grad=draw(st.booleans()), grad_in_place=draw(st.booleans()), held=draw(st.booleans()),
    )  # fmt: skip


@given(tapes())
def test_everything_is_given_back(drawn: tuple[Tape, Tensor]) -> None:
    """After both passes one storage is left: the gradient of the input, for the block below."""
    tape, stream = drawn
    run, _ = run_both(tape, stream)
    assert run.kept == ZERO
    assert len(run.live) == 1


@given(tapes(), st.booleans())
def test_instants_are_the_sum_of_what_lives(drawn: tuple[Tape, Tensor], keeps: bool) -> None:
    """Kept and passing bytes are those of the storages between their allocation and release."""
    tape, stream = drawn
    run = run_forward(tape, [stream], keeps=keeps)
    if keeps:
        run_backward(tape, run)
    live: dict[int, Size] = {}
    for event in run.events:
        if event.allocates:
            assert event.key not in live
            live[event.key] = event.size
        else:
            assert live.pop(event.key) == event.size
    assert live == {key: size for key, (size, _) in run.live.items()}
    assert sum(live.values(), ZERO) == run.kept + run.passing


heights = st.builds(Size, st.integers(0, 50), st.integers(0, 50)).map(lambda size: Instant("op", size, ZERO, ZERO))


@given(st.lists(heights, min_size=1), st.integers(0, 100))
def test_the_highest_instants_decide_for_any_number_of_tokens(instants: list[Instant], tokens: int) -> None:
    """Dropping dominated instants never changes the maximum."""
    best = highest(instants)
    assert max(one.total.at(tokens) for one in best) == max(one.total.at(tokens) for one in instants)
    assert len(best) <= len(instants)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash"])
@pytest.mark.parametrize("model", CARDS)
def test_real_layers_give_everything_back(model: str, attention: str, method: str) -> None:
    """Every layer and head leaves only the gradient of its input, which has the input's size."""
    workload = job(model=model, method=method, lora=job(method=method).recipe.lora)
    setting = read_setting(workload, way(attention_kernel=attention))
    shape = read_card(model)
    blocks = [cost_layer(group, setting, "none") for group in shape.groups]
    for block in [*blocks, cost_head(shape, setting, workload.recipe.engine, "dense")]:
        live: dict[int, Size] = {}
        for event in (*block.forward_events, *block.backward_events):
            if event.allocates:
                live[event.key] = event.size
            else:
                del live[event.key]
        assert list(live.values()) == [block.stream]

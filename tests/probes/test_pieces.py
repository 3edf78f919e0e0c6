"""A stream in pieces says what the same stream written out says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from brim.probes.phases import END_OF_STEP, MODEL_PHASE
from brim.probes.pieces import STRIDE, Event, Piece, repeat_events, split_steps, write_out
from brim.probes.stream import list_moments, list_tensors, replay
from brim.probes.tracker import Storage

CATEGORIES = ("parameter", "activation", "temporary", "gradient")
KB, MIB = 1024, 2**20

sizes = st.lists(st.sampled_from([KB, 300 * KB, 2 * MIB, 12 * MIB, 16 * MIB, 40 * MIB]), min_size=1, max_size=5)
sweeps = st.tuples(sizes, sizes, st.integers(0, 4))


class Numbered(dict[int, Storage]):
    def __missing__(self, key: int) -> Storage:
        return self[key % STRIDE]


def write_sweep(first: int, kept: list[int], brief: list[int], num_back: int, repeats: int) -> list[Piece]:
    """Forward, every repeat keeps some storages; backward, in the other direction, it gives back all but a few."""
    made = [Event(first + at, size, "forward of layers", 1) for at, size in enumerate(kept)]
    work = [Event(first + 50 + at, size, "forward of layers", 1) for at, size in enumerate(brief)]
    gone = [event._replace(num_bytes=-event.num_bytes) for event in work]
    forward = [*made[:1], *work, *made[1:], *gone]
    back = [event._replace(num_bytes=-event.num_bytes, phase="backward") for event in made[num_back:]]
    phases = [[Piece([Event(-1, 0, phase)])] for phase in ("forward of layers", "backward")]
    backward = [event._replace(phase="backward") for event in (*work, *gone)] + back
    across = repeat_events(backward, range(repeats)[::-1])
    return [*phases[0], repeat_events(forward, range(repeats)), *phases[1], across]


def write_step(number: int, drawn: list[tuple[list[int], list[int], int]], repeats: int) -> list[Piece]:
    pieces = [Piece([Event(90_000 + number, 4 * KB, "loss")])]
    for index, (kept, brief, num_back) in enumerate(drawn):
        pieces += write_sweep(1000 * number + 100 * index, kept, brief, num_back, repeats)
    return [*pieces, Piece([Event(-1, 0, END_OF_STEP)])]


def describe(pieces: list[Piece]) -> Numbered:
    keys = {event.key: event for piece in pieces for event in piece.events if event.num_bytes > 0}
    return Numbered({
        key: Storage(key, event.num_bytes, "", f"layers.{key % 3}", event.phase, "byte", (event.num_bytes,),
                     category=CATEGORIES[key % 4])  # type: ignore[arg-type]
        for key, event in keys.items()
    })  # fmt: skip


@given(st.lists(sweeps, min_size=1, max_size=3), st.integers(1, 7))
def test_pieces_say_what_the_written_out_stream_says(
    drawn: list[tuple[list[int], list[int], int]], repeats: int
) -> None:
    pieces = [Piece([Event(99_999, 512, MODEL_PHASE)])]
    pieces += [piece for number in (1, 2) for piece in write_step(number, drawn, repeats)]
    storages, whole = describe(pieces), [Piece(list(write_out(pieces)))]
    assert list_moments(pieces, storages) == list_moments(whole, storages)
    assert list_tensors(pieces, storages) == list_tensors(whole, storages)
    for options in ({}, {"expandable": True}, {"capacity_bytes": 300 * MIB}):
        assert replay(pieces, **options) == replay(whole, **options)  # type: ignore[arg-type]


def test_storages_of_one_repeat_share_a_number_and_others_do_not() -> None:
    piece = repeat_events([Event(1, 512, "x", 4), Event(2, 512, "x"), Event(2, -512, "x")], range(1, 3))
    assert piece.lasting == (0,) and piece.num_bytes == 512
    assert [event.key for event in piece.write_repeat(2)] == [1 + 2 * STRIDE, 2, 2]
    assert [event.key for event in piece.write_lasting(1)] == [1 + STRIDE]
    written = list(write_out([piece]))
    assert [event.key % STRIDE for event in written] == [1, 2, 2] * 2 and len({event.key for event in written}) == 4
    assert [event.layer for event in written] == [5, -1, -1, 6, -1, -1]


def test_steps_begin_where_the_one_before_ends() -> None:
    end = Event(-1, 0, END_OF_STEP)
    made = [Event(key, 512, "loss") for key in range(3)]
    steps = split_steps([Piece([made[0], end, made[1]]), Piece([made[2]]), Piece([end])])
    assert [list(write_out(step)) for step in steps] == [[made[0]], [end, made[1], made[2]], [end]]
    assert split_steps([]) == [[]]

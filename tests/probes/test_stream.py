"""A stream read: moments, what lives at the peak, and the pool after many steps."""

from __future__ import annotations

from brim.probes.phases import END_OF_STEP, MODEL_PHASE
from brim.probes.pieces import Event, Piece
from brim.probes.stream import list_moments, list_tensors, replay
from brim.probes.tracker import Storage

MIB = 2**20


def storage(key: int, num_bytes: int, category: str = "temporary", **words: str) -> Storage:
    return Storage(key, num_bytes, words.get("op", "aten.mm"), words.get("module", ""), "loss", "float32",
                   (num_bytes // 4,), category=category, line=words.get("line", ""), name=words.get("name", ""))  # type: ignore[arg-type]  # fmt: skip


def test_moments_are_the_highest_points_of_their_phases() -> None:
    storages = {0: storage(0, 100, "parameter"), 1: storage(1, 50, "activation"), 2: storage(2, 70)}
    events = [
        Event(0, 100, MODEL_PHASE), Event(-1, 0, "forward of layers"), Event(1, 50, "forward of layers"),
        Event(-1, 0, "loss"), Event(2, 70, "loss"), Event(2, -70, "loss"), Event(-1, 0, END_OF_STEP),
    ]  # fmt: skip
    moments = {moment.name: moment for moment in list_moments([Piece(events)], storages)}
    assert list(moments) == ["forward of layers", "loss"]
    assert moments["forward of layers"].total_bytes == 150
    assert moments["loss"].ledger.temporaries == 70 and moments["loss"].ledger.parameters == 100


def test_alike_tensors_of_all_layers_are_one_row() -> None:
    storages = {
        key: storage(key, 400, "activation", module=f"model.layers.{key}.mlp", line="modeling.py:7") for key in range(4)
    }
    storages[4] = storage(4, 1000, "parameter", name="head.weight", op="")
    storages[5] = storage(5, 9000)
    events = [Event(4, 1000, MODEL_PHASE), Event(-1, 0, "loss")] + [Event(key, 400, "loss") for key in range(4)]
    events += [Event(0, -400, "backward"), Event(5, 9000, "backward"), Event(5, -9000, "backward")]
    largest = list_tensors([Piece(events)], storages)
    assert [(one.bytes, one.count, one.module) for one in largest] == [
        (9000, 1, ""), (1200, 3, "model.layers.*.mlp"), (1000, 1, "head.weight"),
    ]  # fmt: skip
    assert largest[1].line == "modeling.py:7" and largest[2].row == "parameters"


def step(number: int, sizes: list[int]) -> list[Event]:
    made = [Event(100 * number + index, size * MIB, "loss") for index, size in enumerate(sizes)]
    return [*made, *(Event(event.key, -event.num_bytes, "loss") for event in made), Event(-1, 0, END_OF_STEP)]


def test_a_pool_that_is_cut_up_anew_is_played_until_it_settles() -> None:
    """The batch of the step before lives on into the next one, and sits where that would put its largest tensor."""
    first = [Event(1, 4 * MIB, "loss"), *step(1, [40, 12])]
    second = [Event(2, 4 * MIB, "loss"), Event(1, -4 * MIB, "loss"), *step(2, [40, 12])]
    rest = [Event(2, -4 * MIB, "loss")]
    assert replay([Piece([*first, *second, *rest])]) >= 56 * MIB
    grown = [Event(-1, 0, END_OF_STEP), Event(5, 4 * MIB, "loss"), Event(-1, 0, END_OF_STEP)]
    assert replay([Piece(grown)]) == replay([Piece(grown[:2])])  # what a step leaves behind is not repeated


def test_a_full_device_gives_free_segments_back() -> None:
    pieces = [Piece([*step(1, [40]), *step(2, [60])])]
    assert replay(pieces) == 100 * MIB
    assert replay(pieces, capacity_bytes=80 * MIB) == 60 * MIB

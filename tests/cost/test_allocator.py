"""The caching allocator: rounding, segments, splitting, merging, best fit, and a naive allocator beside it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.cost.allocator import CachingAllocator
from brim.units import GIB, KIB, MIB


def reserve(*sizes: int, **options: bool) -> CachingAllocator:
    """Return an allocator that holds storages of these sizes under the names 0, 1, 2 ..."""
    allocator = CachingAllocator(**options)
    for name, size in enumerate(sizes):
        allocator.allocate(name, size)
    return allocator


@pytest.mark.parametrize(("size", "rounded"), [(0, 512), (1, 512), (512, 512), (513, 1024), (100_000, 100_352)])
def test_sizes_round_up_to_512_bytes(size: int, rounded: int) -> None:
    """Every request takes whole units of 512 bytes, at least one."""
    assert reserve(size).allocated_bytes == rounded


@pytest.mark.parametrize(
    ("size", "segment"),
    [(1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB),
     (11 * MIB, 12 * MIB), (12 * MIB + 1, 14 * MIB), (GIB, GIB)],
)  # fmt: skip
def test_segments_by_size(size: int, segment: int) -> None:
    """Small, medium and large requests reserve segments of 2 MiB, 20 MiB and the next 2 MiB."""
    assert reserve(size).reserved_bytes == segment


def test_small_and_large_requests_share_no_segment() -> None:
    """A small request never cuts the segment of a large one."""
    assert reserve(2 * MIB, 512).reserved_bytes == 22 * MIB


def test_a_segment_is_split_while_the_rest_is_worth_it() -> None:
    """Two thousand times 1 KiB lie in one 2 MiB segment; so do nine times 2 MiB in one of 20 MiB."""
    assert reserve(*[KIB] * 2048).reserved_bytes == 2 * MIB
    assert reserve(*[2 * MIB] * 9).reserved_bytes == 20 * MIB


def test_a_rest_of_a_mebibyte_is_given_along() -> None:
    """Large blocks keep rests up to 1 MiB, which then count as allocated, as torch counts them."""
    assert reserve(19 * MIB).allocated_bytes == 20 * MIB
    assert reserve(19 * MIB - 512).allocated_bytes == 19 * MIB - 512
    allocator = reserve(9 * MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (9 * MIB, 20 * MIB)


def test_the_smallest_free_block_that_fits_is_taken() -> None:
    """Of free blocks of 100, 50 and 70 MiB a request for 60 MiB takes the one of 70."""
    allocator = reserve(100 * MIB, 50 * MIB, 70 * MIB)
    for name in range(3):
        allocator.free(name)
    allocator.allocate(3, 60 * MIB)
    allocator.allocate(4, 100 * MIB)
    allocator.allocate(5, 50 * MIB)
    assert allocator.reserved_bytes == 220 * MIB


def test_neighbours_merge_when_freed() -> None:
    """Three pieces of a segment are one block again, in whatever order they are freed."""
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        allocator = reserve(90 * MIB)
        allocator.free(0)
        for name in range(3):
            allocator.allocate(name, 30 * MIB)
        for name in order:
            allocator.free(name)
        allocator.allocate(3, 90 * MIB)
        assert (allocator.reserved_bytes, allocator.allocated_bytes) == (90 * MIB, 90 * MIB)


def test_holes_that_do_not_fit_cost_a_new_segment() -> None:
    """Fragmentation: 60 MiB are free, but no 40 MiB in one piece."""
    allocator = reserve(90 * MIB)
    allocator.free(0)
    for name in range(3):
        allocator.allocate(name, 30 * MIB)
    allocator.free(0)
    allocator.free(2)
    allocator.allocate(3, 40 * MIB)
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (130 * MIB, 70 * MIB)


def test_free_segments_are_returned_when_the_device_is_full() -> None:
    """A segment that is wholly free goes back to the device; one that is cut up stays."""
    allocator = reserve(60 * MIB, 30 * MIB, capacity_bytes=100 * MIB)
    allocator.free(0)
    allocator.allocate(2, 70 * MIB)
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (100 * MIB, 100 * MIB)
    cut = reserve(60 * MIB, capacity_bytes=100 * MIB)
    cut.free(0)
    cut.allocate(1, 20 * MIB)
    cut.allocate(2, 70 * MIB)
    assert cut.reserved_bytes == 130 * MIB


def test_a_storage_passes_to_another_name() -> None:
    """Renaming moves no bytes; the new name frees the block."""
    allocator = reserve(30 * MIB)
    allocator.rename(0, 7)
    assert allocator.allocated_bytes == 30 * MIB
    allocator.free(7)
    assert allocator.allocated_bytes == 0


def test_expandable_segments_grow_where_they_end() -> None:
    """Freed blocks at the end of the range count towards the next, larger request."""
    native, grown = reserve(100 * MIB), reserve(100 * MIB, expandable=True)
    for allocator in (native, grown):
        allocator.free(0)
        allocator.allocate(1, 150 * MIB)
    assert native.reserved_bytes == 250 * MIB
    assert grown.reserved_bytes == 160 * MIB


class Naive:
    """The same rules without linked blocks or sorted pools: segments are lists of [size, name or None]."""

    def __init__(self, expandable: bool) -> None:
        self.segments: dict[bool, list[list[list]]] = {True: [], False: []}
        self.expandable = expandable

    def allocate(self, name: int, size_bytes: int) -> None:
        size = max(512, (size_bytes + 511) // 512 * 512)
        small = size <= MIB
        segment, index = self.find(size, small) or self.grow(size, small)
        rest = segment[index][0] - size
        if (small and rest >= 512) or (not small and rest > MIB):
            segment.insert(index + 1, [rest, None])
            segment[index][0] = size
        segment[index][1] = name

    def find(self, size: int, small: bool) -> tuple[list[list], int] | None:
        free = [
            (block[0], number, index)
            for number, segment in enumerate(self.segments[small])
            for index, block in enumerate(segment)
            if block[1] is None and block[0] >= size
        ]
        if not free:
            return None
        _, number, index = min(free)
        return self.segments[small][number], index

    def grow(self, size: int, small: bool) -> tuple[list[list], int]:
        segments = self.segments[small]
        if self.expandable and segments:
            (only,) = segments
            spare = only.pop()[0] if only[-1][1] is None else 0
            page = (2 if small else 20) * MIB
            only.append([spare + -(-(size - spare) // page) * page, None])
            return only, len(only) - 1
        large = (20 if self.expandable else 2) * MIB
        plain = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // large) * large
        segments.append([[plain, None]])
        return segments[-1], 0

    def free(self, name: int) -> None:
        for segment in (*self.segments[True], *self.segments[False]):
            for block in segment:
                if block[1] == name:
                    block[1] = None
            merged: list[list] = []
            for block in segment:
                if merged and merged[-1][1] is None and block[1] is None:
                    merged[-1][0] += block[0]
                else:
                    merged.append(block)
            segment[:] = merged

    @property
    def blocks(self) -> list[list]:
        return [block for pool in self.segments.values() for segment in pool for block in segment]


requests = st.one_of(
    st.integers(0, 4096), st.integers(0, MIB), st.integers(MIB, 20 * MIB), st.integers(MIB, 200 * MIB),
    st.sampled_from([MIB, MIB + 1, 10 * MIB, 10 * MIB - 1, 64 * MIB]),
)  # fmt: skip
streams = st.lists(st.one_of(st.tuples(st.just(True), requests), st.tuples(st.just(False), st.integers(0, 10**6))))


@given(streams, st.booleans())
def test_it_reserves_what_a_naive_allocator_does(stream: list[tuple[bool, int]], expandable: bool) -> None:
    """Reserved and allocated bytes equal those of an allocator written without any cleverness, step by step."""
    fast, naive = CachingAllocator(expandable=expandable), Naive(expandable)
    live: list[int] = []
    for name, (allocates, number) in enumerate(stream):
        if allocates:
            fast.allocate(name, number)
            naive.allocate(name, number)
            live.append(name)
        elif live:
            gone = live.pop(number % len(live))
            fast.free(gone)
            naive.free(gone)
        assert fast.reserved_bytes == sum(block[0] for block in naive.blocks)
        assert fast.allocated_bytes == sum(block[0] for block in naive.blocks if block[1] is not None)
        assert fast.allocated_bytes <= fast.reserved_bytes <= fast.peak_reserved_bytes
        assert fast.allocated_bytes <= fast.peak_allocated_bytes <= fast.peak_reserved_bytes
    for name in live:
        fast.free(name)
    assert fast.allocated_bytes == 0


@given(st.lists(requests, max_size=30))
def test_a_request_that_was_freed_fits_again(sizes: list[int]) -> None:
    """Freeing and asking for the same storage at once never reserves more."""
    allocator = reserve(*sizes)
    before = allocator.reserved_bytes
    for name, size in enumerate(sizes):
        allocator.free(name)
        allocator.allocate(name, size)
    assert allocator.reserved_bytes == before


@given(streams, st.integers(20, 400))
def test_a_capacity_never_makes_it_reserve_more(stream: list[tuple[bool, int]], capacity_mib: int) -> None:
    """Returning free segments happens only to make room, and leaves everything allocated in place."""
    allocator = CachingAllocator(capacity_bytes=capacity_mib * MIB)
    live: list[int] = []
    for name, (allocates, number) in enumerate(stream):
        if allocates:
            allocator.allocate(name, number)
            live.append(name)
        elif live:
            allocator.free(live.pop(number % len(live)))
        assert 0 <= allocator.allocated_bytes <= allocator.reserved_bytes

"""The CUDA caching allocator, replayed: which segments a stream of allocations makes the process reserve.

Source: c10/cuda/CUDACachingAllocator.cpp (torch 2.13): sizes round up to 512 bytes; requests up to 1 MiB come from
2 MiB segments, those under 10 MiB from 20 MiB segments, larger ones from segments rounded up to 2 MiB; the smallest
free block that fits is taken and split when the rest is worth keeping; neighbours merge when freed; segments are
returned only when the device is full. With expandable segments the pool is one range that grows by 2 MiB (small) or
20 MiB (large) pages where it ends.

Leaves out: several streams, garbage collection thresholds, `max_split_size_mb`.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from brim.units import MIB

_ROUND = 512
_SMALL_REQUEST = MIB
_SMALL_SEGMENT = 2 * MIB
_MEDIUM_REQUEST = 10 * MIB
_MEDIUM_SEGMENT = 20 * MIB
_LARGE_ROUND = 2 * MIB


class _Block:
    """A piece of a segment; neighbours are linked so that free ones merge."""

    __slots__ = ("after", "before", "free", "serial", "size", "small")

    def __init__(self, size: int, small: bool, serial: int) -> None:
        self.size, self.small, self.serial = size, small, serial
        self.before: _Block | None = None
        self.after: _Block | None = None
        self.free = False


class CachingAllocator:
    """Replays allocations and frees; `reserved_bytes` and `peak_reserved_bytes` are what the process holds."""

    def __init__(self, *, capacity_bytes: int | None = None) -> None:
        """Start empty. `capacity_bytes`: device memory; when it is exceeded, free segments are returned first."""
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self._capacity = capacity_bytes
        self._blocks: dict[int, _Block] = {}
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._serial = 0

    def allocate(self, key: int, size_bytes: int) -> None:
        """Take a block for `size_bytes` under a name of the caller's."""
        size = max(_ROUND, -(-size_bytes // _ROUND) * _ROUND)
        small = size <= _SMALL_REQUEST
        block = self._take(size, small) or self._reserve(size, small)
        self._split(block, size)
        block.free = False
        self._blocks[key] = block
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)

    def free(self, key: int) -> None:
        """Give a block back to the pool; the segment stays reserved."""
        block = self._blocks.pop(key)
        self.allocated_bytes -= block.size
        block.free = True
        self._put(self._merge(self._merge(block, block.before), block.after))

    def _take(self, size: int, small: bool) -> _Block | None:
        pool = self._free[small]
        index = bisect_left(pool, size, key=lambda entry: entry[0])
        return pool.pop(index)[2] if index < len(pool) else None

    def _reserve(self, size: int, small: bool) -> _Block:
        segment = _segment_bytes(size)
        if self._capacity is not None and self.reserved_bytes + segment > self._capacity:
            self._release_free_segments()
        self.reserved_bytes += segment
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        self._serial += 1
        return _Block(segment, small, self._serial)

    def _release_free_segments(self) -> None:
        for pool in self._free.values():
            whole = [entry for entry in pool if entry[2].before is None and entry[2].after is None]
            for entry in whole:
                pool.remove(entry)
                self.reserved_bytes -= entry[0]

    def _split(self, block: _Block, size: int) -> None:
        rest = block.size - size
        if rest < _ROUND if block.small else rest <= _SMALL_REQUEST:
            return
        self._serial += 1
        tail = _Block(rest, block.small, self._serial)
        tail.before, tail.after = block, block.after
        if block.after is not None:
            block.after.before = tail
        block.after, block.size, tail.free = tail, size, True
        self._put(tail)

    def _put(self, block: _Block) -> None:
        insort(self._free[block.small], (block.size, block.serial, block))

    def _merge(self, block: _Block, neighbour: _Block | None) -> _Block:
        if neighbour is None or not neighbour.free:
            return block
        self._free[neighbour.small].remove((neighbour.size, neighbour.serial, neighbour))
        first, second = (neighbour, block) if block.before is neighbour else (block, neighbour)
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first


def _segment_bytes(size: int) -> int:
    if size <= _SMALL_REQUEST:
        return _SMALL_SEGMENT
    if size < _MEDIUM_REQUEST:
        return _MEDIUM_SEGMENT
    return -(-size // _LARGE_ROUND) * _LARGE_ROUND

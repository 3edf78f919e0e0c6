"""The CUDA caching allocator, replayed: which segments a stream of allocations makes the process reserve.

Source: c10/cuda/CUDACachingAllocator.cpp (torch 2.13): sizes round up to 512 bytes; requests up to 1 MiB come from
2 MiB segments, those under 10 MiB from 20 MiB segments, larger ones from segments rounded up to 2 MiB; the smallest
free block that fits is taken, the lowest address among equals, and split when the rest is worth keeping; neighbours
merge when freed; segments are returned only when the device is full. With expandable segments each pool is one range
that grows where it ends, by pages of 2 MiB (small) or 20 MiB (large).

Leaves out: several streams, garbage collection thresholds, `max_split_size_mb`; expandable segments never give pages
back here, so a full device is not relieved.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from brim.spec.device import BLOCK_BYTES
from brim.units import MIB

_SMALL_REQUEST = MIB
_SMALL_SEGMENT = 2 * MIB
_MEDIUM_REQUEST = 10 * MIB
_MEDIUM_SEGMENT = 20 * MIB
_LARGE_ROUND = 2 * MIB


class _Block:
    """A piece of a segment; neighbours are linked so that free ones merge."""

    __slots__ = ("address", "after", "before", "free", "size", "small")

    def __init__(self, address: int, size: int, small: bool) -> None:
        self.address, self.size, self.small = address, size, small
        self.before: _Block | None = None
        self.after: _Block | None = None
        self.free = False


class CachingAllocator:
    """Replays allocations and frees; `reserved_bytes` and `peak_reserved_bytes` are what the process holds."""

    def __init__(self, *, capacity_bytes: int | None = None, expandable: bool = False) -> None:
        """Start empty.

        Args:
            capacity_bytes: what the process may reserve; when it is exceeded, free segments are returned first.
            expandable: whether segments grow (`expandable_segments:True`).
        """
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self._capacity, self._expandable = capacity_bytes, expandable
        self._blocks: dict[int, _Block] = {}
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._ends: dict[bool, _Block | None] = {True: None, False: None}
        self._addresses = {True: 0, False: 0}

    def allocate(self, key: int, size_bytes: int) -> None:
        """Take a block for `size_bytes` under a name of the caller's."""
        size = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES or BLOCK_BYTES
        small = size <= _SMALL_REQUEST
        pool = self._free[small]
        index = bisect_left(pool, (size,))
        block = pool.pop(index)[2] if index < len(pool) else self._reserve(size, small)
        rest = block.size - size
        if rest >= BLOCK_BYTES if small else rest > _SMALL_REQUEST:
            self._split(block, size, rest)
        block.free = False
        self._blocks[key] = block
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes

    def free(self, key: int) -> None:
        """Give a block back to the pool; the segment stays reserved."""
        block = self._blocks.pop(key)
        self.allocated_bytes -= block.size
        before, after = block.before, block.after
        if before is not None and before.free:
            self._take(before)
            block = self._join(before, block)
        if after is not None and after.free:
            self._take(after)
            self._join(block, after)
        block.free = True
        insort(self._free[block.small], (block.size, block.address, block))

    def rename(self, key: int, new_key: int) -> None:
        """Call a block by another name from now on: storages pass from one caller to the next."""
        self._blocks[new_key] = self._blocks.pop(key)

    def _reserve(self, size: int, small: bool) -> _Block:
        if self._expandable:
            return self._expand(size, small)
        segment = _segment_bytes(size)
        if self._capacity is not None and self.reserved_bytes + segment > self._capacity:
            self._release_free_segments()
        return self._map(segment, small)

    def _map(self, size: int, small: bool) -> _Block:
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        block = _Block(self._addresses[small], size, small)
        self._addresses[small] += size
        return block

    def _expand(self, size: int, small: bool) -> _Block:
        """Grow the pool's range where it ends, a free block at the end included."""
        page, end = _SMALL_SEGMENT if small else _MEDIUM_SEGMENT, self._ends[small]
        spare = end.size if end is not None and end.free else 0
        block = self._map(-(-(size - spare) // page) * page, small)
        if end is not None:
            end.after, block.before = block, end
            if end.free:
                self._take(end)
                block = self._join(end, block)
        self._ends[small] = block
        return block

    def _release_free_segments(self) -> None:
        for small, pool in self._free.items():
            kept = [entry for entry in pool if entry[2].before is not None or entry[2].after is not None]
            self.reserved_bytes -= sum(entry[0] for entry in pool) - sum(entry[0] for entry in kept)
            self._free[small] = kept

    def _split(self, block: _Block, size: int, rest: int) -> None:
        tail = _Block(block.address + size, rest, block.small)
        tail.before, tail.after, tail.free = block, block.after, True
        if tail.after is not None:
            tail.after.before = tail
        if self._ends[block.small] is block:
            self._ends[block.small] = tail
        block.after, block.size = tail, size
        insort(self._free[block.small], (rest, tail.address, tail))

    def _take(self, block: _Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]

    def _join(self, first: _Block, second: _Block) -> _Block:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        if self._ends[first.small] is second:
            self._ends[first.small] = first
        return first


def _segment_bytes(size: int) -> int:
    if size <= _SMALL_REQUEST:
        return _SMALL_SEGMENT
    if size < _MEDIUM_REQUEST:
        return _MEDIUM_SEGMENT
    return -(-size // _LARGE_ROUND) * _LARGE_ROUND

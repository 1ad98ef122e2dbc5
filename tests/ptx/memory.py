"""Memory that knows who touched it: bounds, alignment, races, and reads of what nobody wrote."""

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NOBODY, SEVERAL = 0, -1  # in place of a thread's or a block's number
ALIGNMENT = 16  # no access is wider


class Fault(RuntimeError):
    """The program did what no program may."""


class Lanes(NamedTuple):
    """Who makes an access, a row for each thread: its number in the grid, from 1, its block's, and how many
    barriers the block has passed."""

    thread: Array
    block: Array
    epoch: Array


class Interval(NamedTuple):
    """Bytes of this process's memory that a kernel may touch."""

    name: str
    start: int
    size: int
    writable: bool = True


class Shadow:
    """Who last wrote each cell of a memory, and who read it since: enough to tell a race.

    Two accesses of one cell by different threads race unless both read, or a barrier of their block is
    between them. A cell has `granule` bytes.
    """

    def __init__(self, size: int, granule: int) -> None:
        cells = -(-size // granule)
        self._granule = granule
        self._writer, self._writer_block, self._writer_epoch = self._nobody(cells)
        self._reader, self._reader_block, self._reader_epoch = self._nobody(cells)

    @staticmethod
    def _nobody(cells: int) -> tuple[Array, Array, Array]:
        return tuple(_zeros(cells) for _ in range(3))  # type: ignore[return-value]

    def _cells(self, offset: Array, width: int) -> Array:
        """Of each access (rows), the cells it covers."""
        first = (offset // self._granule).astype(np.int64)
        count = max(1, width // self._granule)
        return first if count == 1 else first[..., None] + np.arange(count)

    @staticmethod
    def _spread(lanes: Lanes, like: Array) -> list[Array]:
        shape = (-1,) + (1,) * (like.ndim - 1)
        return [np.broadcast_to(part.reshape(shape), like.shape) for part in lanes]

    def written(self, offset: Array, width: int) -> Array:
        """Of each access, whether somebody has written all it covers."""
        cells = self._cells(offset, width)
        known = self._writer[cells] != NOBODY
        return np.asarray(known if cells.ndim == offset.ndim else known.all(-1))

    def read(self, offset: Array, width: int, lanes: Lanes) -> Array:
        """Notes the reads. Returns, of each, whether it races."""
        cells = self._cells(offset, width)
        thread, block, epoch = self._spread(lanes, cells)
        race = self._conflict(cells, thread, block, epoch)
        before, before_block, before_epoch = (
            each[cells] for each in (self._reader, self._reader_block, self._reader_epoch)
        )
        # A reader from before the block's last barrier may be forgotten.
        past = (before == NOBODY) | (before_block == block) & (before_epoch < epoch)
        others = ~past & (before != thread)
        self._reader[cells] = thread
        others |= self._reader[cells] != thread  # several threads read it in this access
        strange = ~past & (before_block != block)
        self._reader_block[cells] = block
        strange |= self._reader_block[cells] != block
        self._reader_epoch[cells] = epoch
        self._reader[cells[others]] = SEVERAL
        self._reader_block[cells[strange]] = SEVERAL
        return np.asarray(race if cells.ndim == offset.ndim else race.any(-1))

    def write(self, offset: Array, width: int, lanes: Lanes) -> tuple[Array, Array, Array]:
        """Notes the writes. Returns, of each, whether it races with a read, with an earlier write, and with
        another of these."""
        cells = self._cells(offset, width)
        thread, block, epoch = self._spread(lanes, cells)
        reader, reader_block = self._reader[cells], self._reader_block[cells]
        ordered = (reader_block == block) & (self._reader_epoch[cells] < epoch)
        races = [(reader != NOBODY) & (reader != thread) & ~ordered]
        races.append(self._conflict(cells, thread, block, epoch))
        self._writer[cells] = thread
        races.append(self._writer[cells] != thread)
        self._writer_block[cells], self._writer_epoch[cells] = block, epoch
        return tuple(race if cells.ndim == offset.ndim else race.any(-1) for race in races)  # type: ignore[return-value]

    def _conflict(self, cells: Array, thread: Array, block: Array, epoch: Array) -> Array:
        """With the last writer."""
        writer = self._writer[cells]
        ordered = (self._writer_block[cells] == block) & (self._writer_epoch[cells] < epoch)
        return (writer != NOBODY) & (writer != thread) & ~ordered


MANY = 1 << 22


def _zeros(count: int) -> Array:
    """Of int32; of very many, only those that are touched take memory."""
    if count < MANY:
        return np.zeros(count, np.int32)
    no_reserve = 0x4000  # MAP_NORESERVE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, 4 * count, flags=flags), np.int32)


@dataclass(slots=True)
class _Region:
    """An interval, or several that overlap, with views of its memory."""

    name: str
    start: int
    end: int
    writable: bool
    views: dict[int, Array]
    base: int  # the aligned address where the views begin
    shadow: Shadow | None = None


class GlobalMemory:
    """The intervals of this process's own memory that a launch may touch. Addresses are the process's own.

    What is not writable is not watched for races: nobody may write it.
    """

    def __init__(self, intervals: Iterable[Interval]) -> None:
        merged: list[_Region] = []
        for name, start, size, writable in sorted(intervals, key=lambda i: (i.start, -i.size)):
            if size == 0:
                continue
            if merged and start < merged[-1].end:
                last = merged[-1]
                if writable != last.writable and start + size > last.end:
                    raise ValueError(f"{name} and {last.name} overlap, and one of them is not to be written")
                last.end = max(last.end, start + size)
                last.writable |= writable
            else:
                merged.append(
                    _Region(name, start, start + size, writable, {}, start // ALIGNMENT * ALIGNMENT)
                )
        self._regions = merged
        self._starts = [region.start for region in merged]
        for region in merged:
            length = -(-(region.end - region.base) // ALIGNMENT) * ALIGNMENT
            whole = (ctypes.c_uint8 * length).from_address(region.base)
            region.views = {width: np.frombuffer(whole, kind) for width, kind in UNSIGNED.items()}

    def load(self, address: Array, width: int, lanes: Lanes) -> Array:
        """What lies at each address, [lanes] or [lanes, n]."""
        result = np.empty(address.shape, UNSIGNED[width])
        for region, which in self._located(address, width, "read"):
            offset = address[which] - np.uint64(region.base)
            result[which] = region.views[width][offset // np.uint64(width)]
            if region.writable:
                some = Lanes(*(part[which] for part in lanes))
                race = self._shadow(region).read(offset, width, some)
                if race.any():
                    raise Fault(self._race("read", region, address[which], race))
        return result

    def store(self, address: Array, value: Array, width: int, lanes: Lanes) -> None:
        for region, which in self._located(address, width, "write"):
            if not region.writable:
                raise Fault(f"a write to {region.name}, which is only to be read")
            offset = address[which] - np.uint64(region.base)
            some = Lanes(*(part[which] for part in lanes))
            race = np.logical_or.reduce(self._shadow(region).write(offset, width, some))
            if race.any():
                raise Fault(self._race("write", region, address[which], race))
            region.views[width][offset // np.uint64(width)] = value[which]

    @staticmethod
    def _race(what: str, region: _Region, address: Array, race: Array) -> str:
        first = int(address[race].flat[0]) - region.start
        return f"a race: {what} of {region.name}, byte {first}, where another thread is at work"

    @staticmethod
    def _shadow(region: _Region) -> Shadow:
        if region.shadow is None:
            region.shadow = Shadow(region.end - region.base + ALIGNMENT, 2)
        return region.shadow

    def _located(self, address: Array, width: int, what: str) -> Iterable[tuple[_Region, Any]]:
        """Each region with those of the accesses (rows of `address`) that lie in it, all of them checked."""
        if address.size == 0:
            return
        if (address & np.uint64(width - 1)).any():
            raise Fault(f"a {what} of {width} bytes at an address that is no multiple of it")
        low, high = int(address.min()), int(address.max())
        region = self._at(low)
        if region is not None and high + width <= region.end:
            yield region, ...
            return
        first = address if address.ndim == 1 else address[:, 0]
        at = np.searchsorted(np.array(self._starts, np.uint64), first, "right") - 1
        for i in np.unique(at):
            which = at == i
            region = self._regions[i] if i >= 0 else None
            if region is None or int(address[which].max()) + width > region.end:
                raise Fault(self._outside(int(address[which].max()), width, what))
            yield region, which

    def _at(self, address: int) -> _Region | None:
        i = bisect_right(self._starts, address) - 1
        return self._regions[i] if i >= 0 else None

    def _outside(self, address: int, width: int, what: str) -> str:
        region = self._at(address)
        near = "before all that is known"
        if region is not None:
            near = f"{address + width - region.end} bytes after the end of {region.name}"
        return f"a {what} of {width} bytes out of bounds: {near}"


class SharedMemory:
    """That of `blocks` blocks, `size` bytes each."""

    def __init__(self, blocks: int, size: int) -> None:
        self._size = max(-(-size // ALIGNMENT) * ALIGNMENT, ALIGNMENT)
        data = np.zeros(blocks * self._size, np.uint8)
        self._views = {width: data.view(kind) for width, kind in UNSIGNED.items()}
        self._shadow = Shadow(blocks * self._size, 1)

    def load(self, address: Array, width: int, lanes: Lanes, row: Array) -> Array:
        """`row`: of each lane, the number of its block among these."""
        offset = self._offset(address, width, row)
        if not self._shadow.written(offset, width).all():
            raise Fault("a read of shared memory that nobody has written")
        if self._shadow.read(offset, width, lanes).any():
            raise Fault("a race in shared memory: a read of what another thread is writing")
        return self._views[width][offset // width]

    def store(self, address: Array, value: Array, width: int, lanes: Lanes, row: Array) -> None:
        """Threads that hold the same number, as in Triton's layouts, may all write it."""
        offset = self._offset(address, width, row)
        view, at = self._views[width], offset // width
        with_read, with_earlier, with_another = self._shadow.write(offset, width, lanes)
        race = with_read | with_earlier & (view[at] != value)
        view[at] = value
        if (race | with_another & (view[at] != value)).any():
            raise Fault("a race in shared memory: a write where another thread is at work")

    def _offset(self, address: Array, width: int, row: Array) -> Array:
        address = address.astype(np.int64)
        if ((address < 0) | (address + width > self._size)).any():
            raise Fault(f"an access of shared memory out of bounds, of {self._size} bytes")
        if (address % width).any():
            raise Fault(f"an access of {width} bytes of shared memory at no multiple of it")
        return address + (row * self._size).reshape((-1,) + (1,) * (address.ndim - 1))


class LocalMemory:
    """Each thread's own. It grows as functions are called."""

    def __init__(self, lanes: int, size: int) -> None:
        self._data = np.full((lanes, max(size, 8)), 0xA5, np.uint8)

    def load(self, address: Array, width: int, lane: Array) -> Array:
        column = self._column(address, width)
        return np.ascontiguousarray(self._data[lane[:, None], column]).view(UNSIGNED[width])[:, 0]

    def store(self, address: Array, value: Array, width: int, lane: Array) -> None:
        raw = np.ascontiguousarray(value).view(np.uint8).reshape(-1, width)
        self._data[lane[:, None], self._column(address, width)] = raw

    def _column(self, address: Array, width: int) -> Array:
        address = address.astype(np.int64)
        if ((address < 0) | (address + width > self._data.shape[1])).any():
            raise Fault("an access of local memory out of bounds")
        if (address % width).any():
            raise Fault(f"an access of {width} bytes of local memory at no multiple of it")
        return address[:, None] + np.arange(width)

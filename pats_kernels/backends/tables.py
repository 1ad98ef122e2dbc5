"""A launch's tables on the device that runs the launch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pats_kernels.plan import Column, Launch, chunk_table

# Memory that captured graphs copy from at every replay. It is kept for ever: nothing says when a graph is
# gone.
_captured: list[Tensor] = []
# Tables that captured graphs read and that were uploaded once. Their plan may be forgotten.
_constants: list[Tensor] = []


class Tables(NamedTuple):
    """The tables that a kernel gets.

    Attributes:
        table: int64 [tensors, Column], as packed by the backend.
        layout: int64 [rows, 1 + OPERANDS].
        chunks: int32 [chunks, 2], the table's row and the number of the piece.
        starts: int64 [tensors + 1], where each tensor's chunks start in `chunks` and `partials`.
        partials: float64 [3, chunks], scratch memory for each chunk's sums.
    """

    table: Tensor
    layout: Tensor
    chunks: Tensor
    starts: Tensor
    partials: Tensor


@dataclass(slots=True)
class _OfStream:
    uploaded: np.ndarray  # the uploaded table, to upload again only if something has changed
    tables: Tables


class DeviceTables:
    """A launch's tables on its device, for one backend. The device must be the current one.

    The tables that depend only on the tensors' sizes are uploaded once. Each stream has its own rows and
    scratch memory, because a step may still be running on another stream; so has each captured graph.

    Args:
        chunk: elements in a chunk.
        pack: writes the launch's table, in the form that the kernels read, into an array of the same shape.

    Raises:
        RuntimeError: a graph is being captured.
    """

    def __init__(self, launch: Launch, chunk: int, pack: Callable[[Launch, np.ndarray], None]) -> None:
        self._device = launch.key.device
        self._pack = pack
        if capturing(self._device):
            raise RuntimeError(
                "a CUDA graph is being captured of tensors that no step has seen yet: "
                "take a step with the same parameters and gradients before the capture"
            )
        chunks, starts = chunk_table(launch.table[:, Column.NUMEL], chunk)
        self._chunks, self._starts, self._layout = (
            torch.from_numpy(array).to(self._device) for array in (chunks, starts, launch.layout)
        )
        self._streams: dict[int, _OfStream] = {}
        # Memory cannot be pinned during a capture, so a captured graph takes this.
        self._spare: Tensor | None = self._pinned(launch)

    def current(self, launch: Launch) -> Tables:
        """The tables of `launch`, as the plan has last refreshed it, for work on the current stream."""
        if capturing(self._device):
            return self._for_graph(launch)
        if self._spare is None:
            self._spare = self._pinned(launch)
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device).cuda_stream if on_gpu else 0
        kept = self._streams.get(stream)
        if kept is None:
            kept = self._streams[stream] = _OfStream(launch.table.copy(), self._allocated(launch))
        elif np.array_equal(kept.uploaded, launch.table):
            return kept.tables
        np.copyto(kept.uploaded, launch.table)
        self._upload(launch, self._pinned(launch), kept.tables)
        return kept.tables

    def _for_graph(self, launch: Launch) -> Tables:
        """Tables in the graph's memory. Each replay uploads them, because other graphs may share it."""
        staging = self._pinned(launch) if self._spare is None else self._spare
        self._spare = None
        _captured.append(staging)
        _constants.extend((self._layout, self._chunks, self._starts))
        tables = self._allocated(launch)
        self._upload(launch, staging, tables)
        return tables

    def _allocated(self, launch: Launch) -> Tables:
        table = torch.empty(launch.table.shape, dtype=torch.int64, device=self._device)
        partials = torch.empty((3, len(self._chunks)), dtype=torch.float64, device=self._device)
        return Tables(table, self._layout, self._chunks, self._starts, partials)

    def _upload(self, launch: Launch, staging: Tensor, tables: Tables) -> None:
        """Packs the rows and sends them, without waiting. torch reuses pinned memory once it was read."""
        self._pack(launch, staging.numpy())
        tables.table.copy_(staging, non_blocking=True)

    def _pinned(self, launch: Launch) -> Tensor:
        return torch.empty(launch.table.shape, dtype=torch.int64, pin_memory=self._device.type == "cuda")


def narrowed(launch: Launch, packed: np.ndarray) -> None:
    """Packs the table with its numbers in the dtype of the arithmetic.

    On many GPUs one float64 instruction, even a conversion, takes as long as 64 others.
    """
    np.copyto(packed, launch.table)
    if launch.key.param_dtype != torch.float64:
        numbers = launch.table.view(np.float64)[:, Column.NOISE_SCALE :]
        packed.view(np.float32)[:, 2 * Column.NOISE_SCALE :: 2] = numbers


def capturing(device: torch.device) -> bool:
    """Whether work started on this device now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

"""Memory between two inaccessible pages: an access one element beyond a tensor ends the process."""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

End = Literal["first", "last"]  # the element next to a guard: the page before it, or the page after

PAGE = mmap.PAGESIZE
PROT_NONE = 0  # the module mmap has the others
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Guards:
    """Copies tensors to such memory, which lives until the end of `guards()`."""

    def __init__(self) -> None:
        self._mapped: list[tuple[int, int]] = []

    def copy(self, tensor: Tensor, end: End) -> Tensor:
        """The same numbers with the same strides; the gaps between them are NaN."""
        strides = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        span = 1 + sum(strides)
        memory = self._memory(span * tensor.element_size(), end)
        storage = torch.frombuffer(memory, dtype=tensor.dtype)
        if tensor.is_floating_point():
            storage.fill_(torch.nan)
        return storage.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    def _memory(self, numbytes: int, end: End) -> ctypes.Array[ctypes.c_char]:
        inner = -(-numbytes // PAGE) * PAGE
        size = inner + 2 * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = LIBC.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        self._mapped.append((address, size))
        for guard in (address, address + PAGE + inner):
            if LIBC.mprotect(guard, PAGE, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        start = address + PAGE + (0 if end == "first" else inner - numbytes)
        return (ctypes.c_char * numbytes).from_address(start)

    def release(self) -> None:
        for address, size in self._mapped:
            LIBC.munmap(address, size)
        self._mapped.clear()


@contextmanager
def guards() -> Iterator[Guards]:
    """A context; the copies must not be used after it."""
    made = Guards()
    try:
        yield made
    finally:
        made.release()

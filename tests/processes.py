"""Runs functions on several processes, the ranks of a default process group, as in a user's script.

The processes are forked from a server that has imported torch, and kept from test to test. So a call costs
some 50 ms, while starting Python and torch costs seconds per process. If a call fails or hangs, its processes
are ended, and the next call gets new ones.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist

T = TypeVar("T")

SIZE = 4  # the most ranks a call can have
TIMEOUT = 60.0  # seconds for one call; the slowest takes a few
GRACE = 1.0  # seconds that the other ranks get once one has failed: they may wait for it forever

# Imports of a first `fully_shard`, among others. None starts a thread, which a fork would lose.
PRELOADED = [
    "numpy",
    "pytest",
    "torch",
    "torch._dynamo",
    "torch._inductor.config",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]


class RankError(AssertionError):
    """What went wrong, on which rank, with that rank's traceback."""


class Pool:
    """`pool(3, function, x)` runs `function(x)` on ranks 0, 1, 2 and returns their results in this order.

    The function, and the classes of its arguments and results, must be importable from a module, because they
    are pickled. The default process group in it uses gloo, has exactly that size and is made for this call.

    Raises:
        RankError: a rank raised, died or did not end in time.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        self._calls = 0
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def __call__(
        self, world_size: int, function: Callable[..., T], *args: Any, timeout: float = TIMEOUT
    ) -> list[T]:
        if not 1 <= world_size <= SIZE:
            raise ValueError(f"world_size is {world_size}, must be in [1, {SIZE}]")
        if not self._processes:
            self._start()
        self._calls += 1
        store = str(Path(self._folder.name, f"store{self._calls}"))
        work = pickle.dumps((store, world_size, function, args))
        for pipe in self._pipes[:world_size]:
            pipe.send_bytes(work)
        results, errors = self._collect(world_size, timeout)
        if errors:
            self.stop()
            raise RankError("\n".join(errors))
        return [results[rank] for rank in range(world_size)]

    def _start(self) -> None:
        for rank in range(SIZE):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(rank, theirs, self._trace(rank)), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _trace(self, rank: int) -> str:
        return str(Path(self._folder.name, f"trace{rank}"))

    def _collect(self, world_size: int, timeout: float) -> tuple[dict[int, Any], list[str]]:
        """Results by rank, and the errors, the first one first, because others may follow from it."""
        results: dict[int, Any] = {}
        errors: list[str] = []
        open_ = {pipe: rank for rank, pipe in enumerate(self._pipes[:world_size])}
        end = time.monotonic() + timeout
        while open_:
            ready = multiprocessing.connection.wait(list(open_), max(0.0, end - time.monotonic()))
            for pipe in ready:
                rank = open_.pop(pipe)  # type: ignore[call-overload]
                good, value = self._receive(rank)
                if good:
                    results[rank] = value
                else:
                    errors.append(f"rank {rank} of {world_size}: {value}")
                    end = min(end, time.monotonic() + GRACE)
            if not ready:
                late = [self._where(rank) for rank in open_.values()]
                return results, errors + (late if errors else [f"not done in {timeout} s", *late])
        return results, errors

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(GRACE)
            return False, f"the process died, exit code {self._processes[rank].exitcode}"

    def _where(self, rank: int) -> str:
        """Where a rank that does not return is in its code."""
        os.kill(self._processes[rank].pid, signal.SIGUSR1)
        file, end = Path(self._trace(rank)), time.monotonic() + GRACE
        while not file.stat().st_size and time.monotonic() < end:
            time.sleep(0.01)
        return f"rank {rank} still runs:\n{file.read_text()}"

    def stop(self) -> None:
        """Ends the processes; the next call starts new ones."""
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(rank: int, pipe: Any, trace: str) -> None:
    """A process's main loop: runs calls until the pipe is closed."""
    torch.set_num_threads(1)
    with open(trace, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        while True:
            try:
                work = pipe.recv_bytes()
            except EOFError:
                return
            pipe.send_bytes(_answer(rank, work))


def _answer(rank: int, work: bytes) -> bytes:
    try:
        store, world_size, function, args = pickle.loads(work)
        # As set by torchrun: Accelerate reads these, not torch. Other changes by a call end with it.
        own = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        all_ = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size))
        with patch.dict(os.environ, own | all_):
            torch.manual_seed(0)
            dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world_size)
            result = function(*args)
            dist.barrier()  # no rank leaves while another still needs it
            dist.destroy_process_group()
        return pickle.dumps((True, result))
    except BaseException:  # any error belongs to the test
        return pickle.dumps((False, traceback.format_exc()))

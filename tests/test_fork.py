"""A process that has taken steps with two threads forks, as DataLoaders and fork-start launchers do.

In the child, GNU's OpenMP, which torch's operations use, waits for threads that do not exist. So code that
computes in a forked child must call `torch.set_num_threads(1)`, as DataLoader's workers do. The C++ kernel
does not need it. A test that hangs is killed after a while, and fails.
"""

import multiprocessing
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from harness import assert_same_bits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pats_kernels import PATSAdamW

SIZE = 40_000  # three of the kernel's chunks, and more than torch gives to one thread
TIMEOUT = 60.0  # seconds; a child takes less than one

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks are Linux's"),
    pytest.mark.skipif(INTERPRETED, reason="threads are not for Triton's interpreter"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python 3.12
    pytest.mark.filterwarnings("ignore:PATS"),
]


def training(backend: str) -> tuple[nn.Parameter, PATSAdamW]:
    """A parameter and its optimizer after two steps, before the third."""
    random = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(SIZE, generator=random))
    param.grad = torch.randn(SIZE, generator=random)
    optimizer = PATSAdamW([param], noise_scale=1e-2, backend=backend)
    for _ in range(2):
        optimizer.step()
    return param, optimizer


def in_child(function: Callable[[], Tensor]) -> Tensor:
    """The function's result in a forked process, which may use what exists in this one."""
    ours, theirs = multiprocessing.Pipe()

    def work() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(TIMEOUT))  # kills it wherever it is, as in each of its children
        theirs.send_bytes(function().detach().numpy().tobytes())

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    theirs.close()
    try:
        assert ours.poll(TIMEOUT), "the child hangs"
        return torch.frombuffer(bytearray(ours.recv_bytes()), dtype=torch.float32)
    finally:
        child.kill()
        child.join()


def check_child(
    backend: str, prepare: Callable[[], None], fork: Callable[[Callable[[], Tensor]], Tensor] = in_child
) -> None:
    """A step in a process made by `fork`, prepared there, equals the next step here, to the bit."""
    torch.set_num_threads(2)
    param, optimizer = training(backend)

    def step() -> Tensor:
        prepare()
        optimizer.step()
        return param

    stepped = fork(step)
    assert not torch.equal(stepped, param)
    optimizer.step()
    assert_same_bits([stepped], [param.detach()])


def has_two_threads() -> None:
    assert torch.get_num_threads() == 2


def test_a_child_that_takes_one_thread(backend: str, threads: None) -> None:
    check_child(backend, lambda: torch.set_num_threads(1))


def test_a_child_that_does_not(threads: None) -> None:
    """It keeps the parent's number of threads. torch's own operations would hang, but the kernel does not."""
    check_child("cpp", has_two_threads)


def test_a_child_s_child(threads: None) -> None:
    """Its parent has one thread, and the same memory of threads that no longer exist."""
    check_child("cpp", lambda: None, lambda step: in_child(lambda: in_child(step)))


class Steps(Dataset[Any]):
    """Each item is the result of a worker's own optimizer from the same start."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __len__(self) -> int:
        return 4

    def __getitem__(self, _: int) -> Tensor:
        return training(self.backend)[0].detach()


def test_workers_of_a_data_loader(backend: str, threads: None) -> None:
    """They take steps, and so does their parent process, in between."""
    torch.set_num_threads(2)
    expected = training(backend)[0].detach()
    loader = DataLoader(
        Steps(backend), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=TIMEOUT
    )
    for item in loader:
        assert_same_bits([item, training(backend)[0].detach()], [expected, expected])

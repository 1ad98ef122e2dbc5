"""Chooses the backends that a run tests, and how many examples hypothesis tries.

Triton decides at import whether it is interpreted, so there are two runs. `pytest tests` tests eager and cpp;
`TRITON_INTERPRET=1 pytest tests -m backend` tests the Triton kernel under its interpreter. If a backend that
should run cannot, its tests fail. PATS_KERNELS_NO_EXTENSION=1 says that cpp should not run.
From tests/clients, only the files whose client is installed are collected.
"""

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, settings
from processes import Pool

from benchmarks.common import machine
from pats_kernels import available_backends

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NO_EXTENSION = os.environ.get("PATS_KERNELS_NO_EXTENSION") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["eager"] if NO_EXTENSION else ["eager", "cpp"]
KERNEL = BACKENDS[-1]

FUZZ = int(os.environ.get("PATS_FUZZ", "0"))  # examples of each kind that `make fuzz` tries; 0: in tests

REHEARSAL = os.environ.get("PATS_GPU_REHEARSAL") == "1"  # of tests/gpu, on the CPU: tests/gpu/device.py

collect_ignore = [] if torch.cuda.is_available() or REHEARSAL else ["gpu"]


def client_is_missing(file: Path) -> bool:
    """Whether the package that a file (test_PACKAGE or test_PACKAGE_*) is named after is not installed."""
    names = accumulate(file.stem.removeprefix("test_").split("_"), "{}_{}".format)
    return all(find_spec(name) is None for name in names)


# `make test-clients` installs all of them, and sets PATS_CLIENTS=1, with which a missing one is a failure.
if os.environ.get("PATS_CLIENTS") != "1":
    clients = Path(__file__).parent.glob("clients/test_*.py")
    collect_ignore += [f"clients/{file.name}" for file in clients if client_is_missing(file)]
if INTERPRETED:
    collect_ignore += ["test_cuda_emulation.py", "clients", "ptx"]  # they test other backends

settings.register_profile(
    "pats",
    deadline=None,  # a first call may compile
    derandomize=True,  # failures must be reproducible
    max_examples=8 if INTERPRETED else 60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(
    "fuzz",
    settings.get_profile("pats"),
    derandomize=False,  # new examples in each run; failing ones are kept in .hypothesis, and tried first
    print_blob=True,
    max_examples=max(FUZZ, 1),
    stateful_step_count=60,
)
settings.load_profile("fuzz" if FUZZ else "pats")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backend: proves a backend; runs once more under Triton's interpreter")


def pytest_itemcollected(item: pytest.Item) -> None:
    fixtures = getattr(item, "fixturenames", ())
    if "backend" in fixtures:
        item.add_marker(pytest.mark.backend)
    if "pool" in fixtures:  # all in one of xdist's processes, so there is only one pool
        item.add_marker(pytest.mark.xdist_group("pool"))


@pytest.fixture(scope="session", autouse=REHEARSAL and not INTERPRETED)
def machine_code() -> Iterator[None]:
    """Rehearsals of tests/gpu run the machine code that Triton's kernels compile to."""
    from ptx.triton_driver import emulated

    with emulated(90):
        yield


@pytest.fixture(scope="session", autouse=True)
def malloc_gives_back() -> Iterator[None]:
    """Keeps benchmarks from telling malloc to keep freed memory. That would outlive the test: after two big
    allocations no fork could get its copy of the heap."""
    with patch.object(machine, "keep_freed_memory", lambda: False):
        yield


@pytest.fixture(scope="module")
def quick_gc() -> Iterator[None]:
    """Makes gc.collect() quick: it skips the many objects that earlier tests have left."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that this run tests."""
    reason = available_backends("cpu")[request.param]
    if reason is not None:
        pytest.fail(f"backend {request.param!r} cannot run on the CPU: {reason}", pytrace=False)
    return request.param


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Runs a function on 1 to 4 processes with a process group."""
    pool = Pool()
    yield pool
    pool.stop()


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test change torch's number of threads; restores it afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

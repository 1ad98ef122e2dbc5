"""The harness itself: ranks, groups and results, and what it says when a rank raises, dies or hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from processes import Pool, RankError
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh


def ranks_and_sum(value: Tensor) -> tuple[int, int, Tensor, int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    total = value * (dist.get_rank() + 1)
    dist.all_reduce(total, group=mesh.get_group())
    return dist.get_rank(), mesh.size(), total, torch.get_num_threads()


def test_runs_on_a_group_of_the_size_asked_for(pool: Pool) -> None:
    for world_size in (4, 1, 3, 2, 4):
        results = pool(world_size, ranks_and_sum, torch.tensor([1.0, 10.0]))
        factor = world_size * (world_size + 1) / 2
        assert [r[:2] for r in results] == [(rank, world_size) for rank in range(world_size)]
        assert all(r[2].tolist() == [factor, 10 * factor] and r[3] == 1 for r in results)


def process_and_random() -> tuple[int, float]:
    assert os.environ["WORLD_SIZE"] == "2"
    assert "LEFT_BEHIND" not in os.environ
    os.environ["LEFT_BEHIND"] = "1"
    return os.getpid(), float(torch.rand(()))


def test_the_processes_stay_and_begin_anew(pool: Pool) -> None:
    first, second = pool(2, process_and_random), pool(2, process_and_random)
    assert first == second
    assert first[0][0] != first[1][0]
    assert first[0][1] == first[1][1]


def trouble(kind: str, rank: int) -> int:
    """In `rank`; the others wait for it in a collective."""
    if dist.get_rank() == rank:
        if kind == "raises":
            raise KeyError("this one")
        if kind == "dies":
            os._exit(7)
        if kind == "hangs":
            time.sleep(1000)
        if kind == "returns what cannot be pickled":
            dist.barrier()
            return lambda: 0  # type: ignore[return-value]
    dist.barrier()
    return os.getpid()


MESSAGES = {
    "raises": r"(?s)rank 1 of 3: Traceback.*in trouble.*KeyError: 'this one'",
    "dies": r"rank 1 of 3: the process died, exit code 7",
    "hangs": r"(?s)not done in 1 s.*rank 1 still runs.*in trouble",
    "returns what cannot be pickled": r"(?s)rank 1 of 3: .*pickle",
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_says_which_rank_is_in_trouble_and_goes_on(pool: Pool, kind: str) -> None:
    before = pool(3, trouble, "none", 1)
    start = time.monotonic()
    with pytest.raises(RankError, match=MESSAGES[kind]):
        pool(3, trouble, kind, 1, timeout=1 if kind == "hangs" else 60)
    assert time.monotonic() - start < 30  # does not wait for the timeout of 60 s
    after = pool(3, trouble, "none", 1)
    assert not set(before) & set(after)


@pytest.mark.parametrize("world_size", [0, 5])
def test_world_sizes_it_does_not_have(pool: Pool, world_size: int) -> None:
    with pytest.raises(ValueError, match=rf"world_size is {world_size}, must be in \[1, 4\]"):
        pool(world_size, process_and_random)

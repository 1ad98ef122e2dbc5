"""Small steps for tuning a kernel or the host's code: `pytest benchmarks/bench_step.py` (pytest-benchmark).

All data is in the cache, with one thread, so this times the arithmetic or, with many tiny tensors, the host.
`python -m benchmarks` times what users see: real models, out of cache.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from pats_kernels import PATS, PATSAdamW, available_backends
from pats_kernels.hyperparameters import Normalization, Sensitivity

BACKENDS = [
    name
    for name, reason in available_backends("cpu").items()
    if reason is None and name not in ("auto", "triton")
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parameters(count: int, numel: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """With gradients."""
    params = [torch.nn.Parameter(torch.randn(numel).to(dtype)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def attached(
    count: int, numel: int, dtype: torch.dtype, backend: str, normalization: Normalization
) -> Callable[[], None]:
    """PATS's part of a step over `count` tensors; the averages have seen two steps."""
    optimizer = torch.optim.SGD(parameters(count, numel, dtype), lr=0.0)
    pats = PATS(optimizer, backend=backend, normalization=normalization)
    optimizer.step()
    optimizer.step()
    return lambda: pats._attachment.before_step(optimizer, (), {})


def with_adamw(
    count: int, numel: int, dtype: torch.dtype, backend: str, sensitivity: Sensitivity
) -> Callable[[], None]:
    """PATSAdamW's step over `count` tensors; the averages have seen two."""
    params = parameters(count, numel, dtype)
    optimizer = PATSAdamW(params, lr=0.0, weight_decay=0.0, backend=backend, sensitivity=sensitivity)
    optimizer.step()
    optimizer.step()
    return optimizer.step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_cache(
    benchmark: Callable[..., None], dtype: torch.dtype, normalization: Normalization, backend: str
) -> None:
    """64 Ki elements: 1 ms is 15 ns an element."""
    benchmark(attached(1, 1 << 16, dtype, backend, normalization))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sensitivity", ["ema", "moments"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_cache_with_adamw(
    benchmark: Callable[..., None], dtype: torch.dtype, sensitivity: Sensitivity, backend: str
) -> None:
    """64 Ki elements: 1 ms is 15 ns an element."""
    benchmark(with_adamw(1, 1 << 16, dtype, backend, sensitivity))


def test_host(benchmark: Callable[..., None]) -> None:
    """1,000 tensors of one element: 1 ms is 1 us a tensor."""
    benchmark(attached(1000, 1, torch.float32, "auto", "delayed"))


def test_host_with_adamw(benchmark: Callable[..., None]) -> None:
    """The same for PATSAdamW."""
    benchmark(with_adamw(1000, 1, torch.float32, "auto", "ema"))

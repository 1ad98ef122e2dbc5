"""Captured steps: a replay is a step, with noise of its own, to the last bit what it is uncaptured."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import DEVICE, Graph, Stream, assert_same, at_most, backends, needs_gpu, synchronize
from torch import Tensor

from pats_kernels import PATS, PATSAdamW

NOISE_SCALE = 1e-2
SIZES = [at_most(300, 100_000), 7, at_most(1030, 4096), 1]
REPLAYS = 3
Run = tuple[list[Tensor], torch.optim.Optimizer, Any]  # parameters, optimizer, and what keeps PATS's state


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=random).to(DEVICE, dtype)) for n in SIZES]


def one_pass(params: list[Tensor], backend: str, **keywords: Any) -> Run:
    settings = {"lr": 1e-2, "noise_scale": NOISE_SCALE, "capturable": True, "backend": backend}
    optimizer = PATSAdamW(params, **settings | keywords)
    return params, optimizer, optimizer


def moments(params: list[Tensor], backend: str, **keywords: Any) -> Run:
    return one_pass(params, backend, sensitivity="moments", **keywords)


def attached(params: list[Tensor], backend: str, **keywords: Any) -> Run:
    """To an optimizer that leaves the parameters alone and that any graph can hold."""
    optimizer = torch.optim.SGD(params, lr=0.0)
    keywords.pop("lr", None)
    pats = PATS(optimizer, noise_scale=keywords.pop("noise_scale", NOISE_SCALE), backend=backend, **keywords)
    optimizer.step = lambda: pats._attachment.before_step(optimizer, (), {})  # type: ignore[method-assign]
    return params, optimizer, pats


MAKERS = pytest.mark.parametrize("make", [one_pass, moments, attached])
Make = Callable[..., Run]


def fill(grads: list[Tensor], seed: int) -> None:
    """New gradients where the old ones were, as a captured backward pass leaves them."""
    random = torch.Generator().manual_seed(seed)
    for grad in grads:
        grad.copy_(torch.randn(grad.shape, generator=random).to(grad))


def with_gradients(run: Run) -> list[Tensor]:
    for param in run[0]:
        param.grad = torch.zeros_like(param)
    grads = [param.grad for param in run[0] if param.grad is not None]
    fill(grads, 0)
    return grads


def everything(run: Run) -> list[Tensor]:
    params, _, keeper = run
    return [x for p in params for x in (p.detach(), *(v for _, v in sorted(keeper.state[p].items())))]


def snapshot(run: Run) -> list[Tensor]:
    return [x.clone() for x in everything(run)]


@backends
@MAKERS
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_are_steps(make: Make, normalization: str, dtype: torch.dtype, backend: str) -> None:
    plain, captured = (make(parameters(dtype), backend, normalization=normalization) for _ in range(2))
    for run in (plain, captured):
        with_gradients(run)
        run[1].step()
    assert_same(snapshot(captured), snapshot(plain))
    before = snapshot(captured)
    graph = Graph(captured[1].step)
    assert_same(snapshot(captured), before)  # a capture runs nothing
    for t in range(1, 1 + REPLAYS):
        for run in (plain, captured):
            fill([p.grad for p in run[0] if p.grad is not None], t)
        plain[1].step()
        graph.replay()
        synchronize()
        assert_same(snapshot(captured), snapshot(plain))
    assert all(captured[2].state[p]["step"].item() == 1 + REPLAYS for p in captured[0])
    plain[1].step()
    captured[1].step()  # a step outside the graph continues from there
    assert_same(snapshot(captured), snapshot(plain))


@backends
def test_noise_is_fresh_in_every_replay(backend: str) -> None:
    """With gradients that stay and weights put back, only the noise differs; it is that of t."""
    run = attached(parameters(), backend, gamma=0.0)
    params = [param.detach() for param in run[0]]
    with_gradients(run)
    run[1].step()
    graph, original = Graph(run[1].step), [param.clone() for param in params]
    changes = []
    for _ in range(REPLAYS):
        for param, value in zip(params, original, strict=True):
            param.copy_(value)
        graph.replay()
        synchronize()
        changes.append(params[0] - original[0])
    for i, change in enumerate(changes):
        assert change.abs().max() > 0.1 * NOISE_SCALE
        for other in changes[:i]:
            assert (change - other).abs().max() > 0.1 * NOISE_SCALE


@needs_gpu  # on a CPU the host reads such tensors
@backends
def test_what_a_schedule_changes_between_replays(backend: str) -> None:
    """lr and noise_scale, where they are tensors on the device."""
    plain, captured = (
        one_pass(
            parameters(),
            backend,
            lr=torch.tensor(1e-2, device=DEVICE),
            noise_scale=torch.tensor(NOISE_SCALE, device=DEVICE),
        )
        for _ in range(2)
    )
    for run in (plain, captured):
        with_gradients(run)
        run[1].step()
    graph = Graph(captured[1].step)
    for t in range(1, 1 + REPLAYS):
        for run in (plain, captured):
            for name in ("lr", "noise_scale"):
                run[1].param_groups[0][name].mul_(0.5)
            fill([p.grad for p in run[0] if p.grad is not None], t)
        plain[1].step()
        graph.replay()
        synchronize()
        assert_same(snapshot(captured), snapshot(plain))


@backends
@MAKERS
def test_several_graphs(make: Make, backend: str) -> None:
    """Two of one optimizer, with gradients in different places, and one of another, in turn."""
    plain, captured = (make(parameters(), backend) for _ in range(2))
    other = make(parameters(), backend, seed=1)
    places = [[torch.zeros_like(p) for p in captured[0]] for _ in range(2)]
    for run in (plain, captured, other):
        with_gradients(run)
        run[1].step()
    graphs = []
    for grads in places:
        for param, grad in zip(captured[0], grads, strict=True):
            param.grad = grad
        graphs.append(Graph(captured[1].step, pool=graphs[0].pool if graphs else None))
    graphs.append(Graph(other[1].step))
    untouched = snapshot(plain)
    for t in range(1, 1 + 2 * REPLAYS):
        fill(places[t % 2], t)
        fill([p.grad for p in plain[0] if p.grad is not None], t)
        plain[1].step()
        graphs[t % 2].replay()
        graphs[2].replay()
        synchronize()
        assert_same(snapshot(captured), snapshot(plain))
    assert not torch.equal(snapshot(other)[0], untouched[0])
    assert all(other[2].state[p]["step"].item() == 1 + 2 * REPLAYS for p in other[0])


@backends
def test_replays_on_other_streams(backend: str) -> None:
    """Each after the last, on a stream of its own, with uncaptured steps of another optimizer beside them."""
    plain, captured, beside = (one_pass(parameters(), backend) for _ in range(3))
    for run in (plain, captured, beside):
        with_gradients(run)
        run[1].step()
    graph = Graph(captured[1].step)
    synchronize()
    streams = [Stream(), Stream()]
    for t in range(2 * REPLAYS):
        stream = streams[t % 2]
        stream.wait(None)
        stream.wait(streams[(t + 1) % 2])
        with stream.current():
            graph.replay()
        beside[1].step()
    synchronize()
    for _ in range(2 * REPLAYS):
        plain[1].step()
    assert_same(snapshot(captured), snapshot(plain))
    assert_same(snapshot(beside), snapshot(plain))


@backends
def test_a_skipped_step_in_a_graph(backend: str) -> None:
    """found_inf is read in the replay: no bit changes, the step count neither."""
    run = one_pass(parameters(), backend)
    with_gradients(run)
    run[1].step()
    found_inf = torch.zeros((), device=DEVICE)
    run[1].grad_scale = torch.ones((), device=DEVICE)  # type: ignore[attr-defined]
    run[1].found_inf = found_inf  # type: ignore[attr-defined]
    graph = Graph(run[1].step)
    for value, moves in ((1.0, False), (0.0, True)):
        before = snapshot(run)
        found_inf.fill_(value)
        graph.replay()
        synchronize()
        after = snapshot(run)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) != moves

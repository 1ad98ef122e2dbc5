"""The contestants: the same step as a first draft, carefully rewritten, compiled, and from this package.

The first three are in `formulas.py`. If AdamW follows, each uses the matching AdamW, and this package has
three contestants: attached to torch's AdamW, in one pass, and without any state of its own. All work on the
same parameters and gradients, with state of the same size and dtype.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.common.shapes import Gradients
from benchmarks.common.timing import Step, milliseconds
from benchmarks.step.formulas import bias_corrections, foreach_update_, update_
from pats_kernels import PATS, PATSAdamW, backends
from pats_kernels.hyperparameters import AdamWHyperparameters, Hyperparameters, Sensitivity, defaults_of
from pats_kernels.state import keys_of

TRIALS = 3  # of each configuration of a contestant that has several
COMPILE_SECONDS = {"cpu": 3600, "cuda": 100}  # for all configurations; a lent GPU has no more
HOST_STEPS = 50
GRAPHS = 32  # more than a compiled function has: one for each range of sizes and way to ask
OPTIMIZERS = ("none", "adamw")  # what may follow the PATS step

Row = tuple[Tensor, Tensor, list[Tensor], Tensor]  # one parameter's w, g, [S, U] or [S, U, m, v], statistics


@dataclass(slots=True)
class Tensors:
    """What a step reads and writes, as parallel lists. `steps`: as many counters as the optimizer has."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avg_sens: list[Tensor]
    exp_avg_unc: list[Tensor]
    sens_stats: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    steps: list[Tensor] = field(default_factory=list)

    @classmethod
    def fresh(cls, gradients: Gradients) -> "Tensors":
        """The state before the first step; the gradients are attached as `p.grad`."""
        params, grads = gradients
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        S, U, m, v = ([torch.zeros_like(param) for param in params] for _ in range(4))
        return cls(params, grads, S, U, [torch.zeros(2, device=param.device) for param in params], m, v)

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def averages(self, optimizer: str) -> list[list[Tensor]]:
        """S and U, and where AdamW follows m and v."""
        moments = [self.exp_avg, self.exp_avg_sq] if optimizer == "adamw" else []
        return [self.exp_avg_sens, self.exp_avg_unc, *moments]

    def rows(self, optimizer: str) -> list[Row]:
        state = map(list, zip(*self.averages(optimizer), strict=True))
        return list(zip(self.params, self.grads, state, self.sens_stats, strict=True))


class Task(NamedTuple):
    """The task of every contestant.

    Attributes:
        h: hyperparameters; those of AdamW matter only if AdamW follows.
        optimizer: the step that follows the PATS step, one of `OPTIMIZERS`.
        backend: of this package's contestants.
        shared: whether they update the task's own state, as the others do, instead of copies. Copies of a big
            model's state would not fit into memory.
    """

    tensors: Tensors
    h: AdamWHyperparameters
    optimizer: str = "none"
    backend: str = "auto"
    shared: bool = False


class Contestant(NamedTuple):
    """A step, what runs it, and the tensors it updates.

    Attributes:
        form: what it must read and write, one of `results.ACCESSES`.
        configuration: the one it chose, if it has several.
    """

    name: str
    backend: str
    form: str
    step: Step
    tensors: Tensors
    configuration: str | None = None


def contestant(name: str, task: Task) -> Contestant:
    """The contestant called `name`, one of `names(task.optimizer)`."""
    return _CONTESTANTS[name](task)


def names(optimizer: str) -> tuple[str, ...]:
    """The contestants if this optimizer follows the PATS step."""
    return tuple(name for name in NAMES if optimizer == "adamw" or name not in ADAMW_ONLY)


def torch_adamw(task: Task, *, foreach: bool | None = None, fused: bool | None = None) -> torch.optim.AdamW:
    """torch's AdamW in the requested form, with the task's moments as its own.

    The contestants that use it share the moments: they see the same gradients, and a big model's moments
    would not fit many times.
    """
    h, tensors = task.h, task.tensors
    keywords: dict[str, Any] = {"lr": h.lr, "betas": h.betas, "eps": h.eps, "weight_decay": h.weight_decay}
    keywords["capturable"] = bool(fused) and tensors.device.type == "cuda"  # costs it nothing
    optimizer = torch.optim.AdamW(tensors.params, **keywords, foreach=foreach, fused=fused)
    counters = tensors.device if fused else torch.device("cpu")  # as torch places them
    for param, m, v in zip(tensors.params, tensors.exp_avg, tensors.exp_avg_sq, strict=True):
        optimizer.state[param] = {"step": torch.zeros((), device=counters), "exp_avg": m, "exp_avg_sq": v}
    return optimizer


def _followed(name: str, backend: str, task: Task, step: Step, **form: bool | None) -> Contestant:
    """A contestant whose PATS step is `step`, followed by torch's AdamW in this form, if the task has one."""
    if task.optimizer == "none":
        return Contestant(name, backend, "pats", step, task.tensors)
    optimizer = torch_adamw(task, **form)
    counters = [state["step"] for state in optimizer.state.values()]
    tensors = replace(task.tensors, steps=counters)
    return Contestant(name, backend, "pats, adamw", partial(_both, step, optimizer.step), tensors)


def _both(first: Step, second: Step) -> None:
    first()
    second()


def eager(task: Task) -> Contestant:
    """What a user would write first: a loop over the parameters, with each line of the formula, AdamW too."""
    rows = task.tensors.rows("none")

    @torch.no_grad()
    def step() -> None:
        for row in rows:
            update_(*row, task.h)

    return _followed("eager", "aten", task, step, foreach=False, fused=False)


def foreach(task: Task) -> Contestant:
    """What a careful user would write: few calls over all tensors, one call for the noise; AdamW likewise."""
    tensors = task.tensors
    sizes = [param.numel() for param in tensors.params]

    @torch.no_grad()
    def step() -> None:
        flat = torch.randn(sum(sizes), device=tensors.device)
        pairs = zip(flat.split(sizes), tensors.params, strict=True)
        noise = [z.view_as(param) for z, param in pairs]
        foreach_update_(
            tensors.params, tensors.grads, tensors.averages("none"), tensors.sens_stats, noise, task.h
        )

    return _followed("foreach", "aten", task, step, foreach=True)


def compiled(task: Task) -> Contestant:
    """`torch.compile` of the above in several ways, of which the fastest on this machine takes part.

    On a GPU the foreach form fuses horizontally. On a CPU it compiles for minutes and gains nothing, and
    inductor's own random numbers may be far slower than ATen's, which `fallback_random` keeps.

    If AdamW follows, each way is tried twice: with AdamW in the same graph, so that the compiler may do both
    in one pass, and with torch's fused AdamW after it.
    """
    makers: dict[str, Callable[[Task], Contestant]] = {
        "one tensor at a time": partial(_compiled_update, {}),
        "one tensor at a time, fallback_random": partial(_compiled_update, {"fallback_random": True}),
    }
    if task.tensors.device.type == "cuda":
        makers["foreach"] = _compiled_foreach
    if task.optimizer == "adamw":
        alone = {f"{name}, then fused AdamW": partial(_then_adamw, make) for name, make in makers.items()}
        makers = {f"{name}, AdamW in the graph": make for name, make in makers.items()} | alone
    ready = {name: make(task) for name, make in makers.items()}
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=GRAPHS):  # of one function: the ways share theirs
        taken, failed = _trials(ready, task.tensors.device)
    best = min(taken, key=lambda name: taken[name])
    return ready[best]._replace(configuration="; ".join([best, *failed]))


def _then_adamw(make: Callable[[Task], Contestant], task: Task) -> Contestant:
    """A step of PATS alone, followed by torch's fused AdamW."""
    made = make(task._replace(optimizer="none"))
    return _followed(made.name, made.backend, task, made.step, fused=True)


def _compiled_update(options: dict[str, Any], task: Task) -> Contestant:
    """`update_` compiled for flat tensors of any length. The longest runs first, as it sets the tuning."""
    rows = sorted(task.tensors.rows(task.optimizer), key=lambda row: -row[0].numel())
    flat_rows = [
        (param.view(-1), grad.view(-1), [average.view(-1) for average in state], stats)
        for param, grad, state, stats in rows
    ]

    @torch.compile(fullgraph=True, dynamic=True, options=options)
    def update(row: Row, corrections: Tensor | None) -> None:
        update_(*row, task.h, corrections)

    def step(corrections: Tensor | None) -> None:
        for row in flat_rows:
            update(row, corrections)

    return _in_one_graph(task, step)


def _compiled_foreach(task: Task) -> Contestant:
    """`foreach_update_` compiled as a whole, with its noise drawn in the same graph."""
    tensors = task.tensors
    averages = tensors.averages(task.optimizer)

    @torch.compile(fullgraph=True, dynamic=False)
    def update(corrections: Tensor | None) -> None:
        noise = [torch.randn_like(param, dtype=torch.float32) for param in tensors.params]
        foreach_update_(
            tensors.params, tensors.grads, averages, tensors.sens_stats, noise, task.h, corrections
        )

    return _in_one_graph(task, update)


def _in_one_graph(task: Task, update: Callable[[Tensor | None], None]) -> Contestant:
    """Compiles a step that takes AdamW's bias corrections as its argument, or None for PATS alone."""
    if task.optimizer == "none":
        return Contestant("compile", "inductor", "pats", torch.no_grad()(partial(update, None)), task.tensors)
    count = torch.zeros((), dtype=torch.float64, device=task.tensors.device)

    @torch.no_grad()
    def step() -> None:
        count.add_(1)
        update(bias_corrections(count, task.h))

    return Contestant("compile", "inductor", "pats_adamw", step, replace(task.tensors, steps=[count]))


def _trials(ready: dict[str, Contestant], device: torch.device) -> tuple[dict[str, float], list[str]]:
    """Each way's milliseconds. Ways that failed are left out and named; raises if all failed."""
    taken: dict[str, float] = {}
    failed: list[str] = []
    end = time.monotonic() + COMPILE_SECONDS[device.type]
    for name, made in ready.items():
        try:
            with limited(end - time.monotonic()):
                taken[name] = _trial(made.step, device)
        except Exception as error:
            failed.append(f"{name!r} failed: {type(error).__name__}: {str(error).strip()[:200]}")
    if not taken:
        raise RuntimeError("; ".join(failed))
    return taken, failed


def _trial(step: Step, device: torch.device) -> float:
    """A first measurement of a step's milliseconds, after it is compiled."""
    step()
    return median(milliseconds(step, device) for _ in range(TRIALS))


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread if the `with` block takes longer, as compilers may.

    It cannot interrupt a call into C, only act between such calls; a compiler makes many.
    """

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    if seconds <= 0:
        raise TimeoutError("no time was left for it")
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class NoOptimizer(Optimizer):
    """Has parameters but does not change them, so its step is only that of the PATS attached to it."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Does nothing."""


def fused(task: Task) -> Contestant:
    """This package as a user would use it: PATS alone, or with AdamW in one pass."""
    optimizer, keeper = _fused_optimizer(task.tensors.params, task)
    form = "pats" if task.optimizer == "none" else "pats_adamw"
    return _ours("fused", form, task, optimizer, keeper, _values(task))


def attached(task: Task) -> Contestant:
    """PATS attached to torch.optim.AdamW(fused=True): two passes."""
    optimizer = torch_adamw(task, fused=True)
    values = _values(task._replace(optimizer="none"))
    pats = PATS(optimizer, **_keywords(values), backend=task.backend)
    made = _ours("attached", "pats, adamw", task, optimizer, pats, values)
    counters = [state["step"] for state in optimizer.state.values()]
    return made._replace(tensors=replace(made.tensors, steps=made.tensors.steps + counters))


def moments(task: Task) -> Contestant:
    """PATSAdamW(sensitivity="moments"): one pass, with no state besides AdamW's."""
    values = _values(task, "moments")
    optimizer = _pats_adamw(task.tensors.params, values, task)
    return _ours("moments", "moments_adamw", task, optimizer, optimizer, values)


def _fused_optimizer(params: list[Tensor], task: Task) -> tuple[Optimizer, PATS | PATSAdamW]:
    """The optimizer to step, and the object that keeps the state."""
    values = _values(task)
    if task.optimizer == "none":
        optimizer = NoOptimizer(params)
        return optimizer, PATS(optimizer, **_keywords(values), backend=task.backend)
    optimizer = _pats_adamw(params, values, task)
    return optimizer, optimizer


def _pats_adamw(params: list[Tensor], values: Hyperparameters, task: Task) -> PATSAdamW:
    """On a GPU it can also be captured, like `torch_adamw`."""
    capturable = task.tensors.device.type == "cuda"
    return PATSAdamW(params, **_keywords(values), backend=task.backend, capturable=capturable)


def _values(task: Task, sensitivity: Sensitivity = "ema") -> Hyperparameters:
    """The task's hyperparameters for PATS alone, or for PATSAdamW."""
    if task.optimizer == "adamw":
        return replace(task.h, sensitivity=sensitivity)
    return Hyperparameters(**{name: getattr(task.h, name) for name in defaults_of(Hyperparameters)})


def _keywords(values: Hyperparameters) -> dict[str, Any]:
    return {name: getattr(values, name) for name in defaults_of(type(values))}


def _ours(
    name: str,
    form: str,
    task: Task,
    optimizer: Optimizer,
    keeper: PATS | PATSAdamW,
    values: Hyperparameters,
) -> Contestant:
    """A contestant of this package. `keeper` loads its state, which the first step would create otherwise."""
    tensors = task.tensors
    columns = {key: getattr(tensors, key) for key in keys_of(values) - {"step"}}
    columns["step"] = [torch.zeros(())] * len(tensors.params)
    state = {i: {key: column[i] for key, column in columns.items()} for i in range(len(tensors.params))}
    keeper.load_state_dict({**keeper.state_dict(), "state": state})
    if task.shared:
        for i, param in enumerate(tensors.params):
            keeper.state[param] |= {key: columns[key][i] for key in columns.keys() - {"step"}}
    own = {key: [keeper.state[param][key] for param in tensors.params] for key in columns}
    own["steps"] = own.pop("step")
    backend = backends.choose(task.backend, tensors.device)
    return Contestant(name, backend, form, optimizer.step, replace(tensors, **own))


def host_us_per_tensor(count: int, task: Task) -> float:
    """Microseconds of the host's time per tensor and step of the fused contestant: a step over `count`
    one-element tensors.

    A kernel has almost nothing to do for these, and nothing waits for a GPU or a second thread. Gradients
    move from step to step, as after `zero_grad`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    device = task.tensors.device
    params = [torch.ones(1, device=device) for _ in range(count)]
    gradients = [[torch.ones_like(param) for param in params] for _ in range(2)]
    optimizer, _ = _fused_optimizer(params, task)
    host = torch.device("cpu")
    taken = []
    for turn in range(HOST_STEPS):
        for param, grad in zip(params, gradients[turn % 2], strict=True):
            param.grad = grad
        taken.append(milliseconds(optimizer.step, host))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    torch.set_num_threads(threads)
    return 1e3 * median(taken) / count


_CONTESTANTS: dict[str, Callable[[Task], Contestant]] = {
    "eager": eager,
    "foreach": foreach,
    "compile": compiled,
    "attached": attached,
    "fused": fused,
    "moments": moments,
}
NAMES = tuple(_CONTESTANTS)
OURS = ("attached", "fused", "moments")
ADAMW_ONLY = ("attached", "moments")
MEANINGS = {  # of this package's, where AdamW follows
    "attached": "PATS attached to torch.optim.AdamW(fused=True), two passes",
    "fused": "PATSAdamW, one pass",
    "moments": "PATSAdamW(sensitivity='moments'), one pass and no state but AdamW's",
}

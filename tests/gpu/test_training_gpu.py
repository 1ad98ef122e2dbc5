"""Training loops on a GPU as users write them: beside torch's AdamW, or beside the same loop without the one
thing that is being proved.

Gradients are the same to the bit from run to run (`deterministic`), so that whatever differs is the step.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE, REHEARSAL, assert_same, backends, needs_gpu, synchronize
from torch import Tensor, nn

from pats_kernels import PATS, PATSAdamW, release_gradients

STEPS = 6
LR = 1e-3
NOISE = {"lr": LR, "noise_scale": 1e-3, "seed": 5}
SILENT = {"lr": LR, "noise_scale": 0.0}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    synchronize()


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(33, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 7)]
    return nn.Sequential(*layers).to(DEVICE, dtype)


def batch(t: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(16, 33, generator=torch.Generator().manual_seed(t)).to(DEVICE, dtype)


def loss_of(model: Callable[[Tensor], Tensor], t: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return model(batch(t, dtype)).float().square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS, first: int = 0) -> None:
    for t in range(first, first + steps):
        loss_of(model, t).backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: PATSAdamW) -> list[Tensor]:
    return [
        x.detach()
        for p in model.parameters()
        for x in (p, *(v for _, v in sorted(optimizer.state[p].items())))
    ]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    backend = "gloo" if REHEARSAL else "nccl"
    dist.init_process_group(backend, f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@backends
@pytest.mark.parametrize("sensitivity", ["ema", "moments"])
def test_without_noise_a_loop_is_adamws(sensitivity: Any, backend: str) -> None:
    """A few roundings of 2^-24 a step, that Adam's quotient makes visible where a gradient is near zero."""
    ours, theirs = network(), network()
    train(ours, PATSAdamW(ours.parameters(), **SILENT, sensitivity=sensitivity, backend=backend))
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=LR, fused=True))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=LR * 1e-2)


@backends
def test_noise_is_where_the_cpu_has_it(backend: str) -> None:
    """The same run with the reference on the CPU, from the same gradients."""
    model = network()
    optimizer = PATSAdamW(model.parameters(), **NOISE, backend=backend)
    copies = [nn.Parameter(p.detach().cpu().clone()) for p in model.parameters()]
    reference = PATSAdamW(copies, **NOISE, backend="eager")
    for t in range(STEPS):
        loss_of(model, t).backward()
        for copy, param in zip(copies, model.parameters(), strict=True):
            assert param.grad is not None
            copy.grad = param.grad.cpu()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    # Each step's noise is off by 2e-3 of z, and by 2^-11 of the gate times |z|, 6.7 at most. The weights
    # drift apart before the gates do.
    for param, copy in zip(model.parameters(), copies, strict=True):
        torch.testing.assert_close(param.cpu(), copy, rtol=1e-5, atol=STEPS * NOISE["noise_scale"] * 6e-3)
    ours, expected = optimizer.pats_summary(), reference.pats_summary()
    assert ours["nonfinite"] == expected["nonfinite"] == 0
    for key, value in expected.items():
        assert ours[key] == pytest.approx(value, rel=2e-3), key


@needs_gpu
@backends
@pytest.mark.parametrize("max_norm", [1e-3, 1e6])
def test_clipping_waits_for_nothing(max_norm: float, backend: str) -> None:
    """`clip_grad_norm_` and step without a synchronization; the weights are those of torch's clipping."""
    runs = []
    for own in (True, False):
        model = network()
        optimizer = PATSAdamW(model.parameters(), **NOISE, backend=backend)
        for t in range(STEPS):
            loss_of(model, t).backward()
            synchronize()
            torch.cuda.set_sync_debug_mode("error" if t else "default")
            try:
                if own:
                    optimizer.clip_grad_norm_(max_norm)
                else:
                    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                optimizer.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        runs.append([p.detach() for p in model.parameters()])
    # The gradients differ in a last bit, which goes through Adam's quotient and the gate.
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=LR * 1e-2)


@backends
def test_released_gradients(backend: str) -> None:
    runs = []
    for release in (True, False):
        model = network()
        optimizer = PATSAdamW(model.parameters(), **NOISE, backend=backend)
        if release:
            release_gradients(optimizer)
        train(model, optimizer)
        runs.append(state_of(model, optimizer))
    assert_same(*runs)


@needs_gpu
@backends
@pytest.mark.parametrize("sensitivity", ["ema", "moments"])
def test_a_whole_step_as_one_graph(sensitivity: Any, backend: str) -> None:
    """Forward, backward and step captured together, as torch's notes on CUDA graphs do it."""
    settings = {**NOISE, "sensitivity": sensitivity, "capturable": True, "backend": backend}
    plain = network()
    plain_optimizer = PATSAdamW(plain.parameters(), **settings)
    train(plain, plain_optimizer)
    model = network()
    optimizer = PATSAdamW(model.parameters(), **settings)
    given = batch(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for t in range(3):  # torch requires warm-up steps on another stream
            given.copy_(batch(t))
            optimizer.zero_grad()
            model(given).square().mean().backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        model(given).square().mean().backward()
        optimizer.step()
    for t in range(3, STEPS):
        given.copy_(batch(t))
        graph.replay()
    assert_same(state_of(model, optimizer), state_of(plain, plain_optimizer))


@needs_gpu
@backends
def test_a_compiled_loop(backend: str) -> None:
    """The step within what is compiled has the bits of the step beside it."""
    runs = []
    for inside in (True, False):
        torch.compiler.reset()
        model = network()
        optimizer = PATSAdamW(model.parameters(), **NOISE, backend=backend)
        compiled = torch.compile(model)

        def backward(x: Tensor, forward: Callable[[Tensor], Tensor] = compiled) -> None:
            forward(x).square().mean().backward()

        def whole(x: Tensor, model: nn.Module = model, optimizer: PATSAdamW = optimizer) -> None:
            model(x).square().mean().backward()
            optimizer.step()

        step = torch.compile(whole) if inside else backward
        for t in range(STEPS):
            step(batch(t))
            if not inside:
                optimizer.step()
            optimizer.zero_grad()
        runs.append([p.detach() for p in model.parameters()])
    # One run compiles the model alone, the other the whole step: gradients are rounded differently.
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=LR * 2e-2)


@backends
def test_a_checkpoint_goes_to_the_cpu_and_back(backend: str, tmp_path: Path) -> None:
    """Saved on the GPU, loaded on the CPU as it is, saved there, continued on the GPU: bit for bit."""
    model = network()
    optimizer = PATSAdamW(model.parameters(), **NOISE, backend=backend)
    train(model, optimizer, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "gpu.pt")

    there = network().cpu()
    on_cpu = PATSAdamW(there.parameters(), **NOISE)
    saved = torch.load(tmp_path / "gpu.pt", map_location="cpu", weights_only=True)
    there.load_state_dict(saved["model"])
    on_cpu.load_state_dict(saved["optimizer"])
    torch.save({"model": there.state_dict(), "optimizer": on_cpu.state_dict()}, tmp_path / "cpu.pt")

    back = network()
    continued = PATSAdamW(back.parameters(), **NOISE, backend=backend)
    saved = torch.load(tmp_path / "cpu.pt", weights_only=True)
    back.load_state_dict(saved["model"])
    continued.load_state_dict(saved["optimizer"])
    train(model, optimizer, 3, first=3)
    train(back, continued, 3, first=3)
    assert_same(state_of(model, optimizer), state_of(back, continued))


@needs_gpu
def test_parameters_on_two_devices() -> None:
    """One optimizer for a model split between CPU and GPU: each half as beside others on its own device."""
    start = [torch.randn(300), torch.randn(500)]
    both = [nn.Parameter(start[0].clone()), nn.Parameter(start[1].to(DEVICE))]
    cpu = [nn.Parameter(x.clone()) for x in start]
    gpu = [nn.Parameter(x.to(DEVICE)) for x in start]
    optimizers = [PATSAdamW(params, **NOISE) for params in (both, cpu, gpu)]
    for t in range(3):
        grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(t)) for x in start]
        for params in (both, cpu, gpu):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.to(param.device)
        for optimizer in optimizers:
            optimizer.step()
    assert_same([both[0].detach()], [cpu[0].detach()])
    assert_same([both[1].detach()], [gpu[1].detach()])


@backends
@pytest.mark.parametrize("own", [True, False], ids=["PATSAdamW", "PATS on fused AdamW"])
def test_fsdp2(own: bool, backend: str, process_group: None) -> None:
    """`fully_shard` on one process: the bits of the model as it is."""
    from torch.distributed.fsdp import fully_shard

    runs = []
    for sharded in (True, False):
        model = network()
        if sharded:
            fully_shard(model)
        if own:
            optimizer: torch.optim.Optimizer = PATSAdamW(model.parameters(), **NOISE, backend=backend)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
            PATS(optimizer, noise_scale=NOISE["noise_scale"], seed=5, backend=backend)
        train(model, optimizer)
        runs.append([p.detach().full_tensor() if sharded else p.detach() for p in model.parameters()])  # type: ignore[operator]
    assert_same(*runs)


@needs_gpu
@backends
@pytest.mark.parametrize("own", [True, False], ids=["PATSAdamW", "PATS on fused AdamW"])
def test_ddp_with_a_grad_scaler(own: bool, backend: str, process_group: None) -> None:
    """float16 autocast under DDP: the scaler's first steps overflow and are skipped, by all states alike."""
    runs = []
    for wrapped in (True, False):
        model = network()
        forward = nn.parallel.DistributedDataParallel(model, device_ids=[0]) if wrapped else model
        if own:
            optimizer: torch.optim.Optimizer = PATSAdamW(model.parameters(), **NOISE, backend=backend)
            pats: Any = optimizer
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
            pats = PATS(optimizer, noise_scale=NOISE["noise_scale"], seed=5, backend=backend)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
        skipped = 0
        for t in range(40):
            with torch.autocast("cuda", torch.float16):
                loss = loss_of(forward, t)
            scaler.scale(loss).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < before
            optimizer.zero_grad()
        assert 0 < skipped < 40
        for param in model.parameters():
            assert param.isfinite().all()
            assert int(pats.state[param]["step"]) == 40 - skipped
        runs.append([p.detach() for p in model.parameters()])
    assert_same(*runs)


# The Hugging Face Trainer


def trainer(folder: Path, optimizer: Any, settings: dict[str, Any], steps: int, **own: Any) -> Any:
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # an earlier Trainer leaves its setting there
    transformers = pytest.importorskip("transformers")
    transformers.set_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    random = torch.Generator().manual_seed(1)
    rows = [
        {"input_ids": torch.randint(50, (12,), generator=random), "labels": torch.tensor(i % 2)}
        for i in range(64)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=steps,
        max_grad_norm=1.0,
        report_to=[],
        save_steps=3,
        logging_steps=1,
        use_cpu=REHEARSAL,
        disable_tqdm=True,
        **own,
    )
    return transformers.Trainer(
        model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=(optimizer, settings)
    )


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_the_trainer_without_noise_is_adamws(precision: str, tmp_path: Path) -> None:
    if REHEARSAL and precision == "fp16":
        pytest.skip("there is no GPU: a rehearsal")
    own = {} if precision == "float32" else {precision: True}
    models = []
    for kind, settings in ((PATSAdamW, SILENT), (torch.optim.AdamW, {"lr": LR, "fused": True})):
        run = trainer(tmp_path, kind, settings, 5, save_strategy="no", **own)
        run.train()
        models.append(run.model)
    # Where a gradient is near zero, AdamW's quotient amplifies its last bits, to a few per cent of a step.
    off = [
        (a - b).abs().flatten() for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)
    ]
    every = torch.cat(off)
    assert every.max() <= LR, every.max()
    assert every.mean() <= LR * 1e-3, every.mean()


def test_the_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", PATSAdamW, NOISE, STEPS)
    whole.train()
    resumed = trainer(tmp_path / "resumed", PATSAdamW, NOISE, STEPS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == STEPS
    assert_same(*([p.detach() for p in run.model.parameters()] for run in (whole, resumed)))
    first = [row["loss"] for row in whole.state.log_history if "loss" in row]
    again = [row["loss"] for row in resumed.state.log_history if "loss" in row]
    assert first == again

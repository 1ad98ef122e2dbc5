"""What is allocated, to the byte: state and nothing else, and for a step nothing of a tensor's size."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import BACKENDS, INTERPRETED
from harness import LAYOUTS, filled
from test_backends import STORAGES, id_of
from torch import nn
from torch.optim import Optimizer

from benchmarks import memory
from benchmarks.common import timing
from pats_kernels import PATS, PATSAdamW, release_gradients

CPU = torch.device("cpu")
FUSED = [name for name in BACKENDS if name != "eager"]
SHAPE = (16, 64) if INTERPRETED else (256, 512)


class Nothing(Optimizer):
    """Its step is its hooks."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        pass


def attached(params: list[nn.Parameter], **keywords: Any) -> Optimizer:
    optimizer = Nothing(params)
    PATS(optimizer, **keywords)
    return optimizer


def moments(params: list[nn.Parameter], **keywords: Any) -> Optimizer:
    return PATSAdamW(params, sensitivity="moments", **keywords)


FORMS: dict[str, Callable[..., Optimizer]] = {"PATS": attached, "PATSAdamW": PATSAdamW, "moments": moments}


def temporaries(backend: str, form: str, dtype: torch.dtype, layout: str, **keywords: Any) -> int:
    """The most that a settled step holds beyond the state, in bytes."""
    params = [nn.Parameter(torch.randn(SHAPE).to(dtype)) for _ in range(2)]
    for param in params:
        param.grad = filled(layout, SHAPE, dtype, torch.randn(SHAPE))
    optimizer = FORMS[form](params, backend=backend, **keywords)
    for _ in range(2):
        optimizer.step()
    return timing.memory(optimizer.step, CPU).peak


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "state_dtype"), STORAGES[: 1 if INTERPRETED else None], ids=id_of)
def test_no_temporaries(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype, form: str, normalization: str
) -> None:
    state = None if state_dtype == torch.float64 else state_dtype  # float64's default
    held = temporaries(backend, form, dtype, "contiguous", state_dtype=state, normalization=normalization)
    assert held < 256


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("layout", ["holes"] if INTERPRETED else LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_no_temporaries_for_strides(backend: str, form: str, layout: str) -> None:
    """Gradients in another memory format are read where they lie."""
    assert temporaries(backend, form, torch.float32, layout) < 256


def test_the_check_can_fail() -> None:
    """The reference's temporaries are as big as tensors."""
    assert temporaries("eager", "PATS", torch.float32, "contiguous") > 4 * SHAPE[0] * SHAPE[1]


def test_state_to_the_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of elements: AdamW's two moments, PATS's two averages. Of tensors: AdamW's step, float32; PATS's own
    and its two statistics; `PATSAdamW` has one step for both."""
    path = tmp_path / "memory.json"
    (first, *_) = memory.trained(torch.float32)  # one of all: a profile of a backward pass takes seconds
    few = {"trained": lambda dtype: [first], "SEQUENCES": (1,), "TRAINED_DTYPES": (torch.float32,)}
    with patch.multiple(memory, **few):
        assert memory.main(["--model", "tiny", "--device", "cpu", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    numel, tensors, rows = report["params"], report["tensors"], report["results"]
    size = {"float32": 4, "bfloat16": 2, "float16": 2}
    pats = {"float32": 4, "bfloat16": 2, "float16": 4}  # of the averages, by default
    assert {row["dtype"] for row in rows} == set(size)
    for row in rows:
        moments_ = 2 * size[row["state_dtype"]] * numel
        expected, moved = {
            "AdamW": (moments_ + 4 * tensors, None),
            "AdamW(foreach=True)": (moments_ + 4 * tensors, None),
            "AdamW(fused=True)": (moments_ + 4 * tensors, 7 * size[row["dtype"]]),
            "AdamW(fused=True) + PATS": (
                moments_ + 2 * pats[row["dtype"]] * numel + (4 + 4 + 8) * tensors,
                10 * size[row["dtype"]] + 4 * pats[row["dtype"]],
            ),
            "PATSAdamW": (
                2 * moments_ + (4 + 8) * tensors,
                3 * size[row["dtype"]] + 8 * size[row["state_dtype"]],
            ),
            'PATSAdamW(sensitivity="moments")': (
                moments_ + (4 + 8) * tensors,
                3 * size[row["dtype"]] + 4 * size[row["state_dtype"]],
            ),
        }[row["optimizer"]]
        counters = 8 * tensors  # of the elements that were not finite, int64: diagnostics, not in state_dict
        assert expected <= row["state_bytes"] <= expected + counters, row
        assert row["moved_bytes"] == (None if moved is None else moved * numel), row
        fused = "fused" in row["optimizer"] or "PATS" in row["optimizer"]
        # A fused step holds the odd scalar; torch's others hold something as big as a tensor, or all of them.
        assert (row["temporary_bytes"] < 256) == fused, row
        if row["optimizer"] == "AdamW(foreach=True)":
            assert row["temporary_bytes"] >= numel * size[row["dtype"]], row
    for row in report["training"]:
        saved = row["peak_bytes"] - row["released_peak_bytes"]
        # Where logits are so much bigger than parameters, the peak comes before the first gradient.
        assert 0 <= saved <= numel * size[row["dtype"]], row
    assert [row["optimizer"] for row in report["training"]] == [first.name]
    printed = capsys.readouterr().out
    assert "bytes a parameter" in printed
    assert "saved" in printed


def test_released_gradients_are_never_held_together() -> None:
    """Of twenty layers: all gradients, or the last one and what backward itself holds of the one before."""
    width, layers = (16, 5) if INTERPRETED else (256, 20)
    held: dict[bool, int] = {}
    for released in (False, True):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        optimizer = PATSAdamW(model.parameters())
        if released:
            release_gradients(optimizer)
        batch = torch.randn(1, width)

        def step(
            model: nn.Module = model, optimizer: Optimizer = optimizer, batch: torch.Tensor = batch
        ) -> None:
            model(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(2):
            step()
        held[released] = timing.memory(step, CPU).peak
    gradient = 4 * width * width
    assert held[False] >= layers * gradient
    assert held[True] < 3 * gradient


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        memory.main(["--model", "no-such-model"])
    assert "Unknown model: 'no-such-model'" in capsys.readouterr().err

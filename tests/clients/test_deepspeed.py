"""DeepSpeed's ZeRO on two processes with gloo: whose noise is whose, and that a run resumes to the bit."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_same_bits
from torch import Tensor

STEPS, RANKS = 6, 2
SIGMAS = 5  # how far a statistic may be off; some hundred are tested


@dataclass(frozen=True)
class Case:
    stage: int
    kind: str = "fused"
    config: dict[str, Any] = field(default_factory=dict)


BFLOAT16: dict[str, Any] = {"bf16": {"enabled": True}}
ACCUMULATION: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES = {
    "stage 0": Case(0),
    "stage 0, attached, bfloat16": Case(0, "attached", BFLOAT16),
    "stage 1, attached": Case(1, "attached"),
    "stage 1, bfloat16, accumulation in float32": Case(1, config=BFLOAT16 | ACCUMULATION),
    "stage 2": Case(2),
    "stage 2, attached, bfloat16": Case(2, "attached", BFLOAT16),
    "stage 3": Case(3, config={"zero_optimization": {"stage": 3, "sub_group_size": 2000}}),
    "stage 3, attached": Case(3, "attached"),
}


def launch(script: str | Path, *arguments: str, folder: Path | None = None) -> str:
    """Runs a script, of this folder or elsewhere, on two processes in `folder`, and gives what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    file, root = Path(__file__).parent / script, Path(__file__).parents[2]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, str(file), *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def run(folder: Path, case: Case, resume: bool) -> list[dict[str, Any]]:
    """What each rank tells of it."""
    settings = folder / "settings.json"
    settings.write_text(json.dumps(vars(case) | {"resume": resume}))
    launch("deepspeed_script.py", str(settings))
    name = "resumed" if resume else "whole"
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(RANKS)]


def assert_independent(a: Tensor, b: Tensor) -> None:
    """Of the noise of two tensors: signs where both gates are open, and correlation."""
    size = min(a.numel(), b.numel())
    a, b = a[:size].double(), b[:size].double()
    both = (a != 0) & (b != 0)
    count = int(both.sum())
    assert count > 5
    agree = float((a[both].sign() == b[both].sign()).double().mean())
    assert abs(agree - 0.5) < SIGMAS * 0.5 / math.sqrt(count)
    products = a[both] * b[both]
    assert abs(float(products.sum())) < SIGMAS * float(products.square().sum().sqrt())


@pytest.mark.parametrize("name", CASES)
def test_noise_and_resume(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    whole = run(tmp_path, case, resume=False)
    for rank in whole:
        first, *others = rank["noise"]
        assert all(not tensor.any() for tensor in first)  # the means come from the step before
        assert all(tensor.any() for step in others for tensor in step)
        for step in others:
            for a, b in combinations(step, 2):
                if min(a.numel(), b.numel()) > 100:
                    assert_independent(a, b)
    for step in range(1, STEPS):
        for a, b in zip(*(rank["noise"][step] for rank in whole), strict=True):
            if case.stage == 0:
                assert torch.equal(a, b)  # replicas have the same noise
            elif a.numel() > 30:
                assert_independent(a, b)
    told = [message for rank in whole for message in rank["warnings"]]
    assert any("different tensors at the same place" in message for message in told) == (case.stage > 0)

    for rank, one in zip(run(tmp_path, case, resume=True), whole, strict=True):
        assert_same_bits(rank["tensors"], one["tensors"])
        for step, expected in zip(rank["noise"], one["noise"][STEPS // 2 :], strict=True):
            assert_same_bits(step, expected)


@pytest.mark.parametrize(("stage", "kind"), [(2, "fused"), (3, "attached")])
def test_trainer(stage: int, kind: str, tmp_path: Path) -> None:
    """The Trainer hands both ways to DeepSpeed, PATS steps as often, and a run resumes to the bit."""

    def results(folder: Path, *resume: str) -> list[dict[str, Any]]:
        launch("deepspeed_trainer.py", str(stage), kind, str(folder), *resume)
        return [torch.load(folder / f"result-{rank}.pt") for rank in range(RANKS)]

    whole = results(tmp_path / "whole")
    resumed = results(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    for one, other in zip(whole, resumed, strict=True):
        assert set(one["steps"]) == {4}
        assert_same_bits(other["state"], one["state"])
        assert_same_bits(other["model"], one["model"])


def test_the_page(tmp_path: Path) -> None:
    """docs/integrations.md: its script, by its commands."""
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    script = next(
        code for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "deepspeed" in code
    )
    commands = re.findall(r"^    DS_ACCELERATOR=cpu .* train\.py ?(\w*)$", page, re.M)
    assert commands == ["", "attached"]
    (tmp_path / "train.py").write_text(script + "import os\nos._exit(0)\n")
    for argument in commands:
        printed = launch(tmp_path / "train.py", *argument.split(), folder=tmp_path)
        assert "'train_loss'" in printed

"""Runs the Python of the documentation's pages, and compares its output with what the pages show.

Numbers may differ by what other CPUs round differently; each test has its tolerance. The text must be equal.
"""

import io
import os
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from processes import Pool
from torch import nn
from transformers import Trainer, TrainingArguments

from pats_kernels import PATSAdamW
from pats_kernels.optim import attached_to

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```\n(.*?)(?=^```python\n|\Z)", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
# A command of docs/distributed.md with its output, which is in a comment or indented below.
COMMAND = re.compile(
    r"^    OMP_NUM_THREADS=1 python -m torch\.distributed\.run --standalone --nproc_per_node (\d) "
    r"(\w+\.py)( resume)?(?: +# (\S+))?\n(?:\n((?:    rank .*\n)+))?",
    re.MULTILINE,
)


def blocks(page: str) -> list[tuple[str, list[str]]]:
    """A page's Python blocks in order, each with the indented lines that show its output."""
    found = []
    for code, rest in BLOCK.findall((ROOT / page).read_text()):
        shown = re.match(r"\n((?:    .*\n)+)", rest)
        found.append((code, shown.group(1).splitlines() if shown else []))
    return found


def assert_shows(shown: str, printed: str, **tolerance: float) -> None:
    """Compares a line of a page, in which "..." stands for anything, with the printed line."""
    text, numbers = NUMBER.split(shown.strip()), NUMBER.findall(shown)
    pattern = f"({NUMBER.pattern})".join(re.escape(t).replace(re.escape("..."), ".*?") for t in text)
    match = re.fullmatch(pattern, printed.strip())
    assert match, f"the page shows\n{shown}\nand its code prints\n{printed}"
    expected = pytest.approx(list(map(float, numbers)), **tolerance)
    assert list(map(float, match.groups())) == expected, (shown, printed)


@pytest.mark.parametrize(
    ("shown", "printed", "good"),
    [
        ("    {'a': '0.5', ..., 'b': -1e-05}", "{'a': '0.501', 'x': 3, 'b': -1.001e-05}", True),
        ("    {'a': '0.5', ..., 'b': -1e-05}", "{'a': '0.501', 'x': 3, 'b': 1.001e-05}", False),
        ("    {'a': '0.5', ..., 'b': -1e-05}", "{'a': '0.52', 'x': 3, 'b': -1e-05}", False),
        ("    {'a': '0.5', ..., 'b': -1e-05}", "{'a': '0.5', 'x': 3, 'c': -1e-05}", False),
    ],
)
def test_assert_shows(shown: str, printed: str, good: bool) -> None:
    if good:
        assert_shows(shown, printed, rel=0.01)
    else:
        with pytest.raises(AssertionError):
            assert_shows(shown, printed, rel=0.01)


def test_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """Runs docs/trainer.md from its first block to its last, as one script.

    To 0.2%: a few gradients are only rounding errors, such as those of attention's key biases, and so are
    their gates. Instruction sets and numbers of threads have made a difference of 0.02%.
    """
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    names: dict[str, Any] = {}
    compared = 0
    for code, shown in blocks("docs/trainer.md"):
        output = io.StringIO()
        with redirect_stdout(output):
            exec(compile(code, "docs/trainer.md", "exec"), names)
        printed = [line for line in output.getvalue().splitlines() if line.startswith("{'loss'")]
        if shown:
            assert len(printed) == len(shown)
            for line, own in zip(shown, printed, strict=True):
                assert_shows(line, own, rel=2e-3)
                compared += 1
    assert compared == 2


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs its snippets, given what they assume: a model, arguments, another optimizer."""
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 2)
    names: dict[str, Any] = {"Trainer": Trainer, "args": TrainingArguments(str(tmp_path)), "model": model}
    made: list[Any] = []
    for code, _ in blocks("README.md"):
        if "PATS(optimizer" in code:
            names["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-3)
        code = re.sub(r"^Trainer\(", "trainer = Trainer(", code, flags=re.MULTILINE)
        exec(compile(code, "README.md", "exec"), names)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        if "trainer" in names:
            names["optimizer"] = names.pop("trainer").create_optimizer()
        before = [param.detach().clone() for param in model.parameters()]
        names["optimizer"].step()
        assert not any(map(torch.equal, before, model.parameters()))
        made.append(names["optimizer"])
    assert [type(optimizer) for optimizer in made] == [PATSAdamW, PATSAdamW, torch.optim.AdamW]
    assert attached_to(made[2]) is not None


# docs/distributed.md.


@contextmanager
def in_folder(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_script(folder: str, script: str, arguments: list[str]) -> str:
    """Runs a script on this rank as torchrun would, with the process group of the pool."""
    output = io.StringIO()
    with (
        in_folder(folder),
        patch.object(sys, "argv", [script, *arguments]),
        patch.object(dist, "init_process_group"),
        patch.object(dist, "destroy_process_group"),
        redirect_stdout(output),
    ):
        runpy.run_path(script, run_name="__main__")
    return output.getvalue()


def test_distributed(pool: Pool, tmp_path: Path) -> None:
    """Runs the scripts by the commands of the page. Allows a unit in the last digit, which may round either
    way."""
    page = (ROOT / "docs/distributed.md").read_text()
    for name, code in re.findall(
        r"^`(\w+\.py)`[^\n]*\n\n```python\n(.*?)^```\n", page, re.MULTILINE | re.DOTALL
    ):
        (tmp_path / name).write_text(code)
    runs = [run for run in COMMAND.findall(page) if (tmp_path / run[1]).exists()]
    assert [run[:3] for run in runs] == [
        ("2", "ddp.py", ""),
        ("2", "fsdp.py", ""),
        ("3", "fsdp.py", " resume"),
        ("1", "fsdp.py", " resume"),
    ]
    for processes, script, arguments, comment, below in runs:
        outputs = pool(int(processes), run_script, str(tmp_path), script, arguments.split())
        printed = [line for output in outputs for line in output.splitlines()]
        shown = below.splitlines() or [comment]
        assert len(printed) == len(shown)
        digits = len(shown[0].rpartition(".")[2])
        for line, own in zip(shown, printed, strict=True):
            assert_shows(line, own, rel=0, abs=1.01 * 10**-digits)


# docs/conformance.md.


def names_of_tests(file: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)\(", (ROOT / "tests" / file).read_text(), re.MULTILINE))


def test_conformance() -> None:
    """Every test that the table names exists, every test of tests/test_conformance.py is in it, and every row
    has a test or a reason."""
    page = (ROOT / "docs/conformance.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    named = re.findall(r"`(?:([\w/]+\.py)::)?(test_\w+)`", page)
    missing = [name for file, name in named if name not in names_of_tests(file or "test_conformance.py")]
    assert missing == []
    assert {name for file, name in named if not file} == names_of_tests("test_conformance.py")
    categories = [cells for cells in rows[2:] if not cells[0].startswith("**")]
    assert len(categories) > 40
    assert [cells for cells in categories if len(cells) != 3 or not (cells[1] or cells[2])] == []

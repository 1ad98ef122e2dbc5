"""Without a compiler the package installs, works, and says what is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in str(finder)]  # this checkout's
import torch
from pats_kernels import PATS, available_backends
print(available_backends()["cpp"])
w = torch.ones(5, requires_grad=True)
w.grad = torch.ones(5)
optimizer = torch.optim.SGD([w], lr=0.0)
PATS(optimizer, normalization="exact", noise_scale=0.1, gamma=0.0)
optimizer.step()
assert not torch.equal(w, torch.ones(5))
try:
    PATS(torch.optim.SGD([w], lr=0.1), backend="cpp")
except RuntimeError as error:
    print(error)
"""


def test_installs_without_a_compiler(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    ignored = shutil.ignore_patterns(".venv", ".git", "build", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = os.environ | {"CC": "/bin/false", "CXX": "/bin/false"}
    subprocess.run([*command, "--target", str(site), str(source)], env=environment, check=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    missing, refusal = result.stdout.strip().splitlines()
    assert "C++ extension could not be loaded" in missing
    assert "backend='cpp' cannot run on cpu" in refusal
    assert "'eager'" in refusal


def test_lightning_is_asked_for_by_name() -> None:
    """Where neither of its packages is installed, and only by the module that needs it."""
    program = (
        "import sys, pats_kernels\n"
        "sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "import pats_kernels.lightning\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.stderr.strip().endswith(
        "ModuleNotFoundError: pats_kernels.lightning needs lightning or pytorch_lightning"
    )

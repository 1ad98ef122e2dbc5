"""The package installs with its extension if a compiler and torch are present, and else says what is missing.

Nothing is downloaded. The environments link to the packages of the one that runs the tests. setuptools, which
pip needs for isolated builds, is repacked from there.
"""

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("install")  # they share compiled objects

# The kernel takes long to compile, and its objects depend only on csrc/ and the flags. So it is compiled
# once, and without optimization for the instruction sets that these tests do not run.
COMPILER = """#!{python}
import hashlib, os, shutil, subprocess, sys
from pathlib import Path

command = ["c++", *sys.argv[1:]]
if "csrc/cpu_kernel.cpp" not in command:
    sys.exit(subprocess.run(command).returncode)
target = command.pop()
if "-DPATS_CHUNK=chunk_baseline" not in command:
    command.insert(command.index("-c"), "-O0")
kept = Path("{objects}", hashlib.sha256(" ".join(command).encode()).hexdigest())
if not kept.exists():
    status = subprocess.run([*command, f"{{kept}}.{{os.getpid()}}"]).returncode
    if status:
        sys.exit(status)
    os.replace(f"{{kept}}.{{os.getpid()}}", kept)
shutil.copy(kept, target)
"""
NO_COMPILER = """
import json, warnings
import torch
from pats_kernels import PATS, available_backends

def step(numel, **backend):
    w = torch.ones(numel, requires_grad=True)
    w.grad = torch.ones(numel)
    optimizer = torch.optim.SGD([w], lr=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PATS(optimizer, normalization="exact", noise_scale=0.1, gamma=0.0, **backend)
        optimizer.step()
    assert not torch.equal(w, torch.ones(numel))
    return [str(warning.message) for warning in caught]

few, many, again = step(10_000), step(10_001), step(10_001)
try:
    step(5, backend="cpp")
except RuntimeError as error:
    refused = str(error)
reason = available_backends()["cpp"]
print(json.dumps(dict(few=few, many=many, again=again, refused=refused, reason=reason)))
"""
OFFLINE = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_NO_CACHE_DIR": "1"}
OFFLINE |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "MAX_JOBS": "2", "PATS_KERNELS_ISA": "baseline"}
OFFLINE |= {"PATS_KERNELS_CUDA": "0"}  # minutes of nvcc, where there is one for this torch


class Environment:
    """A virtual environment with all packages of this one, except `without`."""

    def __init__(self, folder: Path, without: tuple[str, ...] = ()) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        self.packages = next((folder / "lib").glob("python*")) / "site-packages"
        for packages in map(Path, site.getsitepackages()):
            for entry in packages.iterdir() if packages.is_dir() else ():
                hidden = "pats_kernels" in entry.name or entry.name.split("-")[0] in without
                if not hidden and entry.suffix not in (".pth", ".so"):
                    (self.packages / entry.name).symlink_to(entry)

    def run(self, *arguments: object, **settings: str) -> str:
        done = self.attempt(*arguments, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def attempt(self, *arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
        command = [self.python, *map(str, arguments)]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        settings = kept | OFFLINE | settings
        return subprocess.run(
            command, cwd=self.packages.parent, env=settings, capture_output=True, text=True, check=False
        )

    def pip(self, *arguments: object, **settings: str) -> str:
        return self.run("-m", "pip", *arguments, **settings)

    def prove(self, bits: str, folder: Path | None = None) -> None:
        """The installed package, run in this folder, takes steps with its extension and gives these bits."""
        file, found = self.run(ROOT / "tests" / "installed.py").split()
        assert Path(file).is_relative_to(folder or self.packages)
        assert found == bits


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("compiler")
    wrapper = folder / "c++"
    wrapper.write_text(COMPILER.format(python=sys.executable, objects=folder))
    wrapper.chmod(0o755)
    return str(wrapper)


@pytest.fixture(scope="module")
def bits() -> str:
    """The digest of the steps with this checkout's own extension."""
    command = [sys.executable, ROOT / "tests" / "installed.py"]
    settings = os.environ | OFFLINE | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        command,
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.split()[1]


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel of this environment's setuptools."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    setuptools = distribution("setuptools")
    with zipfile.ZipFile(folder / f"setuptools-{setuptools.version}-py3-none-any.whl", "w") as wheel:
        for file in setuptools.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                wheel.write(file.locate(), str(file))
    return folder


def copied(folder: Path) -> Path:
    """A copy of the sources only."""
    left_out = [".venv*", ".git", "build", "dist", "runs", "*.so", "_build.py", "*.egg-info", "__pycache__"]
    left_out += [".*_cache", ".hypothesis", ".benchmarks"]
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out)))


def built_before(folder: Path) -> Path:
    """Sources with stale build products, in place and of a wheel."""
    source = copied(folder)
    built = source / "build" / f"lib.linux-x86_64-cpython-{sys.version_info[0]}{sys.version_info[1]}"
    for package in (source / "pats_kernels", *{built / "pats_kernels", build_lib(source) / "pats_kernels"}):
        package.mkdir(parents=True, exist_ok=True)
        for library in ("_C", "_CUDA"):
            (package / f"{library}.abi3.so").write_text("stale")
        (package / "_build.py").write_text("EXTENSION = CUDA = 'stale'\n")
    return source


def build_lib(source: Path) -> Path:
    program = "from setuptools import Distribution as D, Extension as E; b = D({'ext_modules': [E('a', [])]})"
    program += ".get_command_obj('build'); b.ensure_finalized(); print(b.build_lib)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return source / found.stdout.strip()


def contents(wheel: Path) -> dict[str, str]:
    """A wheel's contents for the package: the names, and the text of its Python files."""
    with zipfile.ZipFile(wheel) as opened:
        names = [name for name in opened.namelist() if name.startswith("pats_kernels/")]
        return {name: opened.read(name).decode() if name.endswith(".py") else "" for name in names}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_before(tmp_path_factory.mktemp("source") / "tree")


def test_without_isolation(tmp_path: Path, source: Path, compiler: str, bits: str) -> None:
    here = Environment(tmp_path)
    here.pip("install", "--no-deps", "--no-build-isolation", source, CXX=compiler)
    here.prove(bits)
    assert [file.name for file in here.packages.glob("pats_kernels/*.so")] == ["_C.abi3.so"]  # no stale _CUDA


def test_isolated(tmp_path: Path, source: Path, compiler: str, wheelhouse: Path, bits: str) -> None:
    """pip hides the environment's torch from the build, but the build finds it."""
    here = Environment(tmp_path)
    here.pip("install", "--no-deps", "--find-links", wheelhouse, source, CXX=compiler)
    here.prove(bits)


def test_sdist_to_wheel_to_step(tmp_path: Path, source: Path, compiler: str, bits: str) -> None:
    builder, here = Environment(tmp_path / "builder"), Environment(tmp_path / "here")
    program = "import os, sys; from setuptools.build_meta import build_sdist; os.chdir(sys.argv[1])"
    builder.run("-c", f"{program}; build_sdist(sys.argv[2])", source, tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    there = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()}
    there = {name for name in there if ".egg-info" not in name and name != ".gitignore"}
    made = {
        name for name in there if name.endswith((".so", "/_build.py")) or name.startswith(("build/", "site/"))
    }
    assert there - made - names == set()
    assert made & names == set()

    builder.pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist, CXX=compiler)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    files = contents(wheel)
    assert {"pats_kernels/_C.abi3.so", "pats_kernels/py.typed"} <= files.keys()  # compiled; typed
    assert "pats_kernels/_CUDA.abi3.so" not in files
    assert "stale" not in files["pats_kernels/_build.py"]
    here.pip("install", "--no-deps", wheel)
    here.prove(bits)


def test_editable(tmp_path: Path, compiler: str, bits: str) -> None:
    """In the source tree itself. A failed build removes the products of an earlier one."""
    source, here = built_before(tmp_path / "source"), Environment(tmp_path / "here")
    here.pip("install", "--no-deps", "--no-build-isolation", "--editable", source, CXX=compiler)
    here.prove(bits, source)
    assert not (source / "pats_kernels" / "_CUDA.abi3.so").exists()
    here.pip("install", "--no-deps", "--no-build-isolation", "--editable", source, CXX="/bin/false")
    failed = here.attempt(ROOT / "tests" / "installed.py")
    assert failed.returncode == 1
    assert "'/bin/false' could not compile" in failed.stderr
    assert f"Then build it with pip install --no-deps -e {source}" in failed.stderr


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/bin/false", "'/bin/false' could not compile csrc/cpu_kernel.cpp: exit status 1, and not a word"),
        ("no-such-c++", "'no-such-c++' cannot be run (No such file or directory): install one with C++17"),
    ],
)
def test_no_compiler(tmp_path: Path, source: Path, compiler: str, reason: str) -> None:
    here = Environment(tmp_path)
    here.pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source, CXX=compiler)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    files = contents(wheel)
    assert "pats_kernels/backends/native.py" in files
    assert not [name for name in files if name.endswith(".so")]
    here.pip("install", "--no-deps", wheel)
    said = json.loads(here.run("-c", NO_COMPILER))
    assert said["reason"] == (
        f"the C++ extension was not built: the compiler {reason}. Then build it with "
        "pip install --no-deps --force-reinstall --no-cache-dir <the clone of pats_kernels>"
    )
    assert said["few"] == said["again"] == []
    assert len(said["many"]) == 1
    assert said["reason"] in said["many"][0]
    assert said["refused"].startswith(f"backend='cpp' cannot run on cpu: {said['reason']}")
    assert said["refused"].endswith("Here these can: 'auto', 'eager'")


def test_required(tmp_path: Path, source: Path) -> None:
    """The reason is the last line of the build's output, and pip fails."""
    here = Environment(tmp_path)
    settings = OFFLINE | {"CXX": "/bin/false", "PATS_KERNELS_REQUIRE_EXTENSION": "1"}
    built = subprocess.run(
        [here.python, "setup.py", "build"],
        cwd=source,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 1
    last = built.stderr.strip().splitlines()[-1]
    assert last.startswith("pats_kernels: the C++ extension cannot be built: the compiler '/bin/false' could")
    installed = here.attempt("-m", "pip", "install", "--no-deps", "--no-build-isolation", source, **settings)
    assert installed.returncode == 1
    assert last in installed.stdout + installed.stderr


def test_no_linker(tmp_path: Path, source: Path) -> None:
    """With a compiler that makes objects but no libraries, the package builds without extension, and says
    so."""
    compiler, here = tmp_path / "c++", Environment(tmp_path / "here")
    compiler.write_text(
        '#!/bin/sh\nfor last; do :; done\ncase "$*" in *" -c "*) touch "$last" ;; *) exit 1 ;; esac\n'
    )
    compiler.chmod(0o755)
    here.pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source, CXX=str(compiler))
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    files = contents(wheel)
    assert not [name for name in files if name.endswith(".so")]
    assert "it could not be linked (" in files["pats_kernels/_build.py"]


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "there was no torch where it was built: install torch first"),
        ("2.9.1", "torch 2.9.1 is older than 2.10: install that or a newer one"),
    ],
)
def test_no_torch_or_an_old_one(
    tmp_path: Path, wheelhouse: Path, source: Path, version: str | None, reason: str
) -> None:
    here = Environment(tmp_path, without=("torch", "functorch", "torchgen"))
    if version is not None:
        (here.packages / "torch").mkdir()
        (here.packages / "torch" / "__init__.py").write_text("raise ImportError('never imported')\n")
        (here.packages / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = None\n")
    here.pip("wheel", "--no-deps", "--find-links", wheelhouse, "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert reason in contents(wheel)["pats_kernels/_build.py"]

"""What setup.py finds, refuses and leaves out, and what the package says about a missing library."""

import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch

from pats_kernels.backends import native

ROOT = Path(__file__).parent.parent
NVCC = """#!/bin/sh
case "$*" in
    *--dryrun*) echo "#$ TOP={root}" >&2 ;;
    *--version*) echo "Cuda compilation tools, release {version}, V{version}.48" ;;
    *--list-gpu-arch*) printf 'compute_%s\\n' 75 80 86 90 100 120 ;;
    *) for last; do :; done; echo "$*" >> {root}/calls; touch "$last" ;;
esac
"""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, without running its setup()."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    for name in ("TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_of_pats_kernels", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "present_gpus", list)
    return module


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake CUDA 13.0 whose nvcc writes down how it is called."""
    return fake_toolkit(tmp_path / "cuda", "13.0", monkeypatch)


def fake_toolkit(root: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    (root / "bin").mkdir(parents=True)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(root=root, version=version))
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(root))
    return root


def torch_of(build: ModuleType, cuda: str | None = "13.0") -> object:
    return build.Torch(Path(torch.__file__).parent, "2.13.0", cuda)


# ---- torch


def test_torch_is_found_without_an_import_of_it(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under build isolation: torch cannot be imported, but is in a folder where Python installs
    packages."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.10.0+cu130'\ncuda = '13.0'\n")
    monkeypatch.setattr(build, "find_spec", lambda _: None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path / name))
    monkeypatch.setattr(build.site, "getsitepackages", lambda: [str(tmp_path)])
    assert build.Torch.found() == (tmp_path / "torch", "2.10.0+cu130", "13.0")


@pytest.mark.parametrize(
    ("version", "old"), [("1.13.1", True), ("2.9.1+cu128", True), ("2.10.0a0+git1", False), ("3.0.0", False)]
)
def test_the_least_torch(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, old: bool
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = {version!r}\n")
    monkeypatch.setattr(build, "find_spec", lambda _: None)
    monkeypatch.setattr(build, "installed_packages", lambda: [str(tmp_path)])
    if old:
        with pytest.raises(build.Missing, match=r"is older than 2\.10: install that or a newer one"):
            build.Torch.found()
    else:
        assert build.Torch.found().version == version


# ---- nvcc


@pytest.mark.parametrize(
    ("version", "cuda", "reason"),
    [
        ("13.0", "12.4", r"nvcc is of CUDA 13\.0, torch 2\.13\.0 of 12\.4: set CUDA_HOME to a toolkit"),
        ("12.8", "13.0", r"nvcc is of CUDA 12\.8, torch 2\.13\.0 of 13\.0"),
        ("odd", "13.0", r"nvcc is of CUDA an unknown version, torch 2\.13\.0 of 13\.0"),
        ("13.0", None, r"torch was 2\.13\.0 where it was built, which is without CUDA: install one with it"),
    ],
)  # fmt: skip
def test_an_nvcc_that_does_not_go_with_torch(
    build: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    cuda: str | None,
    reason: str,
) -> None:
    fake_toolkit(tmp_path, version, monkeypatch)
    with pytest.raises(build.Missing, match=reason):
        build.Nvcc.found(torch_of(build, cuda))


def test_an_nvcc_of_the_same_major_version(build: ModuleType, toolkit: Path) -> None:
    assert build.Nvcc.found(torch_of(build, "13.2")) == (toolkit / "bin" / "nvcc", toolkit)


def test_no_nvcc(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.Missing, match="there was no nvcc: install CUDA 13's toolkit, or set CUDA_HOME"):
        build.Nvcc.found(torch_of(build))


def code(build: ModuleType) -> list[str]:
    flags = build.Nvcc.found(torch_of(build)).architectures()
    return [flag.rpartition("code=")[2] for flag in flags]


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", "sm_80 sm_90 sm_100 compute_100"),
        ("9.0", "sm_90"),
        ("8.0;9.0+PTX", "sm_80 sm_90 compute_90"),
        ("8.0, 9.0a", "sm_80 sm_90a"),
        ("Hopper", "sm_90"),
        ("Ampere+PTX", "sm_80 sm_86 compute_86"),
        ("Ada Blackwell", "sm_89 sm_100 sm_120"),
        ("All", "sm_80 sm_86 sm_90 sm_100 sm_120"),
    ],
)
def test_architectures(
    build: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch, listed: str, expected: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert code(build) == expected.split()


def test_an_unknown_architecture(build: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;Hoper")
    with pytest.raises(
        build.Missing, match="TORCH_CUDA_ARCH_LIST has 'Hoper'; known names: All, Ampere, Ada"
    ):
        code(build)


def test_the_gpus_that_are_there(build: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "present_gpus", lambda: ["8.0", "9.0"])
    assert code(build) == ["sm_80", "sm_90"]


# ---- what is compiled


class Compiled:
    """A build whose compilers are those of `toolkit` and one that only touches its target."""

    def __init__(self, build: ModuleType, folder: Path) -> None:
        compiler = folder / "c++"
        compiler.write_text(f'#!/bin/sh\nfor last; do :; done; echo "$*" >> {folder}/calls; touch "$last"\n')
        compiler.chmod(0o755)
        extensions = [setuptools.Extension(f"pats_kernels.{name}", []) for name in ("_C", "_CUDA")]
        self.command = build.BuildKernels(setuptools.Distribution({"ext_modules": extensions}))
        self.command.build_temp = str(folder / "temp")
        self.command.ensure_finalized()
        self.command.compiler = type("Compiler", (), {"compiler_so_cxx": [str(compiler)]})
        self.command.reasons = {"EXTENSION": None, "CUDA": None}
        with build.ThreadPoolExecutor(1) as pool:
            self.command.compile_all(torch_of(build), pool)
        self.calls = (folder / "calls").read_text().splitlines()
        self.cpu, self.cuda = self.command.extensions


def test_an_object_for_each_instruction_set(build: ModuleType, tmp_path: Path, toolkit: Path) -> None:
    done = Compiled(build, tmp_path)
    sets = ["baseline", "avx2", "avx512"] if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
    names = [Path(target).name for target in done.cpu.extra_objects]
    assert names == [f"cpu_kernel_{name}.o" for name in sets] + ["cpu_operator.o"]
    assert done.command.reasons["CUDA"] is None


@pytest.mark.parametrize("with_float64", [True, False])
def test_float64_can_be_left_out(
    build: ModuleType, tmp_path: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch, with_float64: bool
) -> None:
    monkeypatch.setenv("PATS_KERNELS_CUDA_FLOAT64", str(int(with_float64)))
    done = Compiled(build, tmp_path)
    names = {Path(target).name for target in done.cuda.extra_objects}
    dtypes = {"float32", "bfloat16", "float16", *(["float64"] if with_float64 else [])}
    assert names == {f"cuda_{dtype}.o" for dtype in dtypes} | {"cuda_operator.o"}
    (operator,) = [call for call in done.calls if "csrc/cuda.cpp" in call]
    assert ("-DPATS_NO_FLOAT64" in operator) != with_float64
    kernels = (toolkit / "calls").read_text().splitlines()
    assert sorted("launch_float64" in call for call in kernels) == [False] * 3 + [True] * with_float64


def test_cuda_can_be_left_out(
    build: ModuleType, tmp_path: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATS_KERNELS_CUDA", "0")
    done = Compiled(build, tmp_path)
    assert done.cuda.extra_objects == []
    assert done.cpu.extra_objects
    assert done.command.reasons["CUDA"] == "it was left out by PATS_KERNELS_CUDA=0: leave that unset"
    assert not (toolkit / "calls").exists()


def test_compilers_at_a_time(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found(Exception):
        pass

    def pool(workers: int) -> None:
        raise Found(workers)

    monkeypatch.setattr(build, "ThreadPoolExecutor", pool)
    command = build.BuildKernels(
        setuptools.Distribution({"ext_modules": [setuptools.Extension(name, []) for name in "ab"]})
    )
    command.ensure_finalized()
    monkeypatch.setenv("MAX_JOBS", "3")
    with pytest.raises(Found, match=r"^3$"):
        command.build_extensions()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there are no CUDA headers")
def test_the_cuda_operator_compiles(build: ModuleType, tmp_path: Path) -> None:
    """Also against a CPU build of torch, whose headers are the same."""
    nvcc = build.Nvcc.found(torch_of(build, real_cuda()))
    folders = [
        Path(torch.__file__).parent / "include",
        sysconfig.get_path("include"),
        *nvcc.folders("include"),
    ]
    includes = [part for folder in folders for part in ("-isystem", str(folder))]
    command = ["c++", *build.FLAGS, "-Werror", "-fsyntax-only", "-DUSE_CUDA", *includes, build.CUDA_OPERATOR]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def real_cuda() -> str:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return said.partition("release ")[2].partition(",")[0]


# ---- what the package says


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the package takes for its own."""
    folder = tmp_path / "pats_kernels"
    folder.mkdir()
    monkeypatch.setattr(native, "PACKAGE", folder)
    for name in ("pats_kernels._C", "pats_kernels._build"):
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name, ModuleType(name)))  # put back afterwards
    return folder


ELSEWHERE = "build it with pip install --no-deps --force-reinstall --no-cache-dir <the clone of pats_kernels>"


def test_never_built(package: Path) -> None:
    (package.parent / "setup.py").touch()
    assert native.load("_C", native.EXTENSION) == (
        f"the C++ extension was never built in {package}, which is a source tree: build it with pip install "
        f"--no-deps -e {package.parent}, or start Python elsewhere to import the package that is installed"
    )


def test_not_built_says_why(package: Path) -> None:
    (package / "_build.py").write_text("EXTENSION = 'no compiler'\nCUDA = 'no nvcc'\n")
    assert native.load("_C", native.EXTENSION) == (
        f"the C++ extension was not built: no compiler. Then {ELSEWHERE}"
    )
    library = "the library of CUDA kernels"
    assert native.load("_CUDA", library) == f"{library} was not built: no nvcc. Then {ELSEWHERE}"


def test_built_and_gone(package: Path) -> None:
    (package / "_build.py").write_text("EXTENSION = CUDA = None\n")
    assert native.load("_C", native.EXTENSION) == f"the C++ extension is gone: {ELSEWHERE}"


def test_garbage(package: Path) -> None:
    (package / "_C.abi3.so").write_text("garbage")
    reason = native.load("_C", native.EXTENSION)
    assert reason is not None
    assert reason.startswith(f"the C++ extension is there, but torch {torch.__version__} cannot load it (")
    assert reason.endswith(f"it needs torch 2.10 or newer. Install that, or {ELSEWHERE}")


def test_linked_to_a_library_that_is_gone(package: Path) -> None:
    """As when the extension's torch is gone: the loader names the missing library."""
    source, gone = package / "x.c", package / "libgone.so"
    source.write_text("int gone(void); int x(void) { return gone(); }\n")
    (package / "gone.c").write_text("int gone(void) { return 0; }\n")
    shared = ["cc", "-shared", "-fPIC"]
    subprocess.run([*shared, str(package / "gone.c"), "-o", str(gone)], check=True)
    linked = [str(source), f"-L{package}", "-lgone", "-o", str(package / "_C.abi3.so")]
    subprocess.run([*shared, *linked], check=True)
    gone.unlink()
    reason = native.load("_C", native.EXTENSION)
    assert reason is not None
    assert "libgone.so" in reason
    assert reason.startswith(f"the C++ extension is there, but torch {torch.__version__} cannot load it (")


def test_another_trees_library_is_not_taken(package: Path) -> None:
    """An editable installation's finder, or anything else that imports `pats_kernels._C`, is not asked."""
    assert native.MISSING is None
    assert importlib.util.find_spec("pats_kernels._C") is not None
    reason = native.load("_C", native.EXTENSION)
    assert reason is not None
    assert "never built" in reason


def test_the_sanitizers_find_their_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in another folder, with another build of the package; here it is the source's."""
    monkeypatch.syspath_prepend(str(Path(__file__).with_name("native")))
    sanitize = importlib.import_module("sanitize")
    sanitize.run_tests(tmp_path, sanitize.TESTS, {}, "--collect-only")

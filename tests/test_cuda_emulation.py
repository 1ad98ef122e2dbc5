"""The CUDA kernels' source, run on the CPU and compared with the oracle: tests indexing without a GPU.

tests/cuda_emulation/ replaces CUDA: threads are fibers, and barriers and shuffles really wait. It does not
cover the GPU's approximate instructions (tests/gpu/) nor the compiled code (test_cuda_build.py).
"""

import ctypes
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NO_EXTENSION
from cuda_operator import Arguments, operator
from harness import assert_same_bits

# The tests of every backend, here with this file's fixture.
from test_adamw import (  # noqa: F401
    test_a_learning_rate_on_the_device,
    test_a_noise_scale_on_the_device,
    test_groups_of_all_kinds_share_a_launch,
    test_hyperparameters_of_adamw,
    test_it_is_pats_attached_to_adamw,
)
from test_adamw import test_anything as test_adamw_with_anything  # noqa: F401
from test_adamw import test_layouts as test_adamw_layouts  # noqa: F401
from test_adamw import test_nonfinite_gradients as test_adamw_nonfinite_gradients  # noqa: F401
from test_adamw import test_round_to_nearest as test_adamw_round_to_nearest  # noqa: F401
from test_adamw import test_shapes as test_adamw_shapes  # noqa: F401
from test_adamw import test_variants as test_adamw_variants  # noqa: F401
from test_backends import (  # noqa: F401
    test_a_sensitivity_that_overflows_never_enters,
    test_anything,
    test_bfloat16_is_held_to_the_bit,
    test_big_tensor,
    test_counters,
    test_found_inf_changes_nothing,
    test_grad_scale,
    test_hyperparameters_of_each_tensor,
    test_late_steps,
    test_layouts,
    test_loss_scale_changes_nothing,
    test_mixed_layouts,
    test_mixed_layouts_in_one_launch,
    test_nonfinite_gradients,
    test_nonfinite_gradients_everywhere,
    test_offsets_beyond_31_bits,
    test_round_to_nearest,
    test_shapes,
    test_variants,
)
from test_edges import (  # noqa: F401
    test_a_closed_gate_moves_nothing,
    test_a_closed_gate_with_adamw,
    test_a_power_of_two_changes_nothing,
    test_adamw_without_eps,
    test_any_gamma_at_any_level,
    test_moments_of_a_layer_that_is_never_used,
    test_no_noise_once_the_statistics_are_gone,
    test_subnormal_weights_and_gradients,
    test_where_statistics_begin_and_end,
)
from test_guard_pages import test_adamw as test_guard_pages_of_adamw  # noqa: F401
from test_guard_pages import test_pats as test_guard_pages  # noqa: F401
from test_rounding import (  # noqa: F401
    test_each_element_has_its_own_bits,
    test_every_store_is_the_model,
    test_the_bits_are_those_of_seed_step_and_tensor,
)
from test_shards import FORMS as STEPPED
from test_shards import STORAGES as STORED
from test_shards import (  # noqa: F401
    step,
    tensors_of,
    test_a_share_that_is_not_counted,
    test_an_empty_shard_has_an_empty_share,
    test_parts_are_what_the_whole_is,
    test_the_noise_is_that_of_the_numbers,
)

from pats_kernels.backends import cuda

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
    pytest.mark.xdist_group("cuda emulation"),  # compiled in one of xdist's processes
]
ROOT = Path(__file__).parent.parent
DTYPES = {
    torch.float32: "float",
    torch.bfloat16: "Bfloat16",
    torch.float16: "Float16",
    torch.float64: "double",
}


def compiled(dtype: torch.dtype, folder: Path) -> Any:
    """The kernels for parameters of `dtype`, as a function on the host."""
    library = folder / f"{DTYPES[dtype]}.so"
    command = ["g++", "-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-shared", "-fPIC", f"-DPATS_PARAM={DTYPES[dtype]}", "-DPATS_LAUNCH=launch_it"]
    command += [f"-I{ROOT / 'tests' / 'cuda_emulation'}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(
        [*command, str(ROOT / "tests/cuda_emulation/emulation.cpp"), "-o", str(library)], check=True
    )
    return ctypes.CDLL(str(library)).launch


@pytest.fixture(scope="module")  # no longer: "auto" would take it in other tests of the process
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """ "cuda" on the CPU: the operator of csrc/cuda.cpp, with the emulated kernels."""
    folder = tmp_path_factory.mktemp("cuda_emulation")
    with ThreadPoolExecutor(2) as pool:
        kernels = dict(zip(DTYPES, pool.map(lambda dtype: compiled(dtype, folder), DTYPES), strict=True))

    def launch_(given: Arguments) -> None:
        flags = (given.stochastic_rounding, len(given.layout) > 0, given.plain)
        tables = (given.table, given.layout, given.chunks, given.starts, given.partials)
        tensors = [ctypes.c_void_p(t.data_ptr()) for t in tables]
        sizes = (ctypes.c_int64(len(given.chunks)), ctypes.c_int64(len(given.table)))
        scaler = [
            ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (given.grad_scale, given.found_inf)
        ]
        enums = given.enums().values()
        assert kernels[given.param_dtype](*enums, *flags, *tensors, *sizes, *scaler) == 0

    with operator(launch_):
        yield "cuda"


@pytest.mark.skipif(
    platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="the CPU's kernel has no fused multiply-add here",
)
@pytest.mark.skipif(NO_EXTENSION, reason="there is no cpp")
@pytest.mark.parametrize("scale", [None, 2.0**3])
@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("form", STEPPED)
def test_averages_and_moments_have_the_cpu_s_bits(
    backend: str, form: str, storage: str, scale: float | None
) -> None:
    """The formula, its order and the random bits are the same. Only the noise depends on the backend."""
    grad_scale = None if scale is None else torch.tensor(scale)
    found = []
    for name in (backend, "cpp"):
        tensors = tensors_of((1030,), *STORED[storage])
        tensors["grads"] *= scale or 1
        step(name, tensors, None, STEPPED[form], torch.tensor([0.9, 1.1]), grad_scale)
        found.append([tensors[key] for key in ("exp_avg_sens", "exp_avg_unc", "exp_avg", "exp_avg_sq")])
    assert_same_bits(*found)


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One reason each: a missing library, another device, no GPU."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "MISSING", "a build without CUDA")
    assert cuda.unavailable(gpu) == "a build without CUDA"
    monkeypatch.setattr(cuda, "MISSING", None)
    assert cuda.unavailable(cpu) == "it runs on GPUs, not on cpu"
    assert cuda.unavailable(gpu) == "there is no GPU"


def test_the_chunk_is_the_same_in_both_languages() -> None:
    header = (ROOT / "csrc" / "cuda_kernel.h").read_text()
    assert re.findall(r"kChunk = (\d+);", header) == [str(cuda.CHUNK)]

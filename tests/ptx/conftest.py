"""How many of the backends' tests run on machine code.

By default: on one architecture, and of each test every n-th combination of parameters, from another start
in each test. `make test-ptx` (PATS_PTX=80,90,100) runs all.
"""

import os
from collections import defaultdict

import pytest

ARCHITECTURES = [int(arch) for arch in os.environ.get("PATS_PTX", "90").split(",")]
SHARES = (
    {} if "PATS_PTX" in os.environ else {"test_triton.py": 12, "test_cuda.py": 40, "test_tolerances.py": 3}
)
LONG = {  # each takes half a minute or more
    "test_averages_do_not_stand_still_of_rounding",
    "test_small_noise_adds_up_of_rounding",
    "test_bfloat16_moments_do_not_stand_still_of_adamw",
    "test_a_layer_that_is_never_used_of_edges",
}


@pytest.fixture(params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}", scope="module")
def arch(request: pytest.FixtureRequest) -> int:
    return request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.path.parent.name == "ptx" and item.path.name in SHARES:
            tests[item.path.name, getattr(item, "originalname", item.name)].append(item)
    left_out = {item for item in items if SHARES and getattr(item, "originalname", "") in LONG}
    for number, ((file, _), each) in enumerate(tests.items()):
        chosen = number % min(SHARES[file], len(each))
        left_out.update(item for i, item in enumerate(each) if i % SHARES[file] != chosen)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]

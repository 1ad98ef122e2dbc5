"""How much of the tests of the backends is run on machine code: for one architecture, of each test's
parameters every third, others for each test. PATS_PTX=80,90,100, which is `make test-ptx`, asks for all."""

import os
from collections import defaultdict

import pytest

ARCHITECTURES = [int(arch) for arch in os.environ.get("PATS_PTX", "90").split(",")]
SHARE = 1 if "PATS_PTX" in os.environ else 3
REPEATED = ("test_triton.py", "test_cuda.py")


@pytest.fixture(params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}", scope="module")
def arch(request: pytest.FixtureRequest) -> int:
    return request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if SHARE == 1:
        return
    tests: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.path.parent.name == "ptx" and item.path.name in REPEATED:
            tests[item.path.name, getattr(item, "originalname", item.name)].append(item)
    left_out: set[pytest.Item] = set()
    for number, each in enumerate(tests.values()):
        chosen = number % min(SHARE, len(each))
        left_out.update(item for i, item in enumerate(each) if i % SHARE != chosen)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]

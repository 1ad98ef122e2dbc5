"""The project's tests of a backend, to be collected once more for another backend."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent.parent
MODULES = ("test_backends", "test_adamw", "test_rounding", "test_shards", "test_edges")
EXAMPLES = 4  # for each hypothesis test: the interpreter is too slow for more


def of_backends(name: str, where: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The tests of a module that take a backend, with names and settings of hypothesis of their own.

    Args:
        where: what tells these copies from others.
    """
    module = _imported(name, where)
    for test, function in vars(module).items():
        inner = getattr(getattr(function, "hypothesis", None), "inner_test", function)
        if test.startswith("test_") and "backend" in inspect.signature(inner).parameters:
            yield f"{test}_of_{name.removeprefix('test_')}", function


def _imported(name: str, where: str) -> ModuleType:
    before = settings.get_current_profile_name()
    settings.register_profile(
        "ptx", settings.get_profile(before), max_examples=EXAMPLES, suppress_health_check=list(HealthCheck)
    )
    settings.load_profile("ptx")  # hypothesis reads it when a test is decorated
    try:
        spec = importlib.util.spec_from_file_location(f"{name}_on_{where}", TESTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        settings.load_profile(before)
    return module

"""torch.ops.pats_kernels.step_ in the dispatcher, and the table row that Python and C++ share."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pats_kernels import available_backends
from pats_kernels.hyperparameters import Hyperparameters
from pats_kernels.plan import OPERANDS, Column

CSRC = Path(__file__).parent.parent / "csrc"


class Operands(list[Any]):
    """The operator's arguments, and the tensors in its table: those that it writes, and the gradient."""

    def __init__(self, arguments: list[Any], written: list[Tensor], read: list[Tensor]) -> None:
        super().__init__(arguments)
        self.written, self.read = written, read


@pytest.fixture
def arguments() -> Operands:
    """One tensor of 100 elements and its tables."""
    assert available_backends("cpu")["cpp"] is None
    param, sens, unc = torch.ones(100), torch.rand(100), torch.rand(100)
    grad, stats = torch.rand(100), torch.ones(2)
    table = torch.zeros((1, len(Column)), dtype=torch.int64)
    addresses = {
        Column.PARAM: param,
        Column.GRAD: grad,
        Column.SENS: sens,
        Column.UNC: unc,
        Column.STATS: stats,
        Column.SHARE: stats,
    }
    for column, tensor in addresses.items():
        table[0, column] = tensor.data_ptr()
    table[0, Column.NUMEL] = table[0, Column.WHOLE] = 100
    table[0, Column.STEP] = 1
    numbers = torch.tensor(Hyperparameters(noise_scale=0.1).numbers, dtype=torch.float64)
    table.view(torch.float64)[0, Column.NOISE_SCALE :][: len(numbers)] = numbers
    layout = torch.zeros((0, 2 + OPERANDS), dtype=torch.int64)
    dtypes = (torch.float32, torch.float32)
    variant = ("pats", "product", "one_pass", True)
    # The table's addresses keep nothing alive.
    return Operands([table, layout, *dtypes, *variant, None, None], [param, sens, unc, stats], [grad])


def test_schema_and_fake_kernel(arguments: Operands) -> None:
    """The dispatcher accepts its schema, and its fake kernel traces."""
    torch.library.opcheck(
        torch.ops.pats_kernels.step_.default, tuple(arguments), test_utils=("test_schema", "test_faketensor")
    )


def test_it_updates_what_the_table_names(arguments: Operands) -> None:
    before = [tensor.clone() for tensor in arguments.written]
    torch.ops.pats_kernels.step_(*arguments)
    assert all(not torch.equal(a, b) for a, b in zip(before, arguments.written, strict=True))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "table",
    [
        torch.zeros((1, 3), dtype=torch.int64),
        torch.zeros(len(Column), dtype=torch.int64),
        torch.zeros((2, 2 * len(Column)), dtype=torch.int64)[:, ::2],
        torch.zeros((1, len(Column))),
    ],
)
def test_tables_of_another_version(arguments: Operands, which: int, table: Tensor) -> None:
    arguments[which] = table
    with pytest.raises(RuntimeError, match="tables are not this version's"):
        torch.ops.pats_kernels.step_(*arguments)


def test_the_row_is_the_same_in_both_languages() -> None:
    """The fields of csrc/table.h's RowOf, in order, are the names of `Column`."""
    struct = re.search(r"struct RowOf \{(.*?)\};", (CSRC / "table.h").read_text(), re.DOTALL)
    assert struct is not None
    fields = re.findall(r"^\s*[\w ]+?[ *]+(\w+);", struct.group(1), re.MULTILINE)
    assert fields == [column.name.lower() for column in Column]


def test_the_dimension_is_the_same_in_both_languages() -> None:
    struct = re.search(r"struct Dimension \{\s*int64_t (.*?);", (CSRC / "table.h").read_text())
    assert struct is not None
    operands = [column.name.lower() for column in list(Column)[:OPERANDS]] + ["number"]
    assert struct.group(1).split(", ") == ["size", *operands]


@pytest.mark.parametrize("number", [torch.ones(1, dtype=torch.float64), torch.ones(2)])
@pytest.mark.parametrize("which", [8, 9])
def test_numbers_of_a_scaler_are_one_float32_each(arguments: Operands, which: int, number: Tensor) -> None:
    arguments[which] = number
    with pytest.raises(RuntimeError, match="grad_scale and found_inf must be one float32 each"):
        torch.ops.pats_kernels.step_(*arguments)


@pytest.mark.parametrize(
    ("which", "value", "said"),
    [
        (2, torch.int32, "no kernel for"),
        (4, "sgd", "form sgd"),
        (5, "x", "uncertainty x"),
        (6, "x", "phase x"),
    ],
)
def test_names_that_no_kernel_has(arguments: Operands, which: int, value: Any, said: str) -> None:
    arguments[which] = value
    with pytest.raises(RuntimeError, match=said):
        torch.ops.pats_kernels.step_(*arguments)


def test_it_refuses_copies(arguments: Operands) -> None:
    """A compiled graph would pass copies of what it writes, and write those back over its results."""
    before = [tensor.clone() for tensor in arguments.written]

    def function(table: Tensor) -> None:
        torch.ops.pats_kernels.step_(table, *arguments[1:])

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"step_ writes through the addresses .* torch.compiler.disable"):
        torch.compile(function, backend="aot_eager")(arguments[0])
    with pytest.raises(RuntimeError, match=r"step_ writes through the addresses"):
        torch.func.functionalize(function)(arguments[0])
    assert all(torch.equal(a, b) for a, b in zip(before, arguments.written, strict=True))
    disabled = torch.compiler.disable(function)
    torch.compile(lambda table: disabled(table), backend="aot_eager")(arguments[0])
    assert all(not torch.equal(a, b) for a, b in zip(before, arguments.written, strict=True))

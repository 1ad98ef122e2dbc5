"""Bugs planted into the machine code: each kind is caught, by the checks of memory or by the numbers."""

import re
from collections.abc import Callable

import pytest
import torch
from harness import Case, run_checked

from pats_kernels import PATSAdamW
from pats_kernels.plan import Column
from ptx.memory import Fault
from ptx.triton_driver import Settings, emulated

Plant = Callable[[str, str], str]

TAIL = Case(shapes=[(1003,)])  # contiguous, ends inside a block: the masked path
FULL = Case(shapes=[(8192,)])
STRIDED = Case(shapes=[(37, 29)], param="transposed")
BFLOAT16 = Case(shapes=[(8192,)], dtype=torch.bfloat16)
BARRIER = r"bar\.sync\s+0;"


def replaced(pattern: str, by: str, kernel: str = "pats_kernel", which: int | None = None) -> Plant:
    """Changes what the pattern finds in that kernel: the occurrence `which`, or all."""

    def plant(name: str, text: str) -> str:
        if name != kernel:
            return text
        found = list(re.finditer(pattern, text, re.M))
        chosen = found if which is None else [found[which]]
        assert chosen, pattern
        for match in reversed(chosen):
            text = text[: match.start()] + match.expand(by) + text[match.end() :]
        return text

    return plant


def caught(case: Case, plant: Plant, errors: type[Exception] | tuple[type[Exception], ...]) -> str:
    """The words in which the planted bug is caught. The same case without it passes."""
    with emulated(90) as settings:
        run_checked("triton", case)
        settings.plant = plant
        with pytest.raises(errors) as info:
            run_checked("triton", case)
    return str(info.value)


def test_an_index_off_by_one_at_a_tail() -> None:
    """ "Below the length" becomes "not above it": one element too many."""
    off_by_one = replaced(r"setp\.lt\.s32(\s+%p\d+, %r\d+, %r\d+;)", r"setp.le.s32\1")
    message = caught(TAIL, off_by_one, Fault)
    assert re.search(r"out of bounds: 4 bytes after the end of \w+ 0", message)
    assert "triton_kernel.py:" in message


@pytest.mark.parametrize("access", ["ld", "st"])
def test_a_missing_mask(access: str) -> None:
    """The tail's accesses of tensors lose their predicates."""
    unmasked = replaced(rf"@%p\d+ ({access}\.global\.b32 )", r"\1")
    assert "out of bounds" in caught(TAIL, unmasked, Fault)


def test_swapped_halves_of_a_pair() -> None:
    """bfloat16 are joined to pairs by a byte permutation; here the second comes first."""
    swapped = replaced(r"0x7632U?;", "0x3276;", which=0)
    assert "of 8192 elements" in caught(BFLOAT16, swapped, AssertionError)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("cos.approx.ftz.f32", "sin.approx.ftz.f32"),
        ("lg2.approx.ftz.f32", "sqrt.approx.ftz.f32"),
        ("tanh.approx.f32", "ex2.approx.f32"),
        ("rcp.approx.ftz.f32", "rsqrt.approx.ftz.f32"),
        ("mul.wide.u32", "mul.wide.s32"),  # in a Philox round
    ],
)
def test_a_wrong_instruction(right: str, wrong: str) -> None:
    message = caught(FULL, replaced(re.escape(right), wrong), AssertionError)
    assert re.search(r"step \d, tensor 0: w: \d+ of 8192 elements", message)


def test_a_wrong_bit_of_a_constant() -> None:
    """The multiplier of 2^-32 that makes uniforms of words, off by its last bit but three: below every
    tolerance; and off by a part in a thousand: not."""
    with emulated(90) as settings:
        settings.plant = replaced("0f2F800000", "0f2F800008")
        run_checked("triton", FULL)
    caught(FULL, replaced("0f2F800000", "0f2F820000"), AssertionError)


@pytest.mark.parametrize("kernel", ["pats_kernel", "statistics_kernel"])
def test_missing_barriers(kernel: str) -> None:
    """All of a kernel's."""
    message = caught(FULL, replaced(BARRIER, "", kernel), Fault)
    assert re.search("race|nobody has written", message)


def barriers_of_the_statistics(settings: Settings) -> int:
    """Of the kernel as it is for counters in tensors."""
    two_steps()
    texts: list[str] = []

    def note(name: str, text: str) -> str:
        texts.extend([text] if name == "statistics_kernel" else [])
        return text

    settings.plant = note
    two_steps()
    return len(re.findall(BARRIER, texts[0]))


def two_steps() -> None:
    """Of an optimizer: with counters of steps and of elements that are not finite in tensors."""
    param = torch.nn.Parameter(torch.linspace(-1, 1, 8192))
    optimizer = PATSAdamW([param], lr=1e-3, backend="triton")
    for scale in (0.5, 2.0):
        param.grad = scale * param.detach().flip(0)
        optimizer.step()


def test_any_missing_barrier_of_the_statistics() -> None:
    """Each one by itself is needed."""
    with emulated(90) as settings:
        barriers = barriers_of_the_statistics(settings)
        assert barriers > 5
        for i in range(barriers):
            settings.plant = replaced(BARRIER, "", "statistics_kernel", which=i)
            with pytest.raises(Fault, match=r"race|nobody has written"):
                two_steps()


def test_a_race_on_the_partial_sums() -> None:
    """All chunks write theirs to the first one's place."""
    first_place = replaced(r"(mad\.wide\.[us]32\s+%rd\d+, )%r\d+, 8(, %rd\d+;)", r"\g<1>0, 8\2")
    message = caught(FULL, first_place, Fault)
    assert re.search(r"a race: write of partials, byte \d+", message)


def test_a_race_within_a_block() -> None:
    """A result that one thread is to store is stored by all."""
    by_all = replaced(r"@%p\d+ (st\.global\.b64 )", r"\1")
    assert "a race: write of partials" in caught(FULL, by_all, Fault)


def test_a_read_past_the_tables() -> None:
    """The rows are taken to be twice as long as they are."""
    longer = replaced(r"(mad\.wide\.s32\s+%rd\d+, %r\d+, )\d{3}(, %rd\d+;)", r"\g<1>592\2", which=0)
    case = Case(shapes=[(50,), (60,), (70,)])
    assert "out of bounds" in caught(case, longer, Fault)


def test_a_store_into_the_gradient() -> None:
    """The parameter's address is read out of the gradient's column."""
    parameter, gradient = (rf"[ %rd1 + {8 * column} ]" for column in (Column.PARAM, Column.GRAD))
    message = caught(FULL, replaced(re.escape(parameter), gradient), Fault)
    assert "a write to grad 0, which is only to be read" in message


def test_a_strided_index_that_is_not_multiplied() -> None:
    """The first operand's address is left where its row begins."""
    unmoved = replaced(r"mad\.lo\.s64(\s+%rd\d+, %rd\d+, %rd\d+, )(%rd\d+;)", r"mad.lo.s64\1 0;", which=0)
    caught(STRIDED, unmoved, (Fault, AssertionError))

"""The benchmark commands end to end on a tiny model, and that the contestants do the same work."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.__main__ import parse
from benchmarks.common import machine, models, progress, timing
from benchmarks.common.models import Gradients
from benchmarks.common.results import adamw_bytes, bytes_per_param
from benchmarks.step import formulas, variants
from benchmarks.step.recheck import Wrong, recheck
from benchmarks.step.variants import Contestant, Task, Tensors
from pats_kernels import reference
from pats_kernels.hyperparameters import AdamWHyperparameters

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TOP_KEYS = {"device", "torch", "triton", "model", "params", "copy_gbps", "adamw_fused_ms", "results"}
ROW_KEYS = {
    "variant",
    "backend",
    "optimizer",
    "dtype",
    "state_dtype",
    "normalization",
    "median_ms",
    "p10_ms",
    "p90_ms",
    "ns_per_param",
    "bytes_per_param",
    "gbps",
    "fraction_of_copy",
    "speedup_vs_eager",
    "peak_extra_bytes",
}
STATE_KEYS = ("exp_avg_sens", "exp_avg_unc", "sens_stats", "exp_avg", "exp_avg_sq")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TINY_NOISE = 1e-30  # below float32's resolution of any weight but 0: w stays as it is
STEPS = 3


def command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", module, *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def contest(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, bytes]:
    """One run of the command: its JSON, what it printed, and its picture. Meanwhile it says what it does."""
    folder = tmp_path_factory.mktemp("contest")
    done = command(
        "benchmarks",
        *("--model", "tiny", "--device", "cpu", "--dtype", "bfloat16", "--optimizer", "adamw"),
        *("--variants", "eager,foreach,attached,fused,moments", "--normalization", "exact", "--repeats", "3"),
        *("--isa", "baseline", "--caches", "warm"),
        *("--threads", "1", "--json", str(folder / "out.json"), "--plot", str(folder / "out.png")),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +0 s: one backward pass of tiny \.\.\.$", done.stderr, re.MULTILINE), done.stderr
    return json.loads((folder / "out.json").read_text()), done.stdout, (folder / "out.png").read_bytes()


def test_json_has_the_keys_of_the_contract(contest: tuple[dict[str, Any], str, bytes]) -> None:
    result, _, _ = contest
    assert set(result) >= TOP_KEYS
    assert all(set(row) >= ROW_KEYS for row in result["results"])
    names = ["eager", "foreach", "attached", "fused", "moments"]
    assert [row["variant"] for row in result["results"]] == names
    assert (result["device"], result["model"], result["threads"]) == ("cpu", "tiny", 1)
    assert result["torch"] == torch.__version__
    for row in result["results"]:
        assert (row["optimizer"], row["dtype"], row["state_dtype"]) == ("adamw", "bfloat16", "bfloat16")
        assert row["normalization"] == "exact"


def test_json_figures_follow_from_the_measured_ones(contest: tuple[dict[str, Any], str, bytes]) -> None:
    result, _, _ = contest
    eager = result["results"][0]
    assert result["params"] == sum(param.numel() for param in models.build("tiny", "meta").parameters())
    moved = {"eager": 34, "foreach": 34, "attached": 34, "fused": 30, "moments": 22}
    assert {row["variant"]: row["bytes_per_param"] for row in result["results"]} == moved
    assert min(result["adamw_fused_ms"], result["copy_gbps"], result["host_us_per_tensor"]) > 0
    for row in result["results"]:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["ns_per_param"] == pytest.approx(1e6 * row["median_ms"] / result["params"])
        nbytes = row["bytes_per_param"] * result["params"]
        assert row["gbps"] == pytest.approx(nbytes / (1e-3 * row["median_ms"]) / 1e9)
        assert row["fraction_of_copy"] == pytest.approx(row["gbps"] / result["copy_gbps"])
        assert row["speedup_vs_eager"] == pytest.approx(eager["median_ms"] / row["median_ms"])
        assert row["peak_extra_bytes"] >= 0
    assert eager["peak_extra_bytes"] > 0


def test_the_screen_and_the_picture_show_every_contestant(
    contest: tuple[dict[str, Any], str, bytes],
) -> None:
    result, screen, picture = contest
    assert all(f"{row['variant']} ({row['backend']})" in screen for row in result["results"])
    assert all(f"{name}: {meaning}" in screen for name, meaning in variants.MEANINGS.items())
    assert "Host time" in screen
    assert "AdamW included, baseline instructions" in " ".join(screen.split())
    assert "3 interleaved rounds from warm caches" in " ".join(screen.split())
    assert (result["isa"], result["cold_caches"]) == ("baseline", False)
    assert result["rechecked"].keys() == {"attached", "fused", "moments"}
    assert all(0 <= share <= 1 for share in result["rechecked"].values())
    assert "One more step after all rounds agrees with eager" in screen
    (fused, attached), (shown,) = (
        [row["median_ms"] for row in result["results"] if row["variant"] in ("fused", "attached")][::-1],
        [line.split() for line in screen.splitlines() if line.strip().startswith("fused (")],
    )
    assert "x attached" in screen
    assert shown[-2] == f"{fused / attached:.2f}"
    assert picture.startswith(PNG_SIGNATURE)
    width, height = (int.from_bytes(picture[start : start + 4], "big") for start in (16, 20))
    assert width > height > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "Unknown model: 'no-such-model' (known offline: bert-base-uncased,"),
        (
            ["--variants", "eager,magic"],
            "'magic' is none of eager, foreach, compile, attached, fused, moments",
        ),
        (
            ["--variants", "eager,attached"],
            "'attached' needs --optimizer adamw: it is PATS attached to torch",
        ),
        (["--variants", "moments"], "'moments' needs --optimizer adamw: it is PATSAdamW(sensitivity='mom"),
        (["--repeats", "0"], "0 is not positive"),
        (["--isa", "avx1024"], "invalid choice: 'avx1024'"),
        (["--device", "cpu", "--backend", "cuda"], "backend='cuda' cannot run on cpu"),
    ],
)
def test_a_bad_command_line_says_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


CPUS = [
    # what Linux says of it, what it can, what it takes under each limit
    ("avx2 fma avx512f avx512dq avx512bw avx512vl", ["avx512", "avx2", "baseline"], "avx512 avx2 baseline"),
    ("avx2 fma avx512f", ["avx2", "baseline"], "avx2 avx2 baseline"),
    ("avx2", ["baseline"], "baseline baseline baseline"),
]


@pytest.mark.parametrize(("flags", "has", "takes"), CPUS)
def test_instruction_sets(flags: str, has: list[str], takes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `best_for_this_machine` of csrc/cpu.cpp chooses; more than there is nobody gets."""
    monkeypatch.setattr(machine, "_cpu", lambda what: flags)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv(machine.LIMIT, raising=False)
    assert machine.isas() == has
    assert machine.isa() == has[0]
    for limit, taken in zip(machine.ISAS, takes.split(), strict=True):
        monkeypatch.setenv(machine.LIMIT, limit)
        assert machine.isa() == taken
        if limit in has:
            machine.choose_isa(limit)
            assert machine.isa() == limit
        else:
            with pytest.raises(ValueError, match=f"this machine has no {machine.ISA_NAMES[limit]}"):
                machine.choose_isa(limit)


def test_the_titles_name_the_instruction_set_of_a_cpu() -> None:
    about = machine.prepare(CPU)
    assert machine.isa_title({**about, "isa": "avx2"}) == ", AVX2"
    assert machine.isa_title({**about, "device": "cuda"}) == ""


def test_by_default_all_take_part_that_can() -> None:
    assert parse([]).variants == ("eager", "foreach", "compile", "fused")
    assert parse(["--optimizer", "adamw"]).variants == variants.NAMES


@pytest.mark.parametrize(
    ("form", "delayed", "exact"),
    [("pats", 28, 40), ("pats, adamw", 56, 68), ("pats_adamw", 44, 60), ("moments_adamw", 28, 44)],
)
def test_bytes_per_param(form: str, delayed: int, exact: int) -> None:
    assert bytes_per_param(torch.float32, "delayed", form) == delayed
    assert bytes_per_param(torch.float32, "exact", form) == exact
    assert bytes_per_param(torch.bfloat16, "exact", form) == exact // 2
    assert adamw_bytes(torch.float32) == 28


# The contestants do the same work


@pytest.fixture(scope="module")
def gradients() -> Callable[[torch.dtype], Gradients]:
    params, grads = models.gradients("tiny", "Two words and a few more", CPU, torch.float32)

    def copy(dtype: torch.dtype) -> Gradients:
        return Gradients(
            [param.to(dtype, copy=True) for param in params], [grad.to(dtype, copy=True) for grad in grads]
        )

    return copy


Make = Callable[[Task], Contestant]


def from_the_start(
    make: str | Make, gradients: Gradients, h: AdamWHyperparameters, optimizer: str = "none"
) -> Contestant:
    """The contestant, by name or as it is made, as if its trials had not been."""
    original = [param.clone() for param in gradients.params]
    task = Task(Tensors.fresh(gradients), h, optimizer)
    contestant = variants.contestant(make, task) if isinstance(make, str) else make(task)
    tensors = contestant.tensors
    for param, value in zip(tensors.params, original, strict=True):
        param.copy_(value)
    for column in (*(getattr(tensors, key) for key in STATE_KEYS), tensors.steps):
        for tensor in column:
            tensor.zero_()
    return contestant


def turn(grads: list[Tensor]) -> None:
    """Another gradient for the next step: with the same one AdamW's moments would know no uncertainty."""
    for grad in grads:
        grad.mul_(-0.5)


def after_steps(contestant: Contestant) -> Tensors:
    for _ in range(STEPS):
        contestant.step()
        turn(contestant.tensors.grads)
    return contestant.tensors


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def assert_same(key: str, actual: Tensors, expected: Tensors, rtol: float) -> None:
    """To `rtol`; where w is nothing but noise, to the same share of what the elements are on the whole."""
    a, b = flat(getattr(actual, key)), flat(getattr(expected, key))
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.mean().item())


def assert_same_averages(actual: Tensors, expected: Tensors) -> None:
    """To three steps of a handful of roundings, and means summed in other orders."""
    for key in ("exp_avg_sens", "exp_avg_unc", "sens_stats"):
        assert_same(key, actual, expected, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("name", ["foreach", "fused"])
def test_contestants_move_the_same_averages(
    gradients: Callable[[torch.dtype], Gradients], name: str, normalization: Any
) -> None:
    h = AdamWHyperparameters(noise_scale=TINY_NOISE, normalization=normalization)
    expected = after_steps(from_the_start("eager", gradients(torch.float32), h))
    actual = after_steps(from_the_start(name, gradients(torch.float32), h))
    assert_same_averages(actual, expected)


@pytest.mark.parametrize("name", ["eager", "foreach", "fused"])
def test_contestants_agree_in_bfloat16(gradients: Callable[[torch.dtype], Gradients], name: str) -> None:
    h = AdamWHyperparameters(noise_scale=TINY_NOISE)
    wide = after_steps(from_the_start("eager", gradients(torch.float32), h))
    narrow = after_steps(from_the_start(name, gradients(torch.bfloat16), h))
    # w and g are rounded to 2^-9, then each step rounds S stochastically, by less than 2^-7 of it.
    assert_same("exp_avg_sens", narrow, wide, rtol=2 * 2**-9 + STEPS * 2**-7)


def test_the_compiled_contestant_moves_the_same_averages(
    gradients: Callable[[torch.dtype], Gradients],
) -> None:
    h = AdamWHyperparameters(noise_scale=TINY_NOISE)
    expected = after_steps(from_the_start("eager", gradients(torch.float32), h))
    compiled = from_the_start("compile", gradients(torch.float32), h)
    assert_same_averages(after_steps(compiled), expected)
    assert compiled.configuration is not None


@pytest.mark.parametrize("normalization", ["delayed", "exact"])
def test_foreach_has_eagers_gate(
    gradients: Callable[[torch.dtype], Gradients], normalization: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every normal 1, the change of w shows the gates, also of tensors without statistics."""
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    monkeypatch.setattr(torch, "randn", torch.ones)
    h = AdamWHyperparameters(noise_scale=1e-3, normalization=normalization)
    expected = after_steps(from_the_start("eager", gradients(torch.float32), h))
    actual = after_steps(from_the_start("foreach", gradients(torch.float32), h))
    torch.testing.assert_close(flat(actual.params), flat(expected.params), rtol=0, atol=1e-6)
    assert not flat(actual.params).equal(flat(gradients(torch.float32).params))


# The same with AdamW


def of_the_reference(gradients: Gradients, h: AdamWHyperparameters) -> Tensors:
    """What `pats_kernels.reference` makes of them in as many steps."""
    tensors = Tensors.fresh(gradients)
    ema = h.sensitivity == "ema"
    left_out = ("state_dtype", "sensitivity")
    values = {key: value for key, value in variants._keywords(h).items() if key not in left_out}
    for t in range(1, STEPS + 1):
        for i, (param, grad) in enumerate(zip(*gradients, strict=True)):
            S, U, stats, m, v = (getattr(tensors, key)[i] for key in STATE_KEYS)
            S, U = (S, U) if ema else (None, None)
            reference.pats_adamw_update_(param, grad, m, v, S, U, stats, step=t, tensor_id=i, **values)
        turn(tensors.grads)
    return tensors


def of_torch(gradients: Gradients, h: AdamWHyperparameters) -> Tensors:
    """torch.optim.AdamW's steps, no noise."""
    tensors = Tensors.fresh(gradients)
    optimizer = variants.torch_adamw(Task(tensors, h))
    for _ in range(STEPS):
        optimizer.step()
        turn(tensors.grads)
    return tensors


def assert_within(
    key: str, actual: Tensors, expected: Tensors, rtol: float, tolerances: Iterable[Tensor | float]
) -> None:
    """Every tensor to its own absolute tolerance beside the relative one."""
    for a, b, atol in zip(getattr(actual, key), getattr(expected, key), tolerances, strict=True):
        assert ((a - b).abs() <= rtol * b.abs() + atol).all(), key


@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("name", variants.OURS)
def test_ours_with_adamw_are_the_reference(
    gradients: Callable[[torch.dtype], Gradients], name: str, normalization: Any
) -> None:
    """So the one pass is the two: attached and fused have the same noise.

    A step's noise is off by the contract's 2e-3 on z, and by the gate's share beside it; through w that moves
    S and U by as much times the gradient, of which the first step's is the largest. The rest is roundings.
    """
    h = AdamWHyperparameters(noise_scale=1e-3, lr=1e-3, normalization=normalization)
    sensitivity = "moments" if name == "moments" else "ema"
    expected = of_the_reference(gradients(torch.float32), replace(h, sensitivity=sensitivity))
    actual = after_steps(from_the_start(name, gradients(torch.float32), h, "adamw"))
    off = STEPS * 3e-3 * h.noise_scale
    assert_within("params", actual, expected, 1e-6, [off] * len(actual.params))
    assert_within("exp_avg", actual, expected, 1e-5, [1e-6 * m.abs().max() for m in expected.exp_avg])
    assert_within("exp_avg_sq", actual, expected, 1e-5, [0.0] * len(actual.params))
    moved = [2 * off * grad.abs() for grad in gradients(torch.float32).grads]
    assert_within("sens_stats", actual, expected, 1e-5, [change.mean() for change in moved])
    if name != "moments":
        assert_within("exp_avg_sens", actual, expected, 1e-5, moved)
        roundings = [1e-6 * S for S in expected.exp_avg_sens]
        assert_within("exp_avg_unc", actual, expected, 1e-5, map(torch.add, moved, roundings))
    assert {int(step) for step in actual.steps} == {STEPS}
    still = of_torch(gradients(torch.float32), h)
    assert (flat(expected.params) - flat(still.params)).abs().max() > 100 * off


@pytest.mark.parametrize(
    "make",
    [
        "eager",
        "foreach",
        "compile",
        partial(variants._compiled_update, {}),
        partial(variants._then_adamw, partial(variants._compiled_update, {})),
        variants._compiled_foreach,  # which takes part on a GPU alone
    ],
    ids=["eager", "foreach", "compile", "AdamW in the graph", "then AdamW", "compiled foreach"],
)
def test_baselines_without_noise_are_torchs_adamw(
    gradients: Callable[[torch.dtype], Gradients], make: str | Make
) -> None:
    h = AdamWHyperparameters(noise_scale=0.0, lr=1e-2)
    ours, torchs = ((x.params[-4:], x.grads[-4:]) for x in (gradients(torch.float32) for _ in range(2)))
    expected = of_torch(Gradients(*torchs), h)
    actual = after_steps(from_the_start(make, Gradients(*ours), h, "adamw"))
    for key in ("params", "exp_avg", "exp_avg_sq"):
        a, b = flat(getattr(actual, key)), flat(getattr(expected, key))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().mean().item())
    averages = flat(actual.exp_avg_sens), flat(actual.exp_avg_unc)
    assert all(average.max() > 0 for average in averages)  # PATS took part all the same


def test_the_compiled_contestant_counts_what_its_configuration_moves(
    gradients: Callable[[torch.dtype], Gradients], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With trials that find each of the configurations the fastest in turn."""
    params, grads = (column[-1:] for column in gradients(torch.float32))
    forms = {}
    for best in range(4):
        ranks = iter(range(4))
        monkeypatch.setattr(variants, "_trial", lambda *_, ranks=ranks, best=best: next(ranks) != best)
        made = variants.compiled(
            Task(Tensors.fresh(Gradients(params, grads)), AdamWHyperparameters(), "adamw")
        )
        forms[made.configuration] = made.form
    assert forms == {
        "one tensor at a time, AdamW in the graph": "pats_adamw",
        "one tensor at a time, fallback_random, AdamW in the graph": "pats_adamw",
        "one tensor at a time, then fused AdamW": "pats, adamw",
        "one tensor at a time, fallback_random, then fused AdamW": "pats, adamw",
    }


def test_with_adamw_in_bfloat16(gradients: Callable[[torch.dtype], Gradients]) -> None:
    """A compiled graph with AdamW stores its moments as the package does: to bfloat16, stochastically."""
    h = AdamWHyperparameters(noise_scale=0.0, lr=1e-3)
    wide = of_torch(gradients(torch.float32), h)
    narrow = Tensors.fresh(gradients(torch.bfloat16))
    for t in range(1, STEPS + 1):
        corrections = formulas.bias_corrections(torch.tensor(t, dtype=torch.float64), h)
        for row in narrow.rows("adamw"):
            formulas.update_(*row, h, corrections)
        turn(narrow.grads)
    # As for S above, but that m may cancel: to a share of the largest.
    for a, b in zip(narrow.exp_avg, wide.exp_avg, strict=True):
        tolerance = (2**-9 + STEPS * 2**-7) * b.abs().max().item()
        torch.testing.assert_close(a.float(), b, rtol=0, atol=tolerance)
    assert_same("exp_avg_sq", narrow, wide, rtol=2 * 2**-9 + STEPS * 2**-7)


def test_bfloat16_rounding_is_unbiased() -> None:
    x = torch.full((1 << 16,), 1.0 + 2**-9)
    rounded = formulas.round_stochastically(x, torch.arange(1 << 16, dtype=torch.int32))
    assert rounded.equal(rounded.to(torch.bfloat16).float())
    assert rounded.double().mean().item() == 1.0 + 2**-9


# Models


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("bert-base-uncased", 109.51),
        ("bert-large-uncased", 335.17),
        ("roberta-base", 124.70),
        ("roberta-large", 355.41),
        ("microsoft/deberta-v3-base", 184.55),
        ("deberta-v3-large", 435.19),
        ("gpt2", 124.44),
        ("gpt2-medium", 354.82),
        ("gpt2-large", 774.03),
        ("gpt2-xl", 1557.61),
        ("meta-llama/Llama-3.2-1B", 1235.81),
        ("Qwen/Qwen2.5-0.5B", 494.03),
        ("qwen2.5-1.5b", 1543.71),
        ("Qwen/Qwen2.5-7B", 7615.62),
    ],
)
def test_models_resolve_without_a_network(name: str, millions: float) -> None:
    """The parameters of the published checkpoints, masked language models with their head."""
    count = sum(param.numel() for param in models.build(name, "meta").parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Unknown model: 'bert-huge' \(known offline: .*tiny\)"):
        models.config("bert-huge")


def test_gradients_are_the_same_every_time_and_dense() -> None:
    first, second = (models.gradients("tiny", "Some text", CPU, torch.bfloat16) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first.grads, second.grads, strict=True))
    assert all(grad.is_contiguous() and grad.dtype == torch.bfloat16 for grad in first.grads)
    assert all(grad.layout == torch.strided and grad.isfinite().all() for grad in first.grads)


def test_causal_models_have_gradients_too(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}
    monkeypatch.setitem(models.CONFIGS, "small", small)
    gradients = models.gradients("small", "Some text", CPU, torch.float32)
    assert gradients.numel == sum(param.numel() for param in models.build("small", "meta").parameters())


def test_token_ids_are_one_per_word_and_repeat_the_text() -> None:
    ids = models.token_ids("the cat, the Dog", 8, 30522)
    assert ids[0] == ids[2] == ids[4]
    assert ids[:4].equal(ids[4:])
    assert len(set(ids.tolist())) == 3
    assert ids.min() >= models.SPECIAL_TOKENS
    with pytest.raises(ValueError, match="no words"):
        models.token_ids(" ", 8, 30522)


# What was timed is looked at afterwards.


def checked(
    gradients: Gradients, name: str, optimizer: str, h: AdamWHyperparameters
) -> tuple[Contestant, Task]:
    """A contestant that has taken a few steps, as a contest leaves it."""
    task = Task(Tensors.fresh(gradients), h, optimizer)
    made = variants.contestant(name, task)
    for _ in range(STEPS):
        made.step()
    return made, task


@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "optimizer"), [("fused", "none"), *((name, "adamw") for name in variants.OURS)]
)
def test_what_was_timed_is_the_step(
    gradients: Callable[[torch.dtype], Gradients],
    name: str,
    optimizer: str,
    dtype: torch.dtype,
    normalization: Any,
) -> None:
    h = AdamWHyperparameters(noise_scale=1e-3, lr=1e-3, normalization=normalization)
    made, task = checked(gradients(dtype), name, optimizer, h)
    before = [param.clone() for param in made.tensors.params]
    assert 0 < recheck(made, task) <= 1
    assert not all(torch.equal(p, old) for p, old in zip(made.tensors.params, before, strict=True))


@pytest.mark.parametrize("column", ["params", "exp_avg_sens", "exp_avg_unc", "sens_stats", "exp_avg"])
def test_what_is_not_the_step_is_noticed(gradients: Callable[[torch.dtype], Gradients], column: str) -> None:
    """Whatever comes out differently: here one element by a thousandth of the largest."""
    made, task = checked(gradients(torch.float32), "fused", "adamw", AdamWHyperparameters())

    def wrong() -> None:
        made.step()
        tensor = getattr(made.tensors, column)[-1].detach()
        tensor.view(-1)[-1] += 1e-3 * tensor.abs().max()

    name = "w" if column == "params" else column
    with pytest.raises(Wrong, match=f"fused: {name} of parameter {len(made.tensors.params) - 1} is not"):
        recheck(made._replace(step=wrong), task)
    with pytest.raises(Wrong):
        recheck(made._replace(step=lambda: None), task)


# Timing


def test_warm_caches_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    make = torch.empty
    monkeypatch.setattr(timing.torch, "empty", lambda size, **more: filled.append(size) or make(size, **more))
    for cold in (True, False):
        timing.interleave({"a": lambda: None}, 1, CPU, lambda *_: None, cold)
    assert filled == [timing.SCRATCH_BYTES, 0]


def test_progress_is_told_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line now and then, not one for each step."""
    now = iter([100.0, 100.0, 103.0, 111.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    out = io.StringIO()
    with progress.progress(Console(file=out)) as tell:
        for doing in ("first", "second", "third [a]"):
            tell(doing)
    assert out.getvalue().splitlines() == ["   0 s: first ...", "  11 s: third [a] ..."]


def test_progress_on_a_terminal_is_one_line_that_goes_away() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60)
    with progress.progress(console) as tell:
        tell("round 1 of 3")
    assert "round 1 of 3 ..." in out.getvalue()
    assert out.getvalue().endswith("\x1b[2K"), "the last line is erased"


def test_every_step_gets_its_warmups_and_its_turns() -> None:
    calls = {"a": 0, "b": 0}

    def step(name: str) -> None:
        calls[name] += 1

    told: list[tuple[int, str]] = []
    steps = {name: lambda name=name: step(name) for name in calls}
    times = timing.interleave(steps, 4, CPU, lambda turn, name: told.append((turn, name)))
    assert calls == dict.fromkeys(calls, timing.WARMUPS + 4)
    assert told == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b"), (3, "b"), (3, "a")]
    assert times.keys() == calls.keys()


def test_times_are_percentiles() -> None:
    assert timing.Times.of([float(value) for value in range(11)]) == (5.0, 1.0, 9.0)


def test_memory_counts_what_lives_at_once_and_what_stays() -> None:
    x = torch.ones(1 << 20)
    kept: list[torch.Tensor] = []
    scalars = 64  # bytes: a Python number becomes a tensor too
    steps = {
        (0, 0): lambda: x.mul_(2),
        (1, 0): lambda: (x * 2).add_(1),
        (3, 0): lambda: (x * 2) * (x * 3),
        (2, 1): lambda: kept.append((x * 2) + 1),
    }
    for (peak, stays), step in steps.items():
        taken = timing.memory(step, CPU)
        assert taken.peak == pytest.approx(peak * x.nbytes, abs=scalars)
        assert taken.kept == pytest.approx(stays * x.nbytes, abs=scalars)
    assert timing.memory(kept.clear, CPU) == (0, -x.nbytes)


def test_a_contest_ends_in_time_but_not_before_a_few_rounds() -> None:
    calls = {"a": 0}

    def step() -> None:
        calls["a"] += 1

    measured = timing.contest({"a": step}, 1000, CPU, lambda *_: None, seconds=0)
    assert calls["a"] == timing.WARMUPS + timing.FEWEST
    assert measured["a"].device == measured["a"].host == measured["a"].wall


def test_compilers_are_stopped() -> None:
    def compile_for(seconds: float) -> None:
        with variants.limited(seconds):
            while True:
                pass

    with pytest.raises(TimeoutError, match="not ready after 0 s"):
        compile_for(0.05)
    with pytest.raises(TimeoutError, match="no time was left"):
        compile_for(0)


def test_a_way_to_compile_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(step: Callable[[], None], device: torch.device) -> float:
        step()
        return 1.0

    def fails() -> None:
        raise ValueError("no compiler")

    monkeypatch.setattr(variants, "_trial", trial)
    tensors = Tensors.fresh(Gradients([torch.ones(1)], [torch.ones(1)]))
    made = {
        name: Contestant(name, "", "pats", step, tensors)
        for name, step in {"a": fails, "b": lambda: None}.items()
    }
    assert variants._trials(made, CPU) == ({"b": 1.0}, ["'a' failed: ValueError: no compiler"])
    with pytest.raises(RuntimeError, match="'a' failed: ValueError: no compiler"):
        variants._trials({"a": made["a"]}, CPU)


def test_shared_contestants_update_the_tasks_own_state() -> None:
    tensors = Tensors.fresh(Gradients([torch.ones(100)], [torch.ones(100)]))
    for name in variants.OURS:
        task = Task(tensors, AdamWHyperparameters(), "adamw", shared=True)
        made = variants.contestant(name, task)
        before = tensors.exp_avg[0].clone()
        made.step()
        assert made.tensors.exp_avg[0] is tensors.exp_avg[0]
        assert not torch.equal(before, tensors.exp_avg[0])
    assert tensors.exp_avg_sens[0].max() > 0

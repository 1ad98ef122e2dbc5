"""The texts of warnings: misspelt keys, noise too large or lost in rounding."""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import Pool
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from transformers import BertConfig, BertModel

from pats_kernels import PATS, PATSAdamW
from pats_kernels.advice import LARGE, SMALL, misspelt, noise_warning, spelling_warning
from pats_kernels.hyperparameters import AdamWHyperparameters, Hyperparameters, defaults_of

NAMES = list(defaults_of(Hyperparameters))

# Misspelt keys.


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("noise_scal", "noise_scale"),
        ("noise_sclae", "noise_scale"),
        ("noise-scale", "noise_scale"),
        ("noise_scales", "noise_scale"),
        ("noisescale", "noise_scale"),
        ("gama", "gamma"),
        ("Gamma", "gamma"),
        ("agmma", "gamma"),
        ("sens_beta", "sens_betas"),
        ("seeds", "seed"),
        ("uncertainity", "uncertainty"),
        ("normalisation", "normalization"),
        ("stochastic_roundng", "stochastic_rounding"),
    ],
)
def test_misspelt(key: str, name: str) -> None:
    assert misspelt(["params", "lr", key, "gamma"], NAMES) == [(key, name)]
    assert repr(key) in spelling_warning(key, name)
    assert repr(name) in spelling_warning(key, name)


def test_what_is_no_misspelling() -> None:
    """The names themselves, keys that the optimizer knows, two edits, another word, no string, a letter for
    lr."""
    assert misspelt([*NAMES, "params", "param_names", "initial_lr"], NAMES) == []
    assert misspelt(["speed", "gamma1"], NAMES, known=["speed", "gamma1"]) == []
    assert misspelt(["speed", "gamma1"], NAMES) == [("speed", "seed"), ("gamma1", "gamma")]
    assert misspelt(["noise_sc", "scale", "noise", "gmm", "deltas", 7, ""], NAMES) == []
    assert misspelt(["l", "r", "lrs", "ir"], defaults_of(AdamWHyperparameters)) == []


@pytest.mark.parametrize("cls", ["AdamW", "SGD", "Adagrad", "NAdam", "RMSprop", "Adafactor", "LBFGS", "ASGD"])
def test_torch_optimizers_are_not_misspelt(cls: str) -> None:
    """Even if their keys are not given as known."""
    weight = nn.Parameter(torch.ones(2))
    group = getattr(torch.optim, cls)([weight], lr=0.1).param_groups[0]
    assert misspelt(group, defaults_of(Hyperparameters)) == []
    assert misspelt(group, defaults_of(AdamWHyperparameters), known=group) == []
    own = PATSAdamW([weight])
    assert misspelt(own.param_groups[0], defaults_of(AdamWHyperparameters), own.defaults) == []


LETTERS = st.sampled_from("abc_")


@given(st.text(LETTERS, min_size=3, max_size=7), st.data())
def test_every_edit_is_found(name: str, data: st.DataObject) -> None:
    """All words one edit away are found, and only those; the test writes them down one by one."""
    n = len(name)
    edits = {name[:i] + name[i + 1 :] for i in range(n)}
    edits |= {name[:i] + c + name[i + 1 :] for i in range(n) for c in "abc_"}
    edits |= {name[:i] + c + name[i:] for i in range(n + 1) for c in "abc_"}
    edits |= {name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(n - 1)}
    edits -= {name}
    key = data.draw(st.sampled_from(sorted(edits)) | st.text(LETTERS, max_size=8))
    assert misspelt([key], [name]) == ([(key, name)] if key in edits else [])


# Noise.


def weights(
    std: float = 0.04, mean: float = 0.0, shape: Any = (64, 64), dtype: Any = torch.float32
) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=random, dtype=torch.float64) * std + mean).to(dtype)


def warned(tensor: Tensor, noise_scale: Any, **settings: Any) -> str | None:
    return noise_warning([("w", tensor)], [Hyperparameters(noise_scale=noise_scale, **settings)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_noise_too_large(dtype: torch.dtype) -> None:
    """Warns above a tenth of the standard deviation, and not below. bfloat16's is known to 2^-8."""
    tensor = weights(dtype=dtype)
    std = tensor.double().std().item()
    assert warned(tensor, std * LARGE * 0.99) is None
    text = warned(tensor, std * LARGE * 1.01)
    assert text is not None
    assert text.startswith(
        f"w: noise_scale={std * LARGE * 1.01:g} is 0.1 of its weights' standard deviation, 0.04,"
    )
    assert warned(tensor, std) is not None


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(100),
        torch.ones(100),  # a normalization's weights, new
        weights(1e-3, mean=1.0),  # and used
        weights(shape=(15,)),
        torch.zeros(0, 3),
        weights().to("meta"),
        torch.full((100,), math.nan),
        torch.ones(20, dtype=torch.int64),
        torch.ones(20, dtype=torch.complex64),
        torch.ones(20).to_sparse(),
    ],
)
def test_what_says_nothing(tensor: Tensor) -> None:
    assert warned(tensor, 0.05) is None


def test_noise_scales_that_say_nothing() -> None:
    """0 means no noise. A tensor on a device is not read."""
    assert warned(weights(), 0.0) is None
    assert warned(weights(), torch.ones(1)) is None


def test_defaults_on_ordinary_models_say_nothing() -> None:
    """No warning for any initial float32 model, nor for bfloat16 with stochastic rounding."""
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    for dtype in (torch.float32, torch.bfloat16):
        params = list(BertModel(config).to(dtype).named_parameters())
        assert noise_warning(params, [Hyperparameters()] * len(params)) is None
    assert warned(weights(std=100.0), 1e-5) is None


ROUNDED = {
    torch.float32: {},
    torch.float64: {},
    torch.float16: {},
    torch.bfloat16: {"stochastic_rounding": False},
}


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("std", [0.04, 0.0331, 0.0623])
def test_noise_lost_in_rounding(dtype: torch.dtype, std: float) -> None:
    """At the bound a one-sigma draw moves at most a tenth of the weights, wherever they are between powers of
    two."""
    tensor = weights(std, shape=(300, 300), dtype=dtype)
    bound = tensor.double().square().mean().sqrt().item() * torch.finfo(dtype).eps * SMALL
    moved = (tensor.double() + bound).to(dtype) != tensor
    assert moved.double().mean() < 0.1 + 5 * 0.3 / 300  # five standard errors of a share of 0.1
    assert warned(tensor, bound * 1.01, **ROUNDED[dtype]) is None
    text = warned(tensor, bound * 0.98, **ROUNDED[dtype])
    assert text is not None
    assert re.match(rf"w: noise_scale=\S+ is lost in rounding: .*, are {str(dtype)[6:]} and rounded", text)
    above = re.search(r"set noise_scale above (\S+),", text)
    assert above is not None
    assert float(above[1]) == pytest.approx(bound, rel=0.06)  # it has two digits
    assert ("stochastic_rounding=True" in text) == (dtype == torch.bfloat16)


def test_bfloat16_rounds_stochastically_by_default() -> None:
    assert warned(weights(dtype=torch.bfloat16), 1e-9) is None
    assert warned(weights(dtype=torch.float16), 1e-9, stochastic_rounding=True) is not None


def test_the_worst_is_named() -> None:
    """First tensors with too much noise, because it does harm, then tensors whose noise is lost."""
    params = [("a", weights(0.05)), ("b", weights(0.01)), ("c", weights(0.02)), ("d", weights(1.0))]
    large = [Hyperparameters(noise_scale=scale) for scale in (1e-2, 1e-2, 1e-2, 1e-9)]
    text = noise_warning(params, large)
    assert text is not None
    assert text.startswith("b: noise_scale=0.01 is 1 of")
    assert "(the same for 2 more)" in text
    small = [Hyperparameters(noise_scale=scale) for scale in (1e-5, 1e-5, 1e-11, 1e-11)]
    text = noise_warning(params, small)
    assert text is not None
    assert text.startswith("d: noise_scale=1e-11 is lost in rounding (the same for 1 more)")


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda w: w.t(),
    "holes": lambda w: torch.stack((w, torch.full_like(w, 9.0)), -1)[..., 0],
    "expanded": lambda w: w[:1].expand(5, -1),
    "a parameter": nn.Parameter,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str) -> None:
    tensor = LAYOUTS[layout](weights())
    std = tensor.detach().double().std(correction=0).item()
    assert warned(tensor, std * LARGE * 1.01) is not None
    assert warned(tensor, std * LARGE * 0.99) is None


def test_one_wait_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        reads.append(tensor.numel())
        return tolist(tensor)

    def refused(*_arguments: Any) -> None:
        raise AssertionError("a number was read by itself")

    monkeypatch.setattr(Tensor, "tolist", counted)
    for name in ("item", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(Tensor, name, refused)
    params = [(str(i), weights(dtype=dtype)) for i in range(5) for dtype in ROUNDED]
    assert noise_warning(params, [Hyperparameters(noise_scale=1.0)] * 20) is not None
    assert reads == [40]


@pytest.mark.parametrize("dtype", ROUNDED)
def test_memory(dtype: torch.dtype) -> None:
    """Nothing wider than the parameter is allocated."""
    tensor = weights(shape=(1024, 1024), dtype=dtype)
    with torch.profiler.profile(profile_memory=True) as profile:
        warned(tensor, 1e-3)
    allocated = [event.self_cpu_memory_usage for event in profile.events() or ()]
    assert max(allocated, default=0) <= tensor.numel() * tensor.element_size()


def judge_shards() -> str | None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.cat((weights(0.04), weights(0.2)))
    mesh = init_device_mesh("cpu", (2,))
    params = [
        ("w", distribute_tensor(whole, mesh, [Shard(0)])),
        ("e", distribute_tensor(whole[:1], mesh, [Shard(0)])),
    ]
    return noise_warning(params, [Hyperparameters(noise_scale=0.01)] * 2)


def test_shards(pool: Pool) -> None:
    """Each process judges its own shard; an empty one gives no warning."""
    first, second = pool(2, judge_shards)
    assert first is not None
    assert first.startswith("w: noise_scale=0.01 is 0.25 of")
    assert second is None


# Sparse gradients.


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_sparse_gradient_says_what_to_do(kind: Any, fused: bool) -> None:
    table = kind(5, 3, sparse=True)
    named = [("emb.weight", table.weight)]
    optimizer = PATSAdamW(named) if fused else torch.optim.SGD(named, lr=0.1)
    if not fused:
        PATS(optimizer)
    table(torch.tensor([[1, 2]])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(
        TypeError, match=r"emb\.weight: .*the gradient is torch\.sparse_coo; sparse=False in its nn"
    ):
        optimizer.step()
    assert torch.equal(before, table.weight)


# Said once, by both optimizers.

BOTH: dict[str, Any] = {
    "PATSAdamW": lambda groups, **settings: PATSAdamW(groups, seed=2**50 + 1, **settings),
    "PATS": lambda groups, **settings: attach(SGD(groups, lr=0.1), **settings),
}


def attach(optimizer: Optimizer, **settings: Any) -> Optimizer:
    PATS(optimizer, seed=2**50 + 2, **settings)
    return optimizer


def spread(deviation: float, size: int = 100) -> nn.Parameter:
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(deviation * (values - values.mean()) / values.std(correction=0))


def steps(optimizer: Optimizer, count: int = 3) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.ones_like(param)
            optimizer.step()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("kind", BOTH)
def test_noise_that_ruins_or_is_lost_is_named_once(kind: str) -> None:
    for noise_scale, text in ((1.0, "noise_scale=1 is 20 of its"), (1e-12, "noise_scale=1e-12 is lost")):
        (message,) = steps(BOTH[kind]([spread(0.05)], noise_scale=noise_scale))
        assert message.startswith(f"PATS: param_groups[0]['params'][0]: {text}")


@pytest.mark.parametrize("kind", BOTH)
def test_defaults_and_a_resumed_run_say_nothing(kind: str) -> None:
    params = [spread(0.05), spread(0.0), nn.Parameter(torch.ones(100))]  # a LoRA's B, a normalization
    first = BOTH[kind](params)
    assert steps(first) == []
    resumed = BOTH[kind]([spread(1e-6), spread(1e-6), spread(1e-6)])
    resumed.load_state_dict(first.state_dict())
    assert [m for m in steps(resumed) if "noise_scale" in m] == []


@pytest.mark.parametrize("kind", BOTH)
def test_a_misspelt_key_is_named_once(kind: str) -> None:
    with pytest.warns(UserWarning, match="'noise_scal' is not a hyperparameter and has no effect") as caught:
        optimizer = BOTH[kind]([{"params": [spread(0.05)], "noise_scal": 0.0}, {"params": [spread(0.05)]}])
    assert len(caught) == 1
    assert steps(optimizer) == []
    if kind == "PATSAdamW":
        with pytest.warns(UserWarning, match="did you mean 'weight_decay'"):
            optimizer.add_param_group({"params": [spread(0.05)], "weight_decy": 0.0})
    optimizer.param_groups[0]["gama"] = 0.5
    optimizer.add_param_group({"params": [spread(0.05)]})
    assert ["gama" in message for message in steps(optimizer)] == [True]

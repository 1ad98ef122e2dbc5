"""Param groups by name: lists written by hand, patterns, tied parameters, unused embeddings, the Trainer."""

import copy
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import BAD_ADAMW_HYPERPARAMETERS, BAD_HYPERPARAMETERS, assert_names
from harness import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from test_hf import examples
from test_hf import model as bert
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from pats_kernels import PATS, PATSAdamW, param_groups
from pats_kernels.groups import NO_NOISE

DECAY, NOISE = 0.1, 1e-3


def named(groups: list[dict[str, Any]]) -> dict[tuple[float, float], list[str]]:
    """The groups' parameters by (weight_decay, noise_scale), after a check that no pair occurs twice."""
    found = {(group["weight_decay"], group["noise_scale"]): group["param_names"] for group in groups}
    assert len(found) == len(groups) <= 4
    assert all(len(group["params"]) == len(group["param_names"]) > 0 for group in groups)
    return found


def quiet(model: nn.Module, no_noise: Any = NO_NOISE) -> set[str]:
    """The parameters without noise."""
    groups = param_groups(model, weight_decay=DECAY, noise_scale=NOISE, no_noise=no_noise)
    return {name for group in groups if group["noise_scale"] == 0 for name in group["param_names"]}


# Models of transformers, by hand.

SIZES: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_bert() -> None:
    config = BertConfig(**SIZES, intermediate_size=12, max_position_embeddings=6)
    model = BertForSequenceClassification(config)
    layer = "bert.encoder.layer.0"
    dense = [
        f"{layer}.attention.self.query",
        f"{layer}.attention.self.key",
        f"{layer}.attention.self.value",
        f"{layer}.attention.output.dense",
        f"{layer}.intermediate.dense",
        f"{layer}.output.dense",
        "bert.pooler.dense",
        "classifier",
    ]
    norms = ["bert.embeddings.LayerNorm", f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    tables = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
    groups = param_groups(model, weight_decay=DECAY, noise_scale=NOISE)
    found = named(groups)
    assert list(found) == [(DECAY, NOISE), (DECAY, 0.0), (0.0, 0.0)]
    assert found[DECAY, NOISE] == [f"{name}.weight" for name in dense]
    assert found[DECAY, 0.0] == [f"bert.embeddings.{name}.weight" for name in tables]
    rest = {f"{name}.bias" for name in dense + norms} | {f"{name}.weight" for name in norms}
    assert set(found[0.0, 0.0]) == rest
    parameters = dict(model.named_parameters())
    assert all(
        parameters[name] is param
        for group in groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    )


def test_gpt2() -> None:
    """`ln_1` and `wte` say nothing by name, but their modules' classes do. lm_head is tied to wte."""
    config = GPT2Config(
        vocab_size=20, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    found = named(param_groups(GPT2LMHeadModel(config), weight_decay=DECAY, noise_scale=NOISE))
    block = "transformer.h.0"
    dense = [f"{block}.attn.c_attn", f"{block}.attn.c_proj", f"{block}.mlp.c_fc", f"{block}.mlp.c_proj"]
    norms = [f"{block}.ln_1", f"{block}.ln_2", "transformer.ln_f"]
    assert set(found) == {(DECAY, NOISE), (DECAY, 0.0), (0.0, 0.0)}
    assert found[DECAY, NOISE] == [f"{name}.weight" for name in dense]
    assert found[DECAY, 0.0] == ["transformer.wte.weight", "transformer.wpe.weight"]
    rest = {f"{name}.bias" for name in dense + norms} | {f"{name}.weight" for name in norms}
    assert set(found[0.0, 0.0]) == rest


def test_llama() -> None:
    """RMSNorm, and no bias at all, which is not an error. The head is not tied, and is excluded by name."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=12))
    layer = "model.layers.0"
    dense = [f"{layer}.self_attn.{name}_proj.weight" for name in "qkvo"]
    dense += [f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    norms = [
        f"{layer}.input_layernorm.weight",
        f"{layer}.post_attention_layernorm.weight",
        "model.norm.weight",
    ]
    found = named(param_groups(model, weight_decay=DECAY, noise_scale=NOISE))
    assert found == {
        (DECAY, NOISE): [*dense, "lm_head.weight"],
        (DECAY, 0.0): ["model.embed_tokens.weight"],
        (0.0, 0.0): norms,
    }
    assert quiet(model, (*NO_NOISE, "lm_head")) - quiet(model) == {"lm_head.weight"}


# Patterns.


class EmbeddingNormModel(nn.Module):
    """Its own class's name, and those of outer modules, say nothing about what is inside."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3)) for _ in range(12)]
        self.embedding_model = nn.Sequential(*layers)
        self.table = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.table.weight
        self.Scale = nn.Module()
        self.Scale.Gain = nn.Parameter(torch.ones(3))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


PATTERNS: dict[str, tuple[Any, set[str]]] = {
    "a parameter": (("embedding_model.0.0.weight",), {"embedding_model.0.0.weight"}),
    "an ending, cut at dots": (
        ("1.0.weight",),  # and not 11.0.weight
        {"embedding_model.1.0.weight"},
    ),
    "a module": (
        ("embedding_model.3",),
        {f"embedding_model.3.{i}.{k}" for i in "01" for k in ("weight", "bias")},
    ),
    "a part of the path": (
        ("11",),
        {f"embedding_model.11.{i}.{k}" for i in "01" for k in ("weight", "bias")},
    ),
    "a class": (
        ("groupnorm",),
        {f"embedding_model.{i}.1.{k}" for i in range(12) for k in ("weight", "bias")},
    ),
    "a name in part, whatever the case": (("gai",), {"Scale.Gain"}),
    "a module's name in part, whatever the case": (("sCAL",), {"Scale.Gain"}),
    "a tied parameter by its other name": (("head",), {"table.weight"}),
    "embeddings": (("embed",), {"table.weight"}),
    "a regular expression": (
        r"embedding_model\.\d\.0\.weight",
        {f"embedding_model.{i}.0.weight" for i in range(10)},
    ),
    "a regular expression of another name": (r"head\..*", {"table.weight"}),
    "nothing": ((), set()),
    "what is frozen": (("frozen",), set()),
}


@pytest.mark.parametrize("kind", PATTERNS)
def test_patterns(kind: str) -> None:
    patterns, expected = PATTERNS[kind]
    assert quiet(EmbeddingNormModel(), patterns) == expected


def pieces(model: nn.Module) -> list[str]:
    """Names of modules and parameters, their endings, their parts, parts of those, and classes."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    endings = {name.split(".", cut)[-1] for name in names for cut in range(3)}
    components = {part for name in names for part in name.split(".")}
    classes = {type(module).__name__ for module in model.modules()}
    return sorted(endings | components | {part[1:4] for part in components if len(part) > 3} | classes)


def takes(model: nn.Module, entry: str, name: str) -> bool:
    """The rule in other code, which walks from the model down to the parameter."""
    path, module = name.split("."), model
    wanted = entry.split(".")
    if any(path[i : i + len(wanted)] == wanted for i in range(len(path))):
        return True
    for part in path[:-1]:
        module = getattr(module, part)
    words = [path[-1], type(module).__name__, *path[-2:-1]]
    return any(entry.casefold() in word.casefold() for word in words)


@given(st.data())
def test_any_patterns(data: st.DataObject) -> None:
    """Each trainable parameter once, in the model's order, in the group that the rule gives."""
    model = EmbeddingNormModel()
    entries = st.lists(st.sampled_from(pieces(model)), max_size=3)
    no_noise, no_decay = data.draw(entries), data.draw(entries)
    names: dict[Tensor, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    known = {e for e in pieces(model) if any(takes(model, e, n) for ns in names.values() for n in ns)}
    no_noise, no_decay = ([e for e in drawn if e in known] for drawn in (no_noise, no_decay))

    def spared(param: Tensor, those: list[str]) -> bool:
        return any(takes(model, entry, name) for entry in those for name in names[param])

    expected: dict[tuple[float, float], list[str]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            key = (0.0 if spared(param, no_decay) else DECAY, 0.0 if spared(param, no_noise) else NOISE)
            expected.setdefault(key, []).append(name)
    settings: Any = {"no_noise": no_noise, "no_weight_decay": tuple(no_decay)}
    groups = param_groups(model, weight_decay=DECAY, noise_scale=NOISE, **settings)
    assert named(groups) == expected
    order = [(DECAY, NOISE), (0.0, NOISE), (DECAY, 0.0), (0.0, 0.0)]
    assert list(named(groups)) == [key for key in order if key in expected]


# Bad input.


def test_an_entry_that_matches_nothing() -> None:
    """It is an error that names the entry, unless it is a default: a model need not have biases or
    embeddings."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    assert [g["noise_scale"] for g in param_groups(model, weight_decay=DECAY, noise_scale=NOISE)] == [NOISE]
    assert quiet(model, (*NO_NOISE, "0")) == {"0.weight"}
    for argument in ("no_noise", "no_weight_decay"):
        with pytest.raises(ValueError, match="matches no parameter") as error:
            param_groups(model, weight_decay=0, noise_scale=0, **{argument: ("bias", "clasifier")})
        assert_names(error, argument, "'clasifier'")


def test_one_string_is_not_a_part() -> None:
    with pytest.raises(ValueError, match="no_noise: 'weigh' matches no parameter") as error:
        quiet(nn.Linear(2, 2), "weigh")
    assert_names(error, "('weigh',)", "regular expression")
    assert quiet(nn.Linear(2, 2), ("weigh",)) == {"weight"}


@pytest.mark.parametrize(
    ("patterns", "error", "says"),
    [
        ("(", ValueError, "no_noise: '(' is not a regular expression"),
        (("",), ValueError, "no_noise: an empty string would match everything"),
        ((1,), TypeError, "no_noise: its entries must be strings, but one is 1"),
    ],
)
def test_bad_patterns(patterns: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as raised:
        quiet(nn.Linear(2, 2), patterns)
    assert_names(raised, says)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        row
        for row in BAD_HYPERPARAMETERS + BAD_ADAMW_HYPERPARAMETERS
        if row[0] in ("noise_scale", "weight_decay")
    ],
)
def test_bad_values(name: str, value: Any, says: str) -> None:
    values: Any = {"weight_decay": DECAY, "noise_scale": NOISE} | {name: value}
    with pytest.raises(ValueError, match=f"Invalid {name}") as error:
        param_groups(nn.Linear(2, 2), **values)
    assert_names(error, repr(value), says)


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, but is list"):
        param_groups(list(nn.Linear(2, 2).parameters()), weight_decay=0, noise_scale=0)


def test_a_frozen_model_has_no_groups() -> None:
    assert param_groups(nn.Linear(2, 2).requires_grad_(False), weight_decay=0, noise_scale=0) == []


# Optimizers.

MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "PATSAdamW": lambda groups: PATSAdamW(groups, lr=1e-2),
    "AdamW": lambda groups: AdamW(groups, lr=1e-2),
    "SGD": lambda groups: SGD(groups, lr=1e-2, momentum=0.9),
}


def optimizer_of(kind: str, model: nn.Module) -> tuple[Optimizer, Any]:
    """The optimizer, and the object that keeps the state of PATS."""
    optimizer = MAKE[kind](param_groups(model, weight_decay=DECAY, noise_scale=NOISE))
    return optimizer, optimizer if kind == "PATSAdamW" else PATS(optimizer)


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(4)).square().sum().backward()
    optimizer.step()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.LayerNorm(3))


@pytest.mark.parametrize("kind", MAKE)
def test_optimizers_know_the_names(kind: str) -> None:
    """In errors, and after a state_dict, a pickle or a copy. Only what gets noise has a state of PATS."""
    model = small()
    optimizer, pats = optimizer_of(kind, model)
    step(model, optimizer)
    noisy = [p for p in model.parameters() if "exp_avg_sens" in pats.state.get(p, {})]
    assert [id(p) for p in noisy] == [id(model.get_parameter("1.weight"))]

    other = small()
    loaded, _ = optimizer_of(kind, other)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    step(model, optimizer)
    step(other, loaded)
    assert_same_bits([p.data for p in model.parameters()], [p.data for p in other.parameters()])
    for group, same in zip(optimizer.param_groups, loaded.param_groups, strict=True):
        assert group["param_names"] == same["param_names"]
        assert group["noise_scale"] == same["noise_scale"]

    weight = other.get_parameter("1.weight")
    weight.grad = torch.ones(3, 3).to_sparse()
    with pytest.raises(TypeError, match=r"1\.weight"):
        loaded.step()


def test_the_order_of_another_model_is_told() -> None:
    """Other patterns give other positions, on which the noise depends. Loading says so, with the names."""
    model = small()
    optimizer, _ = optimizer_of("PATSAdamW", model)
    step(model, optimizer)
    groups = param_groups(model, weight_decay=DECAY, noise_scale=NOISE, no_noise=("bias", "norm", "1.weight"))
    other = PATSAdamW(groups)
    with pytest.raises(ValueError, match="another order"):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))


# Embeddings of words that do not occur.


def unused_rows(no_noise: Any, steps: int) -> tuple[Tensor, Tensor]:
    """The word embeddings of tokens that are in no batch, before and after training without decay."""
    model = bert(dropout=0.0)
    groups = param_groups(model, weight_decay=0.0, noise_scale=NOISE, no_noise=no_noise)
    optimizer = PATSAdamW(groups, lr=1e-4, seed=3)
    table = model.get_parameter("bert.embeddings.word_embeddings.weight")
    before = table.detach().clone()
    for batch in examples()[:steps]:
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"][None] % 30, labels=batch["labels"][None]).loss.backward()
        optimizer.step()
    assert not torch.equal(before[:30], table[:30])
    return before[30:], table.detach()[30:]


def test_unused_embeddings_rest() -> None:
    """By default they do not change. With noise they would walk: their sensitivity is 0, so their gates are
    open, and nothing ever moves them back. A step's noise is N(0, NOISE^2), except in the first step, which
    has none."""
    before, after = unused_rows(NO_NOISE, steps=10)
    assert torch.equal(before, after)
    before, after = unused_rows(("bias", "norm"), steps=10)
    walk = after - before
    assert walk.numel() == 60 * 32
    # Five standard errors of 1,920 draws: of a standard deviation, 1/sqrt(2 n) of it; of a mean, 1/sqrt(n).
    expected = NOISE * math.sqrt(9)
    assert walk.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * walk.numel()))
    assert abs(walk.mean().item()) < 5 * expected / math.sqrt(walk.numel())


# The stock Trainer.

STEPS = 4
ROADS = ("optimizer_cls_and_kwargs", "optimizers", "optimizers, AdamW and PATS")


def trainer(road: str, folder: Path, seed: int = 1) -> tuple[Trainer, Any]:
    """A Trainer and, once there is an optimizer, the object that keeps the state of PATS."""
    model = bert(seed=seed)
    groups = param_groups(model, weight_decay=DECAY, noise_scale=NOISE)
    options: dict[str, Any] = {"optimizer_cls_and_kwargs": (PATSAdamW, {"params": groups, "lr": 1e-3})}
    pats: Any = None
    if road != "optimizer_cls_and_kwargs":
        optimizer = (AdamW if "AdamW" in road else PATSAdamW)(groups, lr=1e-3)
        pats = PATS(optimizer) if "AdamW" in road else optimizer
        options = {"optimizers": (optimizer, None)}
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        weight_decay=0.7,  # the groups' own value counts
        save_steps=STEPS // 2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=examples(), **options), pats


def tensors(made: Trainer, pats: Any) -> list[Tensor]:
    optimizer: Any = made.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
    model: Any = made.model
    states = [optimizer.state, {} if pats is None else pats.state]
    kept = [s[p][key] for p in model.parameters() for s in states for key in sorted(s.get(p, {}))]
    return [p.data for p in model.parameters()] + kept


@pytest.mark.parametrize("road", ROADS)
def test_trainer(road: str, tmp_path: Path) -> None:
    """Without a subclass: the groups arrive unchanged, and a resumed run continues to the bit."""
    full, pats = trainer(road, tmp_path / "full")
    full.train()
    optimizer: Any = full.optimizer
    found = [(g["weight_decay"], g["noise_scale"], g["param_names"]) for g in optimizer.param_groups]
    expected = param_groups(bert(), weight_decay=DECAY, noise_scale=NOISE)
    assert found == [(g["weight_decay"], g["noise_scale"], g["param_names"]) for g in expected]
    assert all(group["lr"] < 1e-3 for group in optimizer.param_groups)  # the Trainer's schedule

    checkpoint = tmp_path / f"checkpoint-{STEPS // 2}"
    shutil.copytree(tmp_path / "full" / checkpoint.name, checkpoint)
    resumed, other = trainer(road, tmp_path / "resumed", seed=2)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_bits(tensors(full, pats), tensors(resumed, other))
    noisy = {
        name
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
        if "exp_avg_sens" in (optimizer.state if pats is None else pats.state).get(param, {})
    }
    assert noisy == set(expected[0]["param_names"])

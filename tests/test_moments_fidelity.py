"""The figures of examples/moments_fidelity.py, compared with scikit-learn, scipy and the kernels."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score, jaccard_score
from torch import nn

import moments_fidelity
from moments_fidelity import KINDS, Arguments, Sensitivity, agreement, by_kind, kind_of, of_moments
from pats_kernels import PATSAdamW


def sensitivity(seed: int, count: int = 3000) -> Sensitivity:
    """Over some orders of magnitude. Every tenth element has had no gradient."""
    random = torch.Generator().manual_seed(seed)
    S, U = (torch.randn(count, generator=random).exp() ** 2 for _ in range(2))
    S[seed::10] = 0
    return Sensitivity(S, U * (S > 0))


@pytest.mark.parametrize("uncertainty", ["product", "ucb", "none"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_agreement_is_what_others_compute(gamma: float, uncertainty: str) -> None:
    a = sensitivity(1)
    b = sensitivity(2)
    b = Sensitivity(a.S**0.7 * b.S**0.3, a.U**0.7 * b.U**0.3)
    found = agreement(a, b, gamma, uncertainty)
    live = ((a.S > 0) & (b.S > 0)).numpy()
    assert found["numel"] == live.sum() < 3000
    q = [s.score(uncertainty).numpy()[live] for s in (a, b)]
    gates = [s.gate(gamma, uncertainty).numpy()[live] for s in (a, b)]
    noisy = [gate > 0 for gate in gates]
    assert found["rank"] == pytest.approx(spearmanr(*q)[0], abs=1e-12)  # pyright: ignore
    assert found["overlap"] == pytest.approx(jaccard_score(*noisy), abs=1e-12)
    assert found["kappa"] == pytest.approx(cohen_kappa_score(*noisy), abs=1e-12)
    assert found["gate_difference"] == pytest.approx(np.abs(gates[0] - gates[1]).mean(), rel=1e-5)
    assert (found["gate_a"], found["gate_b"]) == pytest.approx([gate.mean() for gate in gates], rel=1e-5)
    assert 0.2 < found["kappa"] < found["rank"] < 1


def test_agreement_by_chance() -> None:
    """For independent sets, the overlap is that by chance, and kappa and the correlation are 0, to 5 standard
    errors of 1 / sqrt(n)."""
    found = agreement(sensitivity(3, 20_000), sensitivity(4, 20_000), 1.0, "product")
    error = 5 / np.sqrt(found["numel"])
    assert abs(found["rank"]) < error
    assert abs(found["kappa"]) < error
    assert found["overlap"] == pytest.approx(found["by_chance"], abs=error)


def test_agreement_with_itself_and_with_nothing() -> None:
    a = sensitivity(5)
    found = agreement(a, a, 1.0, "product")
    assert (found["rank"], found["overlap"], found["kappa"], found["gate_difference"]) == (
        pytest.approx(1),
        1,
        1,
        0,
    )
    steady = Sensitivity(a.S, torch.zeros_like(a.U))  # like the moments in their first step: no gate opens
    found = agreement(steady, a, 1.0, "product")
    assert np.isnan(found["rank"])
    assert (found["overlap"], found["kappa"], found["gate_a"]) == (0, pytest.approx(0), 0)
    assert agreement(Sensitivity(a.S * 0, a.U), a, 1.0, "product") == {"numel": 0}


def test_only_so_many_are_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of n has the correlation of all elements, to some 1 / sqrt(n)."""
    a, b = sensitivity(6), sensitivity(7)
    b = Sensitivity(a.S * b.S, a.U * b.U)
    of_all = agreement(a, b, 1.0, "product")["rank"]
    monkeypatch.setattr(moments_fidelity, "RANKED", 500)
    of_some = agreement(a, b, 1.0, "product")["rank"]
    assert of_some != of_all
    assert of_some == pytest.approx(of_all, abs=4 / np.sqrt(500))


def test_kinds() -> None:
    encoder = "bert.encoder.layer.1."
    names = {
        "bert.embeddings.word_embeddings.weight": "word embeddings",
        "bert.embeddings.position_embeddings.weight": "other embeddings",
        "bert.embeddings.LayerNorm.weight": "LayerNorm",
        f"{encoder}attention.self.key.weight": "attention query, key",
        f"{encoder}attention.self.value.weight": "attention value, output",
        f"{encoder}attention.output.dense.weight": "attention value, output",
        f"{encoder}attention.output.dense.bias": "biases",
        f"{encoder}intermediate.dense.weight": "feed-forward",
        f"{encoder}output.dense.weight": "feed-forward",
        "bert.pooler.dense.weight": "pooler, classifier",
        "classifier.weight": "pooler, classifier",
    }
    assert {name: kind_of(name) for name in names} == names
    assert set(names.values()) == set(KINDS)


def test_means_are_weighted_by_elements() -> None:
    found: dict[str, dict[str, float]] = {
        "classifier.weight": {"numel": 3, "rank": 0.5},
        "bert.pooler.dense.weight": {"numel": 1, "rank": 0.1},
        "classifier.bias": {"numel": 4, "rank": float("nan"), "kappa": 1.0},
    }
    assert by_kind(found) == {
        "all": {"numel": 8, "rank": 0.4, "kappa": 1.0},
        "biases": {"numel": 4, "kappa": 1.0},
        "pooler, classifier": {"numel": 4, "rank": 0.4},
    }


@pytest.mark.parametrize("uncertainty", ["product", "ucb", "none"])
def test_of_moments_is_what_the_optimizer_had(uncertainty: Any) -> None:
    """PATSAdamW(sensitivity="moments") stores the means of its S and U, from the weights before the step."""
    arguments = Arguments("", "", "", adam_beta2=0.99, uncertainty=uncertainty)
    param = nn.Parameter(torch.randn(500, generator=torch.Generator().manual_seed(0)))
    optimizer = PATSAdamW(
        [param], betas=arguments.betas, uncertainty=uncertainty, noise_scale=1e-3, sensitivity="moments"
    )
    for step in range(1, 5):
        param.grad = torch.randn(500, generator=torch.Generator().manual_seed(step)).pow(3)
        before = param.detach().clone()
        optimizer.step()
        state = optimizer.state[param]
        taken = of_moments(before, state, arguments)
        torch.testing.assert_close(torch.stack((taken.S.mean(), taken.U.mean())), state["sens_stats"])
        assert bool(taken.U.any()) == (step > 1 and uncertainty != "none")

"""Measures the effect of rounding S and U, and m and v, with the same random bits.

Three runs over the same gradients: float32 averages; bfloat16 with shared bits, as specified; and bfloat16
with separate bits for the second of each pair. The arithmetic is that of the update, in float32.
"""

from typing import TypedDict

import torch
from torch import Tensor

from pats_kernels.philox import random_words
from pats_kernels.reference import round_stochastically

SENS_BETAS, BETAS, EPS, GAMMA = (0.85, 0.95), (0.9, 0.999), 1e-8, 1.0
SETTLING = 200  # first steps, which are not counted


class Cost(TypedDict):
    """Errors against float32, over all elements and counted steps.

    `..._error_correlation`: the correlation between the accumulated relative errors of the two averages.
    `gate_bias`, `gate_deviation`: mean and root mean square of the gate's error; a gate is at most 1.
    `noise_variance_bias`: relative error of the mean square of the gate.
    `update_bias`: relative error of the update m^ / (sqrt(v^) + eps) along float32's update.
    `update_deviation`: root mean square of the update's error, relative to that of the update.
    `..._bias_error`: standard errors of the means, over blocks of 100 steps.
    """

    bits: str
    sens_unc_error_correlation: float
    gate_bias: float
    gate_bias_error: float
    gate_deviation: float
    noise_variance_bias: float
    noise_variance_bias_error: float
    moments_error_correlation: float
    update_bias: float
    update_bias_error: float
    update_deviation: float


class Averages:
    """S, U, m and v of one run. `bits`: None (float32), "shared" or "independent"."""

    def __init__(self, numel: int, bits: str | None) -> None:
        self.bits = bits
        self.S, self.U, self.m, self.v = (torch.zeros(numel) for _ in range(4))
        self.means = torch.zeros(2)

    def step(self, w: Tensor, g: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """The gate, from rounded averages and delayed means, and AdamW's update without bias corrections,
        from moments before rounding: as in the kernels."""
        s = (w * g).abs()
        self.S = self._stored(self.S + (1 - SENS_BETAS[0]) * (s - self.S), words >> 16)
        second = words >> 16 if self.bits == "shared" else words & 0xFFFF
        self.U = self._stored(self.U + (1 - SENS_BETAS[1]) * ((s - self.S).abs() - self.U), second)
        m = self.m + (1 - BETAS[0]) * (g - self.m)
        v = self.v + (1 - BETAS[1]) * (g * g - self.v)
        self.m, self.v = self._stored(m, words >> 16), self._stored(v, second)
        q = (self.S / self.means[0]) * (self.U / self.means[1])
        gate = torch.tanh((1 / q - GAMMA).clamp(min=0)) if bool(self.means[0] > 0) else torch.zeros_like(q)
        self.means = torch.stack((self.S.double().mean(), self.U.double().mean())).float()
        return gate, m / (v.sqrt() + EPS)

    def _stored(self, x: Tensor, bits: Tensor) -> Tensor:
        return x if self.bits is None else round_stochastically(x, bits).float()


def measure(numel: int, steps: int, seed: int) -> list[Cost]:
    """Runs all on the same data. Weights have standard deviation 0.04. The gradients' scale is log-normal
    over the elements. Their noise is Student's t with five degrees of freedom, and the size of their mean is
    0.1 to 1 times their scale."""
    random = torch.Generator().manual_seed(seed)
    w = 0.04 * torch.randn(numel, generator=random)
    size = 1e-3 * torch.exp(1.5 * torch.randn(numel, generator=random))
    drift = (
        torch.rand(numel, generator=random).mul(0.9).add(0.1) * torch.randn(numel, generator=random).sign()
    )
    exact = Averages(numel, None)
    rounded = [Averages(numel, bits) for bits in ("shared", "independent")]
    sums = [_Sums() for _ in rounded]
    for step in range(1, steps + 1):
        noise = torch.randn(numel, generator=random)
        chi = torch.randn(5, numel, generator=random).square().mean(dim=0).sqrt()
        g = size * (drift + noise / chi)
        words = random_words(seed, step, 0, numel, rounding=True).flatten()[:numel]
        expected = exact.step(w, g, words)
        for run, sum_ in zip(rounded, sums, strict=True):
            got = run.step(w, g, words)
            if step > SETTLING:
                sum_.add(exact, run, expected, got)
    return [sum_.cost(str(run.bits)) for run, sum_ in zip(rounded, sums, strict=True)]


class _Sums:
    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def add(
        self,
        exact: Averages,
        run: Averages,
        expected: tuple[Tensor, Tensor],
        got: tuple[Tensor, Tensor],
    ) -> None:
        (gate, update), (gate_, update_) = ((a.double(), b.double()) for a, b in (expected, got))
        errors = [
            (getattr(run, name).double() - getattr(exact, name)) / getattr(exact, name).double().abs()
            for name in ("S", "U", "m", "v")
        ]
        # The error of m's magnitude, which is what is rounded. Near m = 0 the relative error says nothing.
        errors[2] = (errors[2] * exact.m.sign()).where(exact.m.abs() > exact.v.sqrt() * 0.05, 0.0)
        self.rows.append(
            [
                float((gate_ - gate).mean()),
                float((gate_ - gate).square().mean()),
                float(gate_.square().mean() / gate.square().mean() - 1),
                float((update_ * update).sum() / (update * update).sum() - 1),
                float((update_ - update).square().mean() / update.square().mean()),
                float(torch.corrcoef(torch.stack(errors[:2]))[0, 1]),
                float(torch.corrcoef(torch.stack(errors[2:]))[0, 1]),
            ]
        )

    def cost(self, bits: str) -> Cost:
        rows = torch.tensor(self.rows, dtype=torch.float64)
        means = rows.mean(dim=0).tolist()
        blocks = torch.stack([block.mean(dim=0) for block in rows.split(100) if len(block) == 100])
        errors = (blocks.std(dim=0) / len(blocks) ** 0.5).tolist()
        return {
            "bits": bits,
            "sens_unc_error_correlation": means[5],
            "gate_bias": means[0],
            "gate_bias_error": errors[0],
            "gate_deviation": means[1] ** 0.5,
            "noise_variance_bias": means[2],
            "noise_variance_bias_error": errors[2],
            "moments_error_correlation": means[6],
            "update_bias": means[3],
            "update_bias_error": errors[3],
            "update_deviation": means[4] ** 0.5,
        }

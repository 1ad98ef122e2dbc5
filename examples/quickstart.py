"""Attaches PATS to an optimizer, in one line: a small classifier, trained with and without noise.

python examples/quickstart.py
"""

import torch
from torch import nn

from pats_kernels import PATS


def spirals(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two spirals wound around each other: points [count, 2], and the spiral of each point, [count]."""
    label = torch.randint(0, 2, (count,), generator=generator)
    turn = 1 + 2 * torch.rand(count, generator=generator)
    angle = torch.pi * (2 * turn + label)
    points = turn[:, None] * torch.stack((angle.cos(), angle.sin()), dim=1)
    return points + 0.08 * torch.randn(count, 2, generator=generator), label


def train(noise_scale: float) -> float:
    """Trains with this noise_scale (0: plain AdamW); returns the accuracy on new points."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    points, label = spirals(256, generator)
    model = nn.Sequential(nn.Linear(2, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 2))

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pats = PATS(optimizer, noise_scale=noise_scale)  # the one line

    for _ in range(400):
        loss = nn.functional.cross_entropy(model(points), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    loss = nn.functional.cross_entropy(model(points), label)
    stats = [pats.state[param]["sens_stats"][0].item() for param in model.parameters() if param in pats.state]
    print(f"noise_scale {noise_scale:g}: loss {loss.item():.4f}, mean sensitivity of each tensor: ", end="")
    print(", ".join(f"{mean:.1e}" for mean in stats) or "not kept")
    points, label = spirals(4096, generator)
    return (model(points).argmax(dim=1) == label).float().mean().item()


if __name__ == "__main__":
    for noise_scale in (0.0, 1e-3):
        print(f"  accuracy on new points {train(noise_scale):.1%}")

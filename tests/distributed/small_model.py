"""A model that does not divide evenly, its data, and whole tensors out of their shards."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

VOCABULARY, WIDTH = 7, 5
ROWS = 12  # of a batch: divisible by 1, 2, 3 and 4 ranks


class SmallModel(nn.Module):
    """Rows of 7, 5 and `hidden`; on 4 ranks `first` has one rank, with hidden=3, whose shards are empty.

    Shards start at elements that are no multiple of 4. Tensor parallelism wants an even `hidden`: 12.
    """

    def __init__(self, hidden: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first = nn.Linear(WIDTH, hidden)
        self.second = nn.Linear(hidden, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        return self.norm(embedded + self.second(torch.tanh(self.first(embedded))))


def small_model(hidden: int = 3, dtype: torch.dtype = torch.float32) -> SmallModel:
    """The same weights on every rank and in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return SmallModel(hidden).to(dtype)


def loss_of(model: nn.Module, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """Of the batch of `step`, or of this rank's part of it: the parts' mean is the whole's."""
    random = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCABULARY, (ROWS, 2), generator=random)
    targets = torch.randn(ROWS, 2, WIDTH, generator=random)
    part = slice(rank, None, world_size)
    return (model(tokens[part]).float() - targets[part]).square().mean()


def whole(tensor: Tensor) -> Tensor:
    """The tensor that a DTensor is a shard of, copied; every rank of its mesh has to ask."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def gather(model: nn.Module, *states: Mapping[Tensor, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Parameters by name, and of each optimizer's or PATS's `state` the entries, as name.entry."""
    tensors: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        tensors[name] = whole(param)
        for state in states:
            for key, value in state.get(param, {}).items():
                tensors[f"{name}.{key}"] = whole(torch.as_tensor(value))
    return tensors

"""Tensors with models' shapes and random values: needs no network, no backward pass, no transformers."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
SEED = 0
STANDARD_DEVIATION = 0.02  # of weights, as these models are initialized
TINY_TENSORS = 4000
TINY_SIZES = (1, 7, 16, 64, 100, 256, 768)  # in turn: biases, norms, adapters


class Gradients(NamedTuple):
    """Parameters and their loss gradients, side by side, contiguous, of one dtype on one device."""

    params: list[Tensor]
    grads: list[Tensor]

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.params)


def _bert(width: int, layers: int, vocabulary: int, positions: int, types: int) -> Iterator[Shape]:
    """BERT or RoBERTa with its head for masked words, which shares the embedding's matrix."""
    norm, square = [(width,), (width,)], [(width, width), (width,)]
    yield from [(vocabulary, width), (positions, width), (types, width), *norm]
    for _ in range(layers):
        yield from [*square * 4, *norm]
        yield from [(4 * width, width), (4 * width,), (width, 4 * width), (width,), *norm]
    yield from [*square, *norm, (vocabulary,)]


def _decoder_layer(width: int, inner: int, keys: int, biases: bool) -> list[Shape]:
    """A layer of Llama or Qwen; `keys`: the width of its keys and of its values."""
    shapes: list[Shape] = []
    for out in (width, keys, keys):
        shapes += [(out, width), (out,)] if biases else [(out, width)]
    return [*shapes, (width, width), (inner, width), (inner, width), (width, inner), (width,), (width,)]


def _tiny() -> list[Shape]:
    return [(TINY_SIZES[i % len(TINY_SIZES)],) for i in range(TINY_TENSORS)]


SHAPES: dict[str, Callable[[], list[Shape]]] = {
    "bert-base-uncased": lambda: list(_bert(768, 12, 30522, 512, 2)),
    "bert-large-uncased": lambda: list(_bert(1024, 24, 30522, 512, 2)),
    "roberta-large": lambda: list(_bert(1024, 24, 50265, 514, 1)),
    "llama-3.2-1b": lambda: [(128256, 2048), *16 * _decoder_layer(2048, 8192, 512, False), (2048,)],
    "qwen2.5-7b-layer": lambda: _decoder_layer(3584, 18944, 512, True),
    "4000-tiny": _tiny,
    "tiny": lambda: list(_bert(16, 1, 100, 8, 2)),  # for tests
}


def random_gradients(name: str, device: torch.device, dtype: torch.dtype) -> Gradients:
    """Normal weights and, three decades apart, gradients of normals cubed: as unequal as real ones.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    if name not in SHAPES:
        raise ValueError(f"Unknown shapes: {name!r} (known: {', '.join(SHAPES)})")
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(shape: Shape) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    shapes = SHAPES[name]()
    params = [normal(shape).mul_(STANDARD_DEVIATION).to(dtype) for shape in shapes]
    return Gradients(params, [normal(shape).pow_(3).mul_(1e-3).to(dtype) for shape in shapes])

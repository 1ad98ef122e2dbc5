"""The random bits: published vectors, then an independent NumPy version over the counter's whole range."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Hyper

from pats_kernels import philox, reference

ONES = 0xFFFFFFFF
COUNTERS = {
    "zeros": ((0, 0, 0, 0), (0, 0)),
    "ones": ((ONES, ONES, ONES, ONES), (ONES, ONES)),
    "pi": ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)),
}
KNOWN_ANSWERS = [  # Random123's kat_vectors
    (7, "zeros", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ones", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "pi", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "zeros", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ones", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "pi", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
WORD = st.integers(0, 2**32 - 1)
SEED = st.integers(0, 2**64 - 1)
OFFSET = st.one_of(st.integers(0, 100), st.integers(2**34 - 50, 2**34 + 50), st.integers(0, 2**60))


@pytest.mark.parametrize(("rounds", "name", "answer"), KNOWN_ANSWERS)
def test_known_answers(rounds: int, name: str, answer: str) -> None:
    counter, key = COUNTERS[name]
    assert " ".join(f"{int(word):08x}" for word in philox.philox4x32(counter, key, rounds)) == answer


@pytest.mark.parametrize(("rounds", "name", "answer"), KNOWN_ANSWERS)
def test_known_answers_of_the_oracle(rounds: int, name: str, answer: str) -> None:
    counter, key = COUNTERS[name]
    words = oracle.philox(np.array(counter, dtype=np.uint64), key, rounds)
    assert " ".join(f"{int(word):08x}" for word in words) == answer


def test_default_is_seven_rounds() -> None:
    counter, key = COUNTERS["pi"]
    assert int(philox.philox4x32(counter, key)[0]) == 0x4DFCCABA


@pytest.mark.parametrize("rounding", [False, True])
@given(seed=SEED, step=WORD, tensor_id=WORD, offset=OFFSET, numel=st.integers(1, 40))
def test_words(rounding: bool, seed: int, step: int, tensor_id: int, offset: int, numel: int) -> None:
    got = philox.random_words(seed, step, tensor_id, numel, offset, rounding=rounding)
    first = offset // 4 * 4
    index = np.arange(first, first + got.numel())
    expected = oracle.words(Hyper(seed=seed, step=step, tensor_id=tensor_id), index, rounding)
    assert first + got.numel() >= offset + numel
    np.testing.assert_array_equal(got.flatten().numpy().astype(np.uint64), expected)


def test_words_of_a_step_tensor() -> None:
    """A counter on the device replaces an int: the same words, without a sync."""
    expected = philox.random_words(3, 17, 5, 20)
    assert torch.equal(philox.random_words(3, torch.tensor(17), 5, 20), expected)


def test_streams_differ() -> None:
    """Noise and rounding, steps, tensors, both halves of the seed: no two streams share a group of words."""
    streams = [
        philox.random_words(1, 1, 1, 4000),
        philox.random_words(1, 1, 1, 4000, rounding=True),
        philox.random_words(1, 2, 1, 4000),
        philox.random_words(1, 1, 2, 4000),
        philox.random_words(2, 1, 1, 4000),
        philox.random_words(1 + 2**32, 1, 1, 4000),
        philox.random_words(1, 1, 1, 4000, offset=4000),
        philox.random_words(1, 1, 1, 4000, offset=2**34),
    ]
    assert torch.unique(torch.cat(streams), dim=0).shape[0] == len(streams) * 1000


@given(seed=SEED, step=WORD, tensor_id=WORD, offset=OFFSET, numel=st.integers(0, 40))
def test_normals(seed: int, step: int, tensor_id: int, offset: int, numel: int) -> None:
    """To 1e-12: log, sqrt and cos of two libms differ by an ulp each, times an |z| of at most 6.8."""
    got = reference.philox_normal(seed, step, tensor_id, numel, offset)
    h = Hyper(seed=seed, step=step, tensor_id=tensor_id)
    expected = oracle.normal(h, np.arange(offset, offset + numel))
    assert got.dtype == torch.float64
    assert got.shape == (numel,)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-12)


@given(seed=SEED, offset=st.integers(0, 300), numel=st.integers(0, 200))
def test_a_shard_draws_its_part_of_the_whole(seed: int, offset: int, numel: int) -> None:
    whole = reference.philox_normal(seed, 9, 2, 512)
    assert torch.equal(reference.philox_normal(seed, 9, 2, numel, offset), whole[offset : offset + numel])


EXTREME_WORDS = [0, 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30, ONES - 1, ONES]


@pytest.mark.parametrize("radius_word", EXTREME_WORDS)
@pytest.mark.parametrize("angle_word", EXTREME_WORDS)
def test_box_muller_at_the_ends(radius_word: int, angle_word: int) -> None:
    """Compared with the formula. Near U = 1, log's argument is off by 2^-54, so r = sqrt(2 (1 - U)) by
    2^-38."""
    r = np.sqrt(-2 * np.log((radius_word + 0.5) / 2**32))
    theta = 2 * np.pi * (angle_word + 0.5) / 2**32
    got = philox.normals(torch.tensor([radius_word, angle_word, ONES, 0]))[:2]
    np.testing.assert_allclose(got.numpy(), [r * np.cos(theta), r * np.sin(theta)], rtol=0, atol=2.0**-38)

"""How a float32 counts steps past 2^24, where adding 1 no longer changes it.

Up to 2^24 a counter is the number of steps itself, as in `torch.optim`. From there on, each step moves it to
the next float32, and the position of that float32 gives the count: 2^24 + 2n stands for step 2^24 + n until
the spacing doubles at 2^25, and so on. C++ and Triton do the same: `csrc/arithmetic.h`,
`backends/triton_kernel.py`.
"""

import torch
from torch import Tensor

EXACT = 2**24
_BITS = 0x4B800000  # of 2^24 as a float32
MOST_STEPS = EXACT + (0x7F7FFFFF - _BITS)  # of the largest float32: 889,192,447


def steps_of(counter: Tensor) -> Tensor:
    """The number of steps that a float32 `counter` stands for: int64, of its shape and device."""
    beyond = counter.view(torch.int32).to(torch.int64) - _BITS
    return torch.where(beyond > 0, EXACT + beyond, counter.to(torch.int64))


def counter_at(steps: Tensor) -> Tensor:
    """The float32 counter for whole numbers of any dtype in [0, `MOST_STEPS`]: the inverse of `steps_of`."""
    whole = steps.to(torch.int64)
    beyond = (whole - EXACT + _BITS).clamp(0, 0x7F7FFFFF).to(torch.int32).view(torch.float32)
    return torch.where(whole > EXACT, beyond, whole.to(torch.float32))


def advanced(counter: Tensor) -> Tensor:
    """The counter one step later."""
    return torch.where(counter < EXACT, counter + 1, (counter.view(torch.int32) + 1).view(torch.float32))

"""How a float32 counts steps past 2^24, where adding 1 to it changes nothing.

From there on a step moves the counter to the next float32, and which one it is tells the count: the float
2^24 + 2n stands for step 2^24 + n until the spacing doubles at 2^25, and so on. Up to 2^24 a counter is the
number of steps itself, as in `torch.optim`. C++ and Triton do the same: `csrc/arithmetic.h`,
`backends/triton_kernel.py`.
"""

import torch
from torch import Tensor

EXACT = 2**24
_BITS = 0x4B800000  # of 2^24 as a float32
MOST_STEPS = EXACT + (0x7F7FFFFF - _BITS)  # of the largest float32: 889,192,447


def steps_of(counter: Tensor) -> Tensor:
    """The steps counted: int64, of the shape and device of `counter`, which is float32."""
    beyond = counter.view(torch.int32).to(torch.int64) - _BITS
    return torch.where(beyond > 0, EXACT + beyond, counter.to(torch.int64))


def counter_at(steps: Tensor) -> Tensor:
    """The float32 counter of whole numbers in [0, `MOST_STEPS`], of any dtype: `steps_of`'s inverse."""
    whole = steps.to(torch.int64)
    beyond = (whole - EXACT + _BITS).clamp(0, 0x7F7FFFFF).to(torch.int32).view(torch.float32)
    return torch.where(whole > EXACT, beyond, whole.to(torch.float32))


def advanced(counter: Tensor) -> Tensor:
    """The counter one step later."""
    return torch.where(counter < EXACT, counter + 1, (counter.view(torch.int32) + 1).view(torch.float32))

"""Tests an installed package: `python tests/installed.py` steps with "cpp" and prints a digest.

It needs only torch and NumPy. On one machine, all builds of the same source with the same compiler give the
same digest. The numbers are compared with eager's.
"""

import hashlib
import sys

import torch

import pats_kernels

NOISE_SCALE = 1e-2


def tensors(backend: str) -> list[torch.Tensor]:
    """Parameters and averages after three steps of PATSAdamW; all operands are exact binary fractions."""
    numbers = torch.arange(5001)
    weights = (numbers % 251 - 125) / 64
    params = [weights.clone().requires_grad_(), weights.bfloat16().reshape(3, -1).requires_grad_()]
    optimizer = pats_kernels.PATSAdamW(params, lr=1e-3, noise_scale=NOISE_SCALE, seed=7, backend=backend)
    for step in range(3):
        gradient = ((numbers * (37 + step)) % 101 - 50) / 64
        for param in params:
            param.grad = gradient.to(param.dtype).reshape(param.shape)
        optimizer.step()
    averages = [optimizer.state[param][name] for param in params for name in ("exp_avg_sens", "exp_avg_unc")]
    return [*(param.detach() for param in params), *averages]


def digest() -> str:
    found = tensors("cpp")
    # Two steps of noise: fast normals are within 2e-3 of eager's. AdamW's step and the gates differ only
    # in their last bits, far below that.
    difference = (found[0] - tensors("eager")[0]).abs().max().item()
    assert difference < NOISE_SCALE * 2 * 2e-3, f"cpp is {difference} off eager"
    bits = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in found)
    return hashlib.sha256(bits).hexdigest()


def main() -> None:
    reason = pats_kernels.available_backends()["cpp"]
    if reason is not None:
        sys.exit(f"cpp cannot run: {reason}")
    print(pats_kernels.__file__)
    print(digest())


if __name__ == "__main__":
    main()

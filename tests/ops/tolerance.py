"""How close is close enough: twice the error plain PyTorch makes in that dtype, no more."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """`ours` may be at most twice as far from `exact` (float64) as `plain` is.

    On top comes a floor for results that plain PyTorch happens to hit: half a unit in the last
    place of the result's dtype, and a few roundings of the float32 (float64) arithmetic before it.
    """
    assert ours.dtype == plain.dtype, (ours.dtype, plain.dtype)
    assert ours.shape == plain.shape == exact.shape, (ours.shape, plain.shape, exact.shape)
    if ours.numel() == 0:
        return
    working = torch.promote_types(ours.dtype, torch.float32)
    floor = (
        torch.finfo(ours.dtype).eps / 2 * exact.abs()
        + 8 * torch.finfo(working).eps * exact.abs().max()
        + torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    )
    allowed = 2 * (plain.double() - exact).abs().max() + floor
    error = (ours.double() - exact).abs()
    worst = (error - allowed).argmax()
    assert bool((error <= allowed).all()), (
        f"error {error.flatten()[worst]:.3e} at {worst}, allowed {allowed.flatten()[worst]:.3e}"
    )

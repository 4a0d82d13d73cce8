"""How close is close enough: twice the error plain PyTorch makes in that dtype, no more."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Where each product has its operands.
_FACTORS = {
    **{aten.mm.default: (0, 1), aten.addmm.default: (1, 2)},
    **{aten.convolution.default: (0, 1), aten.convolution_backward.default: (0, 1, 2)},
}


def assert_as_accurate(
    ours: Tensor, plain: Tensor, exact: Tensor, size: Tensor | None = None
) -> None:
    """`ours` may be at most twice as far from `exact` (float64) as `plain` is.

    On top comes a floor for results that plain PyTorch happens to hit: half a unit in the last
    place of the result's dtype, and a few roundings of the float32 (float64) arithmetic before it.
    These are of numbers as large as `exact`, or as `size`: what the sums are of the magnitudes of
    their terms, where these may cancel.
    """
    assert ours.dtype == plain.dtype, (ours.dtype, plain.dtype)
    assert ours.shape == plain.shape == exact.shape, (ours.shape, plain.shape, exact.shape)
    if ours.numel() == 0:
        return
    working = torch.promote_types(ours.dtype, torch.float32)
    floor = (
        torch.finfo(ours.dtype).eps / 2 * exact.abs()
        + 8 * torch.finfo(working).eps * (exact if size is None else size).abs().max()
        + torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    )
    allowed = 2 * (plain.double() - exact).abs().max() + floor
    error = (ours.double() - exact).abs()
    worst = (error - allowed).argmax()
    assert bool((error <= allowed).all()), (
        f"error {error.flatten()[worst]:.3e} at {worst}, allowed {allowed.flatten()[worst]:.3e}"
    )


class TF32Products(TorchDispatchMode):
    """torch's float32 products of what tensor cores see of their operands, 19 bits of 32.

    torch may use TF32 or not: for odd and for small sizes its libraries do not, and for others they
    round where the tensor cores cut off.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args = list(args)
        for i in _FACTORS.get(func, ()):
            if args[i].dtype == torch.float32:
                args[i] = (args[i].view(torch.int32) & -(1 << 13)).view(torch.float32)
        return func(*args, **(kwargs or {}))

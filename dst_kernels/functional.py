"""Offer stateless operations: masks, masked weights, masked products and the sparse regulariser.

All take a `weight` of at least two dimensions (a layer's, or any scores) and a `threshold`. The
threshold's shape says what one value governs: `[out]` a row, `[]` or `[1]` the whole weight, the
weight's own shape one element. A weight is kept where |weight| > threshold (strictly).

`reset_ratio` is the collapse guard: if at most that share of the weights would remain, all
thresholds count as 0 in this call; `None` switches it off. No function here writes to its
arguments; the layers of `dst_kernels.nn` also write the reset into their thresholds while training.

Tensors are float16, bfloat16, float32 or float64 on one device. Wrong dtypes raise TypeError; wrong
shapes, devices and names ValueError; a backend that is not available RuntimeError.

Method and formulas: Liu et al., "Dynamic Sparse Training", ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from . import autograd, ops, reference
from .arguments import REAL, REAL_DTYPES, require, require_integer, require_tensors
from .autograd import MaskOptions, check_options
from .backends import check_backend
from .ops.checks import check_effective_threshold
from .ops.dtensor import is_dtensor, sum_over_shards

__all__ = [
    "effective_threshold",
    "masked_conv1d",
    "masked_conv2d",
    "masked_conv3d",
    "masked_conv_transpose1d",
    "masked_conv_transpose2d",
    "masked_conv_transpose3d",
    "masked_linear",
    "masked_weight",
    "remaining_ratio",
    "sparse_regularization",
    "threshold_mask",
]


def _checked(*options) -> MaskOptions:
    """Return checked options: the autograd functions do not check them again."""
    options = MaskOptions(*options)
    # The compiler may treat the ratio as a variable; then the ops check it.
    compiling = torch.compiler.is_compiling()
    check_options(options._replace(reset_ratio=None) if compiling else options)
    return options


def _require_operands(
    input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None
) -> None:
    require_tensors(input=input, weight=weight, threshold=threshold)
    if bias is not None:
        require_tensors(bias=bias)


def effective_threshold(
    weight: Tensor,
    threshold: Tensor,
    *,
    reset_ratio: float | None = 0.01,
    backend: str = "auto",
) -> Tensor:
    """Return the threshold after the collapse guard: a new tensor of its shape and dtype.

    It is 0 if remaining / total <= `reset_ratio` under `threshold`, else equal to `threshold`. It
    has no gradient, and needs no synchronisation with the device.
    """
    require_tensors(weight=weight, threshold=threshold)
    check_backend(backend)
    weight, threshold = weight.detach(), threshold.detach()
    if not torch.compiler.is_compiling():  # there the op's own check serves
        check_effective_threshold(weight, threshold, reset_ratio)
    return ops.call(ops.effective_threshold, weight, threshold, reset_ratio, backend)


def threshold_mask(
    weight: Tensor, threshold: Tensor, *, reset_ratio: float | None = 0.01
) -> Tensor:
    """Return the boolean mask of the weight's shape: True where |weight| > effective threshold.

    NaN (in either) counts as kept, so that a diverged weight is never hidden.
    """
    effective = effective_threshold(weight, threshold, reset_ratio=reset_ratio)
    return reference.threshold_mask(weight.detach(), effective)


def remaining_ratio(
    weight: Tensor, threshold: Tensor, *, reset_ratio: float | None = 0.01
) -> Tensor:
    """Return kept weights / all weights, a 0-dim float32 tensor; NaN if there are no weights."""
    kept = threshold_mask(weight, threshold, reset_ratio=reset_ratio).sum()
    return kept.to(torch.float32) / weight.numel()


def masked_weight(
    weight: Tensor,
    threshold: Tensor,
    *,
    reset_ratio: float | None = 0.01,
    surrogate: str = "long_tailed",
    structure_gradient: bool = True,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return weight * mask in `dtype` (default: the weight's), with gradients for both arguments.

    With G the incoming gradient, H the surrogate derivative and Q = |weight| - threshold:
    dW = G * mask + G * |W| * H(Q), the second term only with `structure_gradient`;
    dt = -sum(G * W * H(Q)) over the weights that a threshold governs.

    `surrogate`: "long_tailed" (the paper's: 2 - 4|Q| up to 0.4, 0.4 up to 1, then 0),
    "rectangular" (1 up to 1/2), "triangular" (1 - |Q| up to 1) or "straight_through" (1).
    """
    require_tensors(weight=weight, threshold=threshold)
    options = _checked("row", reset_ratio, surrogate, structure_gradient, backend)
    return autograd.masked_weight(weight, threshold, options, dtype).masked


def masked_linear(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    reset_ratio: float | None = 0.01,
    surrogate: str = "long_tailed",
    structure_gradient: bool = True,
    backend: str = "auto",
    path: str = "auto",
) -> Tensor:
    """Return input [..., in] times (weight [out, in] * mask)^T plus bias [out], shaped [..., out].

    Gradients are those of `masked_weight`. Under autocast weight and threshold are compared in
    their own dtypes and the product runs in the autocast dtype; otherwise the input must have the
    weight's dtype.

    `backend`: "auto" or a backend's name; the environment variable `DST_KERNELS_BACKEND` overrides
    "auto".

    `path`: "fused" (one kernel reads the weight, masks and multiplies), "packed" (the masked weight
    is written once in the product's dtype and kept for the backward pass, a library multiplies),
    "mixed" (packed, but with the weight's gradients fused), or "auto" (the fastest as measured or
    estimated). All compute the same.
    """
    _require_operands(input, weight, threshold, bias)
    options = _checked("row", reset_ratio, surrogate, structure_gradient, backend, path)
    return autograd.masked_linear(input, weight, threshold, bias, options)[0]


_SIZES = {1: "L", 2: "H, W", 3: "D, H, W"}


def _conv(spatial: int) -> Callable[..., Tensor]:
    """Return the function `masked_conv{spatial}d`."""

    def masked_conv(
        input: Tensor,
        weight: Tensor,
        threshold: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        *,
        reset_ratio: float | None = 0.01,
        surrogate: str = "long_tailed",
        structure_gradient: bool = True,
        backend: str = "auto",
        path: str = "auto",
    ) -> Tensor:
        _require_operands(input, weight, threshold, bias)
        require_integer("groups", groups, 1)
        if weight.dim() != spatial + 2:
            raise ValueError(
                f"weight must be [out, in/groups, *kernel] with {spatial} kernel dimension(s), "
                f"but its shape is {list(weight.shape)}"
            )
        options = _checked("row", reset_ratio, surrogate, structure_gradient, backend, path)
        operands = input, weight, threshold, bias
        return autograd.masked_conv(*operands, stride, padding, dilation, groups, options)[0]

    sizes = _SIZES[spatial]
    masked_conv.__name__ = masked_conv.__qualname__ = f"masked_conv{spatial}d"
    masked_conv.__doc__ = f"""Convolve the input with weight * mask over {spatial} dimension(s).

    From input [N, in, {sizes}] or [in, {sizes}], weight [out, in/groups, *kernel] and bias [out],
    return [N, out, *] or [out, *]. `stride`, `padding` (numbers, "same", "valid"), `dilation` and
    `groups` are those of `torch.nn.functional.conv{spatial}d`; a row of the weight is one filter.
    Everything else is as in `masked_linear`.
    """
    return masked_conv


masked_conv1d = _conv(1)
masked_conv2d = _conv(2)
masked_conv3d = _conv(3)


def _conv_transpose(spatial: int) -> Callable[..., Tensor]:
    """Return the function `masked_conv_transpose{spatial}d`."""

    def masked_conv_transpose(
        input: Tensor,
        weight: Tensor,
        threshold: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
        *,
        reset_ratio: float | None = 0.01,
        surrogate: str = "long_tailed",
        structure_gradient: bool = True,
        backend: str = "auto",
    ) -> Tensor:
        _require_operands(input, weight, threshold, bias)
        require_integer("groups", groups, 1)
        if weight.dim() != spatial + 2:
            raise ValueError(
                f"weight must be [in, out/groups, *kernel] with {spatial} kernel dimension(s), "
                f"but its shape is {list(weight.shape)}"
            )
        options = _checked("row", reset_ratio, surrogate, structure_gradient, backend)
        operands = input, weight, threshold, bias
        return autograd.masked_conv_transpose(
            *operands, stride, padding, output_padding, groups, dilation, options
        )[0]

    sizes = _SIZES[spatial]
    name = f"masked_conv_transpose{spatial}d"
    masked_conv_transpose.__name__ = masked_conv_transpose.__qualname__ = name
    dimensions = f"{spatial} dimension(s)"
    masked_conv_transpose.__doc__ = f"""Convolve, transposed, with weight * mask over {dimensions}.

    From input [N, in, {sizes}] or [in, {sizes}], weight [in, out/groups, *kernel] and bias [out],
    return [N, out, *] or [out, *]. `stride`, `padding`, `output_padding`, `groups` and `dilation`
    are those of `torch.nn.functional.conv_transpose{spatial}d`. A row is one output channel, so
    `threshold` is [out], [] or [1], or has the weight's shape. Everything else is as in
    `masked_linear`; the path is always "packed".
    """
    return masked_conv_transpose


masked_conv_transpose1d = _conv_transpose(1)
masked_conv_transpose2d = _conv_transpose(2)
masked_conv_transpose3d = _conv_transpose(3)


def sparse_regularization(thresholds: Tensor | Iterable[Tensor]) -> Tensor:
    """Return the sum of exp(-t) over all elements of all `thresholds`, 0-dim, at least float32.

    Below t = -64, where sums of exp(-t) would soon overflow float32, the tangent at -64 replaces
    it: value and gradient stay finite and the gradient still raises t (a float16 threshold's
    gradient, rounded to float16, overflows below t = -11). Thresholds that FSDP2 keeps sharded
    count with all their shards.

    Raises ValueError if there are no thresholds, TypeError for what is no floating-point tensor.
    """
    if isinstance(thresholds, Tensor):
        thresholds = [thresholds]
    require(
        isinstance(thresholds, Iterable), "thresholds", "a tensor or several of them", thresholds
    )
    thresholds = list(thresholds)
    for threshold in thresholds:
        require_tensors(thresholds=threshold)
        if threshold.dtype not in REAL_DTYPES:
            raise TypeError(f"thresholds must be {REAL}, but one is {threshold.dtype}")
    if not thresholds:
        raise ValueError("thresholds must hold at least one tensor, but is empty")
    groups: dict[object, list[Tensor]] = {}
    for threshold in thresholds:
        if is_dtensor(threshold):
            key: object = (threshold.device_mesh, threshold.placements)
        else:
            key = threshold.device
        groups.setdefault(key, []).append(threshold)
    sums = []
    for group in groups.values():
        shards = [each for each in group if is_dtensor(each)]
        if shards:
            sums.append(sum_over_shards(shards, autograd.sparse_regularization))
        else:
            sums.append(autograd.sparse_regularization(group))
    if len(sums) == 1:
        return sums[0]
    return torch.stack([value.to(sums[0].device) for value in sums]).sum()

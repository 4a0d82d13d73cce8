"""What the operations accept, checked once at the op boundary for eager, compiled and fake tensors.

Every message names the argument, what was given and what is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .reference.conv import conv_output_shape
from .reference.surrogate import SURROGATES

__all__ = [
    "check_conv",
    "check_conv_grad_input",
    "check_conv_grad_weight",
    "check_effective_threshold",
    "check_linear",
    "check_linear_grad_input",
    "check_linear_grad_weight",
    "check_masked_conv",
    "check_masked_linear",
    "check_masked_weight",
    "check_masked_weight_backward",
    "check_same_dtype",
    "check_surrogate",
]


_REAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REAL = "float16, bfloat16, float32 or float64"


def _check_value(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """ValueError unless `condition`; torch's own check is for what is symbolic, and slower."""
    if condition is not True:
        torch._check_value(condition, message)


def _check_type(condition: bool, message: Callable[[], str]) -> None:
    """TypeError unless `condition`."""
    if condition is not True:
        torch._check_type(condition, message)


def check_weight_and_threshold(weight: Tensor, threshold: Tensor) -> None:
    rows = weight.shape[:1]
    if (
        (weight.dtype is torch.float32 is threshold.dtype)
        and weight.dim() >= 2
        and threshold.shape == rows
        and threshold.device == weight.device
    ):
        return  # the usual case, decided quickly
    _check_type(
        weight.dtype in _REAL_DTYPES,
        lambda: f"weight must be {_REAL}, but its dtype is {weight.dtype}",
    )
    _check_value(
        weight.dim() >= 2,
        lambda: (
            f"weight must have at least 2 dimensions [out, in, ...], "
            f"but its shape is {list(weight.shape)}"
        ),
    )
    _check_type(
        threshold.dtype in _REAL_DTYPES,
        lambda: (
            f"threshold must be {_REAL} (float32 is advised: updates of a 16-bit threshold "
            f"round away), but its dtype is {threshold.dtype}"
        ),
    )
    rows = weight.shape[0]
    _check_value(
        threshold.dim() == 0
        or (threshold.dim() == 1 and threshold.shape[0] in (1, rows))
        or threshold.shape == weight.shape,
        lambda: (
            f"threshold must have shape [{rows}] (one per row), [] or [1] (one per layer) or "
            f"{list(weight.shape)} (one per weight) for a weight of shape {list(weight.shape)}, "
            f"but its shape is {list(threshold.shape)}"
        ),
    )
    _check_value(
        threshold.device == weight.device,
        lambda: (
            f"threshold must be on the weight's device {weight.device}, "
            f"but it is on {threshold.device}"
        ),
    )


def check_effective_threshold(weight: Tensor, threshold: Tensor, reset_ratio: float | None) -> None:
    check_weight_and_threshold(weight, threshold)
    _check_reset_ratio(reset_ratio)


def _check_reset_ratio(reset_ratio: float | None) -> None:
    if reset_ratio is not None:
        accepted = "reset_ratio must be between 0 and 1, or None for no guard"
        if not isinstance(reset_ratio, (int, float, torch.SymFloat)):
            raise TypeError(f"{accepted}, but is {reset_ratio!r}")
        _check_value(0 <= reset_ratio <= 1, lambda: f"{accepted}, but is {float(reset_ratio)}")


def check_masked_weight(
    weight: Tensor, threshold: Tensor, reset_ratio: float | None, dtype: torch.dtype
) -> None:
    check_effective_threshold(weight, threshold, reset_ratio)
    _check_type(dtype in _REAL_DTYPES, lambda: f"dtype must be {_REAL}, but is {dtype}")


def check_masked_weight_backward(
    grad: Tensor, weight: Tensor, threshold: Tensor, surrogate: str, structure_gradient: bool
) -> None:
    check_weight_and_threshold(weight, threshold)
    check_surrogate(surrogate)
    _check_grad(grad, weight.shape)


def check_surrogate(surrogate: str) -> None:
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)}, but is {surrogate!r}")


def _check_input(input: Tensor, weight: Tensor) -> None:
    _check_type(
        input.dtype in _REAL_DTYPES,
        lambda: f"input must be {_REAL}, but its dtype is {input.dtype}",
    )
    _check_value(
        input.device == weight.device,
        lambda: (
            f"input must be on the weight's device {weight.device}, but it is on {input.device}"
        ),
    )


def check_same_dtype(input: Tensor, weight: Tensor) -> None:
    """Outside autocast; under it, mixed dtypes are the point."""
    if input.dtype != weight.dtype:
        raise TypeError(
            f"input must have the weight's dtype {weight.dtype} outside autocast, "
            f"but its dtype is {input.dtype}"
        )


def _check_bias(bias: Tensor | None, weight: Tensor) -> None:
    if bias is None:
        return
    _check_type(
        bias.dtype in _REAL_DTYPES, lambda: f"bias must be {_REAL}, but its dtype is {bias.dtype}"
    )
    _check_value(
        bias.dim() == 1 and bias.shape[0] == weight.shape[0],
        lambda: f"bias must have shape [{weight.shape[0]}], but its shape is {list(bias.shape)}",
    )
    _check_value(
        bias.device == weight.device,
        lambda: f"bias must be on the weight's device {weight.device}, but it is on {bias.device}",
    )


def check_masked_linear(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    reset_ratio: float | None,
) -> None:
    check_linear(input, weight, threshold, bias)
    _check_reset_ratio(reset_ratio)


def check_linear(input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None) -> None:
    check_weight_and_threshold(weight, threshold)
    if (
        weight.dim() == 2
        and input.dtype in _REAL_DTYPES
        and input.device == weight.device
        and input.shape[-1:] == weight.shape[1:]
    ):
        return _check_bias(bias, weight)  # the usual case, decided quickly
    _check_value(
        weight.dim() == 2,
        lambda: (
            f"weight must be [out, in] for a linear layer, but its shape is {list(weight.shape)}"
        ),
    )
    _check_input(input, weight)
    _check_value(
        input.dim() >= 1 and input.shape[-1] == weight.shape[1],
        lambda: (
            f"input must have shape [..., {weight.shape[1]}] for a weight of shape "
            f"{list(weight.shape)}, but its shape is {list(input.shape)}"
        ),
    )
    _check_bias(bias, weight)


def check_linear_grad_input(grad: Tensor, weight: Tensor, threshold: Tensor) -> None:
    check_weight_and_threshold(weight, threshold)
    _check_grad(grad, [*grad.shape[:-1], weight.shape[0]])


def check_linear_grad_weight(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    surrogate: str,
    structure_gradient: bool,
) -> None:
    check_linear(input, weight, threshold, None)
    check_surrogate(surrogate)
    _check_grad(grad, [*input.shape[:-1], weight.shape[0]])


def check_masked_conv(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    reset_ratio: float | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    check_conv(input, weight, threshold, bias, stride, padding, dilation, groups)
    _check_reset_ratio(reset_ratio)


def check_conv(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    check_weight_and_threshold(weight, threshold)
    _check_input(input, weight)
    spatial = len(stride)
    _check_value(
        weight.dim() == spatial + 2,
        lambda: (
            f"weight must be [out, in/groups, *kernel] with {spatial} kernel dimension(s), "
            f"but its shape is {list(weight.shape)}"
        ),
    )
    _check_value(
        groups >= 1 and weight.shape[0] % groups == 0,
        lambda: (
            f"groups must be at least 1 and divide the {weight.shape[0]} output channels, "
            f"but is {groups}"
        ),
    )
    channels = weight.shape[1] * groups
    _check_value(
        input.dim() == spatial + 2 and input.shape[1] == channels,
        lambda: (
            f"input must have {channels} channels and {spatial} spatial dimension(s) for a "
            f"weight of shape {list(weight.shape)} with groups={groups}, but its shape is "
            f"{list(input.shape)}"
        ),
    )
    for name, values, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        _check_value(
            len(values) == spatial and all(value >= least for value in values),
            lambda name=name, values=values, least=least: (
                f"{name} must be {spatial} integer(s) of at least {least}, but is {tuple(values)}"
            ),
        )
    for axis, size in enumerate(input.shape[2:]):
        reach = dilation[axis] * (weight.shape[axis + 2] - 1) + 1
        padded = size + 2 * padding[axis]
        _check_value(
            padded >= reach,
            lambda reach=reach, padded=padded, axis=axis: (
                f"input is too small: spatial dimension "
                f"{axis} has {padded} elements with padding, and the dilated kernel needs {reach}"
            ),
        )
    _check_bias(bias, weight)


def _check_grad(grad: Tensor, shape: Sequence[int]) -> None:
    _check_value(
        list(grad.shape) == list(shape),
        lambda: f"grad must have shape {list(shape)}, but its shape is {list(grad.shape)}",
    )


def check_conv_grad_input(
    grad: Tensor,
    input_shape: Sequence[int],
    weight: Tensor,
    threshold: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    check_weight_and_threshold(weight, threshold)
    shape = conv_output_shape(input_shape, weight.shape, stride, padding, dilation)
    _check_grad(grad, shape)


def check_conv_grad_weight(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    surrogate: str,
    structure_gradient: bool,
) -> None:
    check_conv(input, weight, threshold, None, stride, padding, dilation, groups)
    check_surrogate(surrogate)
    shape = conv_output_shape(input.shape, weight.shape, stride, padding, dilation)
    _check_grad(grad, shape)

"""Check what the operations accept, once: in the autograd functions if eager, else in the ops.

Every message names the argument, what was given and what is accepted. The checks of convolutions
are in `conv_checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..arguments import REAL as _REAL
from ..arguments import REAL_DTYPES as _REAL_DTYPES
from ..reference.surrogate import SURROGATES


def check_value(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise ValueError unless `condition`; only symbolic ones go to torch's check: it is slow."""
    if condition is not True:
        torch._check_value(condition, message)


def check_type(condition: bool, message: Callable[[], str]) -> None:
    """Raise TypeError unless `condition`."""
    if condition is not True:
        torch._check_type(condition, message)


def check_weight_and_threshold(weight: Tensor, threshold: Tensor, rows: int | None = None) -> None:
    """Check both tensors; `rows` is the number of rows if it is not the weight's dimension 0."""
    if (
        (weight.dtype is torch.float32 is threshold.dtype)
        and weight.dim() >= 2
        and threshold.shape == (weight.shape[0] if rows is None else rows,)
        and threshold.device == weight.device
    ):
        return  # the usual case, decided quickly
    check_type(
        weight.dtype in _REAL_DTYPES,
        lambda: f"weight must be {_REAL}, but its dtype is {weight.dtype}",
    )
    check_value(
        weight.dim() >= 2,
        lambda: (
            f"weight must have at least 2 dimensions [out, in, ...], "
            f"but its shape is {list(weight.shape)}"
        ),
    )
    check_type(
        threshold.dtype in _REAL_DTYPES,
        lambda: (
            f"threshold must be {_REAL} (float32 is advised: updates of a 16-bit threshold "
            f"round away), but its dtype is {threshold.dtype}"
        ),
    )
    rows = weight.shape[0] if rows is None else rows
    check_value(
        threshold.dim() == 0
        or (threshold.dim() == 1 and threshold.shape[0] in (1, rows))
        or threshold.shape == weight.shape,
        lambda: (
            f"threshold must have shape [{rows}] (one per row), [] or [1] (one per layer) or "
            f"{list(weight.shape)} (one per weight) for a weight of shape {list(weight.shape)}, "
            f"but its shape is {list(threshold.shape)}"
        ),
    )
    check_value(
        threshold.device == weight.device,
        lambda: (
            f"threshold must be on the weight's device {weight.device}, "
            f"but it is on {threshold.device}"
        ),
    )


def check_effective_threshold(weight: Tensor, threshold: Tensor, reset_ratio: float | None) -> None:
    check_weight_and_threshold(weight, threshold)
    check_reset_ratio(reset_ratio)


def check_reset_ratio(reset_ratio: float | None) -> None:
    if reset_ratio is not None:
        accepted = "reset_ratio must be between 0 and 1, or None for no guard"
        if not isinstance(reset_ratio, (int, float, torch.SymFloat)):
            raise TypeError(f"{accepted}, but is {reset_ratio!r}")
        check_value(0 <= reset_ratio <= 1, lambda: f"{accepted}, but is {float(reset_ratio)}")


def check_masked_weight(
    weight: Tensor, threshold: Tensor, reset_ratio: float | None, dtype: torch.dtype
) -> None:
    check_effective_threshold(weight, threshold, reset_ratio)
    check_type(dtype in _REAL_DTYPES, lambda: f"dtype must be {_REAL}, but is {dtype}")


def check_masked_weight_backward(
    grad: Tensor, weight: Tensor, threshold: Tensor, surrogate: str, structure_gradient: bool
) -> None:
    check_weight_and_threshold(weight, threshold)
    check_surrogate(surrogate)
    check_grad(grad, weight.shape)


def check_surrogate(surrogate: str) -> None:
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)}, but is {surrogate!r}")


def check_input(input: Tensor, weight: Tensor) -> None:
    if input.dtype in _REAL_DTYPES and input.device == weight.device:
        return
    check_type(
        input.dtype in _REAL_DTYPES,
        lambda: f"input must be {_REAL}, but its dtype is {input.dtype}",
    )
    check_value(
        input.device == weight.device,
        lambda: (
            f"input must be on the weight's device {weight.device}, but it is on {input.device}"
        ),
    )


def check_same_dtype(input: Tensor, weight: Tensor) -> None:
    """Raise TypeError for different dtypes; autocast, which allows them, does not call this."""
    if input.dtype != weight.dtype:
        raise TypeError(
            f"input must have the weight's dtype {weight.dtype} outside autocast, "
            f"but its dtype is {input.dtype}"
        )


def check_bias(bias: Tensor | None, weight: Tensor, rows: int | None = None) -> None:
    """Check the bias; `rows` is as in `check_weight_and_threshold`."""
    rows = weight.shape[0] if rows is None else rows
    if bias is None or (
        bias.dtype in _REAL_DTYPES and bias.shape == (rows,) and bias.device == weight.device
    ):
        return
    check_type(
        bias.dtype in _REAL_DTYPES, lambda: f"bias must be {_REAL}, but its dtype is {bias.dtype}"
    )
    check_value(
        bias.dim() == 1 and bias.shape[0] == rows,
        lambda: f"bias must have shape [{rows}], but its shape is {list(bias.shape)}",
    )
    check_value(
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
    check_reset_ratio(reset_ratio)


def check_linear(input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None) -> None:
    check_weight_and_threshold(weight, threshold)
    if (
        weight.dim() == 2
        and input.dtype in _REAL_DTYPES
        and input.device == weight.device
        and input.dim() >= 1
        and input.shape[-1] == weight.shape[1]
    ):
        return check_bias(bias, weight)  # the usual case, decided quickly
    check_value(
        weight.dim() == 2,
        lambda: (
            f"weight must be [out, in] for a linear layer, but its shape is {list(weight.shape)}"
        ),
    )
    check_input(input, weight)
    check_value(
        input.dim() >= 1 and input.shape[-1] == weight.shape[1],
        lambda: (
            f"input must have shape [..., {weight.shape[1]}] for a weight of shape "
            f"{list(weight.shape)}, but its shape is {list(input.shape)}"
        ),
    )
    check_bias(bias, weight)


def check_linear_grad_input(grad: Tensor, weight: Tensor, threshold: Tensor) -> None:
    check_weight_and_threshold(weight, threshold)
    check_grad(grad, [*grad.shape[:-1], weight.shape[0]])


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
    check_grad(grad, [*input.shape[:-1], weight.shape[0]])


def check_grad(grad: Tensor, shape: Sequence[int]) -> None:
    check_value(
        list(grad.shape) == list(shape),
        lambda: f"grad must have shape {list(shape)}, but its shape is {list(grad.shape)}",
    )

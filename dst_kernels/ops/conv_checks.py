"""Check what the convolutions accept; see `checks.py`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from ..reference.conv import Geometry
from ..reference.conv_transpose import TransposedGeometry
from .checks import (
    check_bias,
    check_grad,
    check_input,
    check_reset_ratio,
    check_surrogate,
    check_value,
    check_weight_and_threshold,
)

# Lambdas with defaults, for which mypy infers no type, keep the loop variables of their check.
_LEAST = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}


def _check_each_dimension(spatial: int, **geometry: Sequence[int]) -> None:
    for name, values in geometry.items():
        least = _LEAST[name]
        check_value(
            len(values) == spatial and all(value >= least for value in values),
            lambda name=name, values=values, least=least: (  # type: ignore[misc]  # defaults
                f"{name} must be {spatial} integer(s) of at least {least}, but is {tuple(values)}"
            ),
        )


def check_masked_conv(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    reset_ratio: float | None,
    geometry: Geometry,
) -> None:
    check_conv(input, weight, threshold, bias, geometry)
    check_reset_ratio(reset_ratio)


def check_conv(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
) -> None:
    check_weight_and_threshold(weight, threshold)
    check_input(input, weight)
    check_shapes(input.shape, weight.shape, geometry)
    check_bias(bias, weight)


def check_shapes(input: Sequence[int], weight: Sequence[int], geometry: Geometry) -> None:
    try:
        _check_shapes(input, tuple(weight), geometry)
    except TypeError:  # symbolic sizes have no hash, so the cache cannot take them
        _check_shapes.__wrapped__(input, weight, geometry)


@functools.lru_cache(maxsize=4096)
def _check_shapes(input: Sequence[int], weight: Sequence[int], geometry: Geometry) -> None:
    stride, padding, dilation, groups = geometry
    spatial = len(stride)
    check_value(
        len(weight) == spatial + 2,
        lambda: (
            f"weight must be [out, in/groups, *kernel] with {spatial} kernel dimension(s), "
            f"but its shape is {list(weight)}"
        ),
    )
    check_value(
        groups >= 1 and weight[0] % groups == 0,
        lambda: (
            f"groups must be at least 1 and divide the {weight[0]} output channels, but is {groups}"
        ),
    )
    channels = weight[1] * groups
    check_value(
        len(input) == spatial + 2 and input[1] == channels,
        lambda: (
            f"input must have {channels} channels and {spatial} spatial dimension(s) for a "
            f"weight of shape {list(weight)} with groups={groups}, but its shape is {list(input)}"
        ),
    )
    _check_each_dimension(spatial, stride=stride, padding=padding, dilation=dilation)
    for axis, size in enumerate(input[2:]):
        reach = dilation[axis] * (weight[axis + 2] - 1) + 1
        padded = size + 2 * padding[axis]
        check_value(
            padded >= reach,
            lambda reach=reach, padded=padded, axis=axis: (  # type: ignore[misc]  # defaults
                f"input is too small: spatial dimension "
                f"{axis} has {padded} elements with padding, and the dilated kernel needs {reach}"
            ),
        )


def check_conv_grad_input(
    grad: Tensor,
    input_shape: Sequence[int],
    weight: Tensor,
    threshold: Tensor,
    geometry: Geometry,
) -> None:
    check_weight_and_threshold(weight, threshold)
    check_grad(grad, geometry.output_shape(input_shape, weight.shape))


def check_conv_grad_weight(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    geometry: Geometry,
    surrogate: str,
    structure_gradient: bool,
) -> None:
    check_conv(input, weight, threshold, None, geometry)
    check_surrogate(surrogate)
    check_grad(grad, geometry.output_shape(input.shape, weight.shape))


def check_conv_transpose(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    geometry: TransposedGeometry,
) -> None:
    stride, padding, output_padding, groups, dilation = geometry
    spatial = len(stride)
    check_value(
        weight.dim() == spatial + 2,
        lambda: (
            f"weight must be [in, out/groups, *kernel] with {spatial} kernel dimension(s), "
            f"but its shape is {list(weight.shape)}"
        ),
    )
    channels = weight.shape[0]
    check_value(
        groups >= 1 and channels % groups == 0,
        lambda: (
            f"groups must be at least 1 and divide the {channels} input channels, but is {groups}"
        ),
    )
    rows = weight.shape[1] * groups
    check_weight_and_threshold(weight, threshold, rows)
    check_input(input, weight)
    check_value(
        input.dim() == spatial + 2 and input.shape[1] == channels,
        lambda: (
            f"input must have {channels} channels and {spatial} spatial dimension(s) for a "
            f"weight of shape {list(weight.shape)}, but its shape is {list(input.shape)}"
        ),
    )
    _check_each_dimension(
        spatial, stride=stride, padding=padding, output_padding=output_padding, dilation=dilation
    )
    for axis in range(spatial):
        extra, most = output_padding[axis], max(stride[axis], dilation[axis]) - 1
        check_value(
            extra <= most,
            lambda extra=extra, most=most: (  # type: ignore[misc]  # defaults
                "output_padding must be smaller than stride or dilation, in each dimension: "
                f"at most {most}, but is {extra}"
            ),
        )
    for axis, size in enumerate(geometry.output_shape(input.shape, weight.shape)[2:]):
        check_value(
            size >= 1,
            lambda size=size, axis=axis: (  # type: ignore[misc]  # defaults
                f"input is too small: spatial dimension {axis} of the output would have "
                f"{size} elements"
            ),
        )
    check_bias(bias, weight, rows)

"""Convolve, transposed, with a weight that is masked by group; torch multiplies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.conv_checks import check_conv_transpose
from ..ops.geometry import per_dimension
from ..reference.conv_transpose import (
    TransposedGeometry,
    by_group,
    conv_transpose,
    not_by_group,
)
from ._function import cast_for_autocast
from .options import MaskOptions
from .weight import COMMITTED, FRESH, Packed, WeightSource, masked_weight


def masked_conv_transpose(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
    options: MaskOptions,
    source: WeightSource = FRESH,
) -> tuple[Tensor, Tensor]:
    """Convolve; return what `masked_product` does. Geometry and shapes: `F.conv_transpose2d`.

    The threshold of an output channel is expanded to its weights; autograd sums their gradients.
    """
    spatial = weight.dim() - 2
    stride = per_dimension("stride", stride, spatial)
    padding = per_dimension("padding", padding, spatial)
    output_padding = per_dimension("output_padding", output_padding, spatial)
    dilation = per_dimension("dilation", dilation, spatial)
    geometry = TransposedGeometry(stride, padding, output_padding, groups, dilation)
    batched = input.dim() != spatial + 1
    if not batched:
        input = input.unsqueeze(0)
    if not torch.compiler.is_compiling():  # there the compiler's own checks of shapes serve
        check_conv_transpose(input, weight, threshold, bias, geometry)
    input = cast_for_autocast(input, weight)
    masked, effective = masked_conv_transpose_weight(
        weight, threshold, groups, options, input.dtype, source
    )
    output = conv_transpose(input, masked, bias, geometry)
    return output if batched else output.squeeze(0), effective


def masked_conv_transpose_weight(
    weight: Tensor,
    threshold: Tensor,
    groups: int,
    options: MaskOptions,
    dtype: torch.dtype,
    source: WeightSource = FRESH,
) -> Packed:
    """Return what `masked_weight` does, for a weight [in, out/groups, *kernel]."""
    stored = threshold.dtype
    if stored.itemsize < 4:  # otherwise autograd would round to 16 bits before it sums
        threshold = threshold.to(torch.float32)
    if source is COMMITTED:  # what is masked with is a copy of the stored threshold
        source = FRESH
    of_groups = by_group(weight, threshold, groups)
    masked, effective = masked_weight(*of_groups, options, dtype, source)
    effective = not_by_group(effective, threshold)
    return Packed(
        masked.flatten(0, 1), effective if threshold.dtype is stored else effective.to(stored)
    )

"""Hypothesis strategies: weights, thresholds and inputs of many shapes, layouts and dtypes."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GRANULARITIES = ("row", "scalar", "layer", "element")
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "expanded", "channels_last")

# Few magnitudes, all exact in every dtype, so that ties of |w| and t are common; both zeros.
MAGNITUDES = (0.0, -0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


def arrange(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (but for "expanded", which repeats its first row) in another layout."""
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]] if tensor.dim() else tensor
    if layout == "strided" and tensor.dim() >= 1:
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded" and tensor.dim() >= 2 and tensor.shape[0]:
        return tensor[:1].clone().expand_as(tensor)
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last" and tensor.dim() == 5:
        return tensor.contiguous(memory_format=torch.channels_last_3d)
    return tensor


@st.composite
def tensors(draw, shape, dtype=None, layout=None, values=None):
    """Few-valued tensors from drawn seeds: quick to draw, and ties are common."""
    dtype = dtype or draw(st.sampled_from(DTYPES))
    layout = layout or draw(st.sampled_from(LAYOUTS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if values is None:
        result = torch.randn(shape, generator=generator)
    else:
        index = torch.randint(len(values), shape, generator=generator)
        result = torch.tensor(values)[index]
        result = result * (torch.randint(2, shape, generator=generator) * 2 - 1)
    return arrange(result.to(dtype), layout)


def threshold_shape(weight_shape, granularity):
    return {
        "row": [weight_shape[0]],
        "scalar": [],
        "layer": [1],
        "element": list(weight_shape),
    }[granularity]


@st.composite
def weights_and_thresholds(draw, shapes=None, weight_dtype=None):
    """Weight and threshold with many ties, signed zeros, negative thresholds, any granularity."""
    if shapes is None:
        shapes = st.lists(st.integers(0, 5), min_size=2, max_size=5)
    shape = draw(shapes)
    weight = draw(tensors(shape, dtype=weight_dtype, values=MAGNITUDES))
    granularity = draw(st.sampled_from(GRANULARITIES))
    dtype = draw(st.sampled_from((torch.float32, torch.float64, weight.dtype)))
    layout = draw(st.sampled_from(("contiguous", "transposed", "strided")))
    threshold = draw(tensors(threshold_shape(shape, granularity), dtype, layout, values=MAGNITUDES))
    return weight, threshold

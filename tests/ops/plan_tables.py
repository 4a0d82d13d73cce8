"""Made-up measurements for the planner's tests; the fixture `table` writes them."""

from __future__ import annotations

GPU = "NVIDIA Test GPU"
PRODUCTS = ("forward", "grad_input", "grad_weight")
PACKED_WINS = {name: (2.0, 1.0) for name in PRODUCTS}


def case(M=1024, N=4096, K=4096, input_dtype="bfloat16", weight_dtype="float32", **costs):
    """A linear case; `costs` are (fused, packed) by product, by default in favour of fused."""
    dtypes = {"input_dtype": input_dtype, "weight_dtype": weight_dtype}
    return {"M": M, "N": N, "K": K, **dtypes, **_seconds(costs)}


def conv_case(
    M=4096,
    N=256,
    C=256,
    kernel=(3, 3),
    stride=(1, 1),
    groups=1,
    input_dtype="bfloat16",
    weight_dtype="float32",
    **costs,
):
    """As `case`, for a convolution."""
    geometry = {"kernel": list(kernel), "stride": list(stride), "groups": groups}
    dtypes = {"input_dtype": input_dtype, "weight_dtype": weight_dtype}
    return {"M": M, "N": N, "C": C, **geometry, **dtypes, **_seconds(costs)}


def _seconds(costs):
    both = {**{name: (1.0, 2.0) for name in PRODUCTS}, **costs}
    return {name: {"fused": fused, "packed": packed} for name, (fused, packed) in both.items()}

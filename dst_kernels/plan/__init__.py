"""Choose the path of each product of a masked layer, by measurements or an estimate.

`estimate` decides from sizes, dtypes and the GPU; `table` reads what was measured on a GPU, one
JSON file each under `tables/`.
"""

from .estimate import (
    CONV_TRANSPOSE_PATHS,
    FUSED,
    PACKED,
    PATHS,
    PLANS,
    ConvKind,
    Plan,
    check_path,
    plan_conv,
    plan_linear,
)
from .kept import most_kept

__all__ = [
    "CONV_TRANSPOSE_PATHS",
    "FUSED",
    "PACKED",
    "PATHS",
    "PLANS",
    "ConvKind",
    "Plan",
    "check_path",
    "most_kept",
    "plan_conv",
    "plan_linear",
]

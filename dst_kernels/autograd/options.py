"""Hold the options of a masked weight, which layers, functions and autograd nodes all take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..arguments import require_flag
from ..backends import check_backend
from ..ops.checks import check_reset_ratio, check_surrogate
from ..plan import PATHS, check_path

GRANULARITIES = ("row", "layer", "element")


class MaskOptions(NamedTuple):
    """Hold the options of one masked weight; `dst_kernels.nn.MaskedLinear` explains each.

    Only layers use `granularity`: elsewhere the shape of the threshold decides.
    """

    granularity: str = "row"
    reset_ratio: float | None = 0.01
    surrogate: str = "long_tailed"
    structure_gradient: bool = True
    backend: str = "auto"
    path: str = "auto"


def check_options(options: MaskOptions, paths: Sequence[str] = PATHS) -> None:
    """Raise ValueError or TypeError that names the first option with a value it cannot have."""
    if options.granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity must be one of {', '.join(GRANULARITIES)}, but is {options.granularity!r}"
        )
    check_reset_ratio(options.reset_ratio)
    check_surrogate(options.surrogate)
    require_flag("structure_gradient", options.structure_gradient)
    check_backend(options.backend)
    check_path(options.path, paths)

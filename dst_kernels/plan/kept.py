"""Say up to how many kept weights a product is faster by these alone than by all of W * M."""

from __future__ import annotations

import functools

import torch

from .table import measured_share


@functools.lru_cache(maxsize=4096)
def most_kept(M: int, N: int, K: int, kind: str, dtype: torch.dtype, made: bool = False) -> int:
    """Return the largest number of kept weights for which kept rows win on a CPU; 0: for none.

    The weight is [N, K], with a filter of a convolution flattened, and M the number of inputs or
    of output positions (0, for none: images that would have to be copied). `kind`: "linear", or as
    `autograd/conv.py` names it. It is that of the nearest case of `tables/cpu.json`, which
    `python -m bench plan-cpu` writes: no time is taken at run time, so that a run repeats. `made`:
    the rows are there already.
    """
    if M == 0:
        return 0
    share = measured_share(kind, M, N, K, dtype, made)
    return int(share * N * K)

"""The dtype modes of a case: what the weights are stored in and what the product runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

__all__ = ["MODES", "Mode"]


@dataclass(frozen=True)
class Mode:
    """`weight`: dtype of the parameters; `compute`: dtype of input, product and output."""

    name: str
    weight: torch.dtype
    compute: torch.dtype
    tf32: bool = False

    @property
    def autocasts(self) -> bool:
        return self.weight != self.compute

    def autocast(self, device_type: str) -> AbstractContextManager:
        """The autocast region of a forward; nothing where weights have the compute dtype.

        The cache of cast weights is off: every call casts as the first call of a step does, also
        in a loop inside one region, and nothing cached leaks into a CUDA graph.
        """
        if not self.autocasts:
            return nullcontext()
        return torch.autocast(device_type, self.compute, cache_enabled=False)

    @contextmanager
    def precision(self, tune: bool = False) -> Iterator[None]:
        """float32 products and convolutions as TF32 or exactly, whatever was set before.

        `tune`: cuDNN looks for its fastest algorithm at the first call for each size.
        """
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=tune, allow_tf32=self.tf32):
                yield
        finally:
            torch.set_float32_matmul_precision(before)


MODES = {
    mode.name: mode
    for mode in (
        Mode("bf16-autocast", torch.float32, torch.bfloat16),
        Mode("bf16", torch.bfloat16, torch.bfloat16),
        Mode("fp16-autocast", torch.float32, torch.float16),
        Mode("tf32", torch.float32, torch.float32, tf32=True),
        Mode("fp32", torch.float32, torch.float32),
    )
}

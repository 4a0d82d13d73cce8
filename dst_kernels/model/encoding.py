"""Write a tensor of mostly zeros as the values that are kept and where they are, and read it back.

Positions are numbered row by row; dimension 0 is the rows. There are two ways to write them, as
tensors of uint8:

* `bitmap`: `rows` has a bit for each row, 1 where something in it is kept; `bitmap` has a bit for
  each element of those rows. Bits are numbered from the lowest of a byte; those left over are 0.
* `deltas`: one number for each kept value, that of the elements skipped before it. 255 says that
  255 are skipped and the number goes on in the next byte; so it also says what follows the last.

Either way an element costs at least 1/256 byte, so a file of n bytes never asks for more than 256 n
elements, whatever shape it claims. Values are moved as integers: every bit of them stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import REAL_DTYPES

PLAIN, BITMAP, DELTAS = "plain", "bitmap", "deltas"
PARTS = {PLAIN: (), BITMAP: ("rows", "bitmap"), DELTAS: ("deltas",)}
"""The tensors of each encoding, beside the values."""

_SKIP = 255
_LEAST_LIVE = 32  # a bitmap needs one live row in so many, or the dead rows would cost too little
_COST_OF_PART = 100  # bytes in the header of a file
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Encoded(NamedTuple):
    """Hold the encoding's name, the values (plain: the tensor) and the other parts by name."""

    encoding: str
    values: Tensor
    parts: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Return how many bytes of a file this takes."""
        tensors = [self.values, *self.parts.values()]
        return sum(each.nbytes + _COST_OF_PART for each in tensors)


def encode(tensor: Tensor, kept: Tensor | None = None) -> Encoded:
    """Return a CPU tensor in the encoding that takes the fewest bytes.

    `kept` is a boolean tensor of its shape: these values are written, and their positions are,
    whatever the values. Without it, those with a bit that is not 0 are, -0.0 among them, and the
    tensor may also stay plain.
    """
    tensor = tensor.contiguous()
    plain = Encoded(PLAIN, tensor, {})
    if kept is None:
        if tensor.dtype not in REAL_DTYPES or tensor.dim() == 0:
            return plain
        kept = _as_integers(tensor) != 0
        candidates = [plain]
    else:
        candidates = []
    values = _as_integers(tensor)[kept].view(tensor.dtype)
    positions = kept.flatten().nonzero().flatten()
    candidates.append(Encoded(DELTAS, values, {"deltas": _deltas(positions, kept.numel())}))
    if kept.numel():
        matrix = kept.flatten(1) if kept.dim() > 1 else kept[:, None]
        live = matrix.any(1)
        if _LEAST_LIVE * int(live.sum()) >= len(live):
            parts = {"rows": _packed(live), "bitmap": _packed(matrix[live].flatten())}
            candidates.append(Encoded(BITMAP, values, parts))
    return min(candidates, key=lambda each: each.nbytes)


def decode(
    encoding: str, values: Tensor, parts: Mapping[str, Tensor], shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return (tensor, kept) of this shape from what `encode` has written, but for a plain one.

    Raises ValueError if the parts are not those of such a tensor. Nothing that is larger than 256
    elements for each byte of them is allocated before that is known.
    """
    if values.dtype not in REAL_DTYPES or values.dim() != 1:
        raise ValueError(f"its values are {values.dtype} {list(values.shape)}, not a list of reals")
    for name, part in parts.items():
        if part.dtype is not torch.uint8 or part.dim() != 1:
            raise ValueError(f"its {name} are {part.dtype} {list(part.shape)}, not a list of uint8")
    if encoding == BITMAP:
        kept = _kept_by_bitmap(parts["rows"], parts["bitmap"], shape)
    else:
        kept = _kept_by_deltas(parts["deltas"], shape)
    count = int(kept.sum())
    if count != len(values):
        raise ValueError(f"it has {len(values)} values for {count} positions")
    tensor = torch.zeros(kept.shape, dtype=_INTEGERS[values.itemsize])
    tensor[kept] = _as_integers(values)
    return tensor.view(values.dtype), kept


def _as_integers(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.itemsize])


def _deltas(positions: Tensor, numel: int) -> Tensor:
    """Return the deltas of these ascending positions among `numel`."""
    edges = torch.cat([torch.tensor([-1]), positions, torch.tensor([numel])])
    gaps = edges.diff() - 1  # before each kept element, and after the last
    skips = gaps // _SKIP
    own = (skips[:-1] + 1).cumsum(0) - 1  # where the byte is that ends each number
    deltas = torch.full([int(skips.sum()) + len(positions)], _SKIP, dtype=torch.uint8)
    deltas[own] = (gaps[:-1] % _SKIP).to(torch.uint8)
    return deltas


def _kept_by_deltas(deltas: Tensor, shape: Sequence[int]) -> Tensor:
    own = deltas != _SKIP
    ends = (deltas.to(torch.int64) + own).cumsum(0)
    end, numel = int(ends[-1]) if len(ends) else 0, math.prod(shape)
    if not end <= numel < end + _SKIP:
        raise ValueError(f"its deltas end at {end} of {numel} elements")
    kept = torch.zeros(numel, dtype=torch.bool)
    kept[ends[own] - 1] = True
    return kept.view(shape)


def _packed(flags: Tensor) -> Tensor:
    flags = torch.nn.functional.pad(flags.to(torch.uint8), (0, -len(flags) % 8))
    return (flags.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpacked(name: str, packed: Tensor, count: int) -> Tensor:
    if len(packed) != -(-count // 8):
        raise ValueError(f"its {name} have {len(packed)} bytes for {count} bits")
    flags = (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()
    if flags[count:].any():
        raise ValueError(f"its {name} have bits set behind the last of {count}")
    return flags[:count].to(torch.bool)


def _kept_by_bitmap(rows: Tensor, bitmap: Tensor, shape: Sequence[int]) -> Tensor:
    count, columns = shape[0] if shape else 0, math.prod(shape[1:])
    live = _unpacked("rows", rows, count)
    alive = int(live.sum())
    if not count or not columns or _LEAST_LIVE * alive < count:
        raise ValueError(f"its bitmap has {alive} live rows of {count} with {columns} elements")
    bits = _unpacked("bitmap", bitmap, alive * columns)
    kept = torch.zeros(count, columns, dtype=torch.bool)
    kept[live] = bits.view(alive, columns)
    return kept.view(shape)

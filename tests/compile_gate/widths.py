"""How wide the global accesses are that each `tl.load` and `tl.store` of a kernel became.

Counting LDG.128 in the binary would not do: a kernel also loads thresholds and stores counts,
which are as narrow as they are few, so that some narrow accesses are right and others cost half
the bandwidth. The two are told apart by the size of the tile in Triton's IR. Source locations
connect the IR with the PTX, where the width is final: ptxas neither joins nor splits accesses.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from math import prod

# `#loc36 = loc("w"(#loc9))`, `#loc9 = loc("file.py":33:9)`, `#loc40 = loc(callsite(#loc19 at ...))`
_ALIAS = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
_POSITION = re.compile(r'([^/"]+)":(\d+):(\d+)')
_REFERENCE = re.compile(r"#loc\d*")
# `%x = tt.load %p, %m : tensor<8x512x!tt.ptr<f32>, #blocked> loc(#loc36)`. Scalars have no tensor.
_TILE = re.compile(
    r"^.*\b(tt\.load|tt\.store|ttg\.async_copy_global_to_local)\b"
    r".*?tensor<((?:\d+x)+)!tt\.ptr<([a-z]+)(\d+)\w*>.*?loc\((#loc\d*)\)$",
    re.MULTILINE,
)

_LOC = re.compile(r"^\s*\.loc\s+\d+\s+(\d+)\s+(\d+)")
_GLOBAL = re.compile(r"\b(?:ld|st)\.(?:[\w:]+\.)*?global\.(?:[\w:]+\.)*?(?:v(\d)\.)?[a-z]+(\d+)\s")
_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global.*?\],.*?\],\s*(0x[0-9a-f]+|\d+)")


@dataclass(frozen=True)
class Access:
    """A load or store of a tile in the source of a kernel."""

    operation: str
    place: str
    """File and line."""
    elements: int
    element_bytes: int
    widths: tuple[int, ...]
    """Bytes of each access that one thread makes for it."""

    @property
    def bytes(self) -> int:
        """Size of the tile."""
        return self.elements * self.element_bytes


def tile_accesses(ttgir: str, ptx: str) -> tuple[Access, ...]:
    """Every load and store of a tile, with the widths that one thread uses for it."""
    positions = _Positions(ttgir)
    widths = _widths(ptx)
    accesses = []
    for operation, shape, _, bits, reference in _TILE.findall(ttgir):
        file, *position = positions.of(reference)
        accesses.append(
            Access(
                operation="store" if operation == "tt.store" else "load",
                place=f"{file}:{position[0]}",
                elements=prod(int(size) for size in shape.rstrip("x").split("x")),
                element_bytes=max(1, int(bits) // 8),
                widths=tuple(widths.get(tuple(position), ())),
            )
        )
    return tuple(accesses)


class _Positions:
    """Resolves locations of the IR to file, line and column, innermost function first."""

    def __init__(self, ttgir: str):
        self._aliases = dict(_ALIAS.findall(ttgir))

    def of(self, reference: str | None) -> tuple[str, int, int]:
        while reference is not None:
            text = self._aliases.get(reference, "")
            position = _POSITION.search(text)
            if position:
                return position[1], int(position[2]), int(position[3])
            inner = _REFERENCE.search(text)
            reference = inner[0] if inner else None
        return "unknown", 0, 0


def _widths(ptx: str) -> dict[tuple[int, int], list[int]]:
    """Bytes of each global access, by the source position it came from."""
    widths: dict[tuple[int, int], list[int]] = defaultdict(list)
    position = (0, 0)
    inside = False
    for line in ptx.splitlines():
        # Triton's loads are inline assembler, and some versions of LLVM count the lines of its
        # text as lines of the source: within it, the position before it stays the right one.
        if "begin inline asm" in line or "end inline asm" in line:
            inside = "begin" in line
        elif not inside and (moved := _LOC.match(line)):
            position = (int(moved[1]), int(moved[2]))
        elif found := _GLOBAL.search(line):
            widths[position].append(int(found[1] or 1) * int(found[2]) // 8)
        elif found := _ASYNC.search(line):
            widths[position].append(int(found[1], 0))
    return widths

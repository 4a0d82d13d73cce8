"""Reads the instructions of a binary (SASS) as cuobjdump prints them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# One instruction: address, predicate, opcode with modifiers, operands.
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
# wgmma with operand A in registers: `HGMMA.64x128x16.F32.BF16 R24, R96, gdesc[UR20], R24`.
_A_IN_REGISTERS = re.compile(r"R\w+,\s*R\w+,")
_ADDRESS = re.compile(r"(?:^|[\s,])(0x[0-9a-f]+)$")
TENSOR_CORES = ("HGMMA", "HMMA", "UTCHMMA")
"""What multiplies on tensor cores, of Hopper, of all GPUs and of the large Blackwell ones."""


@dataclass(frozen=True)
class Instruction:
    """`@P0 IADD3.X R4, R5, R6, RZ` has a predicate, an opcode with a modifier, and operands."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = _ADDRESS.search(self.operands)
        return int(found[1], 16) if found else None

    @property
    def has_a_in_registers(self) -> bool:
        """Whether a wgmma takes its operand A from registers, not from shared memory."""
        return self.name == "HGMMA" and _A_IN_REGISTERS.match(self.operands) is not None

    def __str__(self) -> str:
        return f"{self.opcode} {self.operands} at {self.address:#06x}"


def instructions_of(text: str) -> list[Instruction]:
    """The instructions of a binary with one function, in the order of their addresses."""
    found = [
        Instruction(int(address, 16), predicate, opcode, " ".join(operands.split()))
        for address, predicate, opcode, operands in _INSTRUCTION.findall(text)
    ]
    if not found:
        raise ValueError(f"no instruction in what cuobjdump printed:\n{text[:1000]}")
    addresses = [instruction.address for instruction in found]
    if addresses != sorted(set(addresses)):
        raise ValueError("several functions in one binary: the gate knows kernels of one")
    return found


def main_loop(instructions: Sequence[Instruction]) -> tuple[int, int]:
    """How many instructions one iteration has, and how many of them are on tensor cores.

    Of the innermost loop with the most of these; (0, 0) without any. A loop is what lies between a
    backward branch and its target: with several paths through it an iteration has fewer.
    """
    loops = []
    for branch in instructions:
        if branch.name == "BRA" and branch.target is not None and branch.target < branch.address:
            body = [i for i in instructions if branch.target <= i.address <= branch.address]
            if on_tensor_cores := sum(i.name in TENSOR_CORES for i in body):
                loops.append((on_tensor_cores, len(body), branch.target, branch.address))
    innermost = [
        (on_tensor_cores, size)
        for on_tensor_cores, size, begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for _, _, b, e in loops)
    ]
    on_tensor_cores, size = max(innermost, default=(0, 0))
    return size, on_tensor_cores

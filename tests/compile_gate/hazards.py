"""Finds registers of wgmma that are touched while the tensor cores may still be using them.

wgmma (HGMMA in SASS) runs on after it was issued. Until `WARPGROUP.DEPBAR.LE gsb0, N` has waited
for it (for all groups but the last N; `gsb0` on an HGMMA ends a group), its operand A, if that is
in registers, must not be written, and its accumulators neither written nor read. Nothing in the
hardware sees to it. Compilers should, and both Triton and ptxas have had faults here, whose
results are wrong now and then, by chance.

Every path through the binary is followed, with the groups in flight along it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .sass import Instruction

# Which operands are results depends on the opcode. One that is not listed is an error: it might
# write what is in use. First those whose first register, after predicates, is their result.
_WRITE = """
    CS2R F2F F2FP F2I FADD FFMA FLO FMNMX FMUL FRND FSEL FSET HADD2 HFMA2 HMNMX2 HMUL2 HSET2
    I2F I2FP IABS IADD3 IMAD LDC LDG LDL LDS LDSM LEA LOP3 MOV MUFU P2R POPC PRMT S2R SEL SGXT
    SHF SHFL VIADD VIADDMNMX VIMNMX VIMNMX3 VOTE
"""
# Those with no register for a result: memory, predicates or uniform registers change, or nothing.
_WRITE_NONE = """
    BAR BRA BSSY BSYNC CALL CCTL DEPBAR ELECT EXIT FENCE FSETP HSETP2 ISETP LDGDEPBAR LDGSTS
    MEMBAR NOP PLOP3 R2P R2UR RED REDUX RET S2UR STG STL STS STSM SYNCS UIADD3 UIMAD UISETP
    ULDC ULEA ULOP3 UMOV UPLOP3 UPRMT USEL USGXT USHF UTMALDG VOTEU WARPGROUP WARPSYNC
"""
_REGISTER = re.compile(r"\bR(\d+)")
_WGMMA = re.compile(
    r"\.64x(?P<n>\d+)x\d+\.(?P<type>F32|F16)\S* R(?P<result>\d+), (?:R(?P<a>\d+)|gdesc\[\w+\]\S*),"
)
_WAIT = re.compile(r"gsb0, (0x[0-9a-f]+)")
_MOST_GROUPS = 16
"""More groups in flight than any kernel here has: nothing ever waits for them."""


@dataclass(frozen=True)
class _Registers:
    """What an instruction does with registers, each in the number of its group of four.

    A vector of two or four registers lies in one group of four: it is aligned to its size. wgmma
    takes whole ones: four for A, a multiple of four for accumulators. So of a vector, its first
    register tells, which is the one that SASS names.
    """

    written: frozenset[int]
    read: frozenset[int]
    a: frozenset[int] = frozenset()
    accumulators: frozenset[int] = frozenset()


class _Place(NamedTuple):
    """Where a path has come to, and what it has left behind."""

    at: int
    """The index of the instruction that is next."""
    groups: tuple[frozenset[int], ...] = (frozenset(),)
    """Indices of wgmmas in groups still in flight, oldest group first; the last one is open."""
    returns: tuple[int, ...] = ()
    """Where the calls return to that it is inside of, the last one last."""
    joins: tuple[tuple[str, int], ...] = ()
    """Where threads that took different ways meet again, by barrier."""


def hazards(instructions: Sequence[Instruction]) -> list[str]:
    """Say for every access that may come too early which it is, in the order of addresses.

    Raises ValueError, which names it, for an instruction that it does not know.
    """
    if not any(instruction.name == "HGMMA" for instruction in instructions):
        return []
    registers = [_registers(instruction) for instruction in instructions]
    flow = _Flow(instructions)
    found: dict[tuple[int, int], str] = {}
    waiting = [_Place(0)]
    seen = set(waiting)
    while waiting:
        place = waiting.pop()
        instruction = instructions[place.at]
        for running in frozenset().union(*place.groups):
            if problem := _problem(registers[place.at], registers[running]):
                text = f"{instruction} {problem} {instructions[running]}, which may still run"
                found[place.at, running] = text
        place = place._replace(groups=_after(place, instruction))
        if len(place.groups) > _MOST_GROUPS:
            found[place.at, place.at] = f"nothing waits for {instruction}"
            continue
        for following in flow.after(place):
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return [found[key] for key in sorted(found)]


def _registers(instruction: Instruction) -> _Registers:
    """Raises ValueError where it is not known which are written."""
    if instruction.name == "HGMMA":
        return _registers_of_wgmma(instruction)
    named = [int(number) // 4 for number in _REGISTER.findall(instruction.operands)]
    if instruction.name in _WRITE_NONE.split():
        return _Registers(frozenset(), frozenset(named))
    if instruction.name not in _WRITE.split():
        raise ValueError(
            f"it is not known which registers {instruction.opcode} writes "
            f"({instruction}): add it to hazards.py"
        )
    # RZ, the register that is always zero, takes a result that nobody needs.
    result = next(o for o in instruction.operands.split(", ") if not re.fullmatch(r"!?U?P\w+", o))
    if result == "RZ":
        return _Registers(frozenset(), frozenset(named))
    if not re.fullmatch(r"R\d+", result):
        raise ValueError(f"it is not known which register {instruction} writes")
    return _Registers(frozenset(named[:1]), frozenset(named[1:]))


def _registers_of_wgmma(instruction: Instruction) -> _Registers:
    found = _WGMMA.match(instruction.opcode.removeprefix("HGMMA") + " " + instruction.operands)
    if not found or any(int(found[name] or 0) % 4 for name in ("result", "a")):
        raise ValueError(f"it is not known which registers {instruction} uses")
    size = int(found["n"]) // (2 if found["type"] == "F32" else 4)
    first = int(found["result"])
    of_a = frozenset() if found["a"] is None else frozenset((int(found["a"]) // 4,))
    accumulators = frozenset(range(first // 4, -(-(first + size) // 4)))
    return _Registers(frozenset(), frozenset(), of_a, accumulators)


def _problem(new: _Registers, running: _Registers) -> str | None:
    """What the new instruction must not do to one in flight."""
    if (new.written | new.accumulators) & running.a:
        return "writes operand A of"
    if new.written & running.accumulators:
        return "writes accumulators of"
    if (new.read | new.a) & running.accumulators:
        return "reads accumulators of"
    # One wgmma after the other may add to the same accumulators, but not to some of them.
    if new.accumulators & running.accumulators and new.accumulators != running.accumulators:
        return "shares some accumulators with"
    return None


def _after(place: _Place, instruction: Instruction) -> tuple[frozenset[int], ...]:
    """The groups in flight after the instruction."""
    *before, last = place.groups
    if instruction.name == "HGMMA":
        last |= {place.at}
        return (*before, last, frozenset()) if "gsb0" in instruction.operands else (*before, last)
    if instruction.name == "WARPGROUP":
        wait = _WAIT.search(instruction.operands)
        if not wait and instruction.opcode != "WARPGROUP.ARRIVE":
            raise ValueError(f"it is not known what {instruction} waits for")
        if wait and not instruction.predicate:
            left = int(wait[1], 16)
            return (*before[max(0, len(before) - left) :], last)
    return place.groups


class _Flow:
    """Where a path may go on to."""

    def __init__(self, instructions: Sequence[Instruction]):
        self._instructions = instructions
        self._at = {instruction.address: i for i, instruction in enumerate(instructions)}
        # A call has no return address but the one that a MOV before it leaves in a register.
        self._moved = {each.target for each in instructions if each.name in ("MOV", "IMAD")}

    def after(self, place: _Place) -> Iterator[_Place]:
        """The next places."""
        instruction = self._instructions[place.at]
        following = place._replace(at=place.at + 1)
        always = not instruction.predicate
        if instruction.name == "BRA":
            always = always and instruction.operands.startswith("0x")
            yield place._replace(at=self._target(instruction))
        elif instruction.name == "CALL":
            if self._instructions[following.at].address not in self._moved:
                raise ValueError(f"it is not known where {instruction} returns to")
            returns = (*place.returns, following.at)
            yield place._replace(at=self._target(instruction), returns=returns)
        elif instruction.name == "RET":
            if not place.returns:
                raise ValueError(f"{instruction} does not return from a call")
            yield place._replace(at=place.returns[-1], returns=place.returns[:-1])
        elif instruction.name == "BSSY":
            always = False
            barrier = instruction.operands.partition(",")[0]
            joins = dict(place.joins) | {barrier: self._target(instruction)}
            following = following._replace(joins=tuple(sorted(joins.items())))
        elif instruction.name == "BSYNC":
            # Waits for the threads that took another way; all go on where BSSY said.
            joins = dict(place.joins)
            if instruction.operands not in joins:
                raise ValueError(f"it is not known where {instruction} goes to")
            at = joins.pop(instruction.operands)
            yield place._replace(at=at, joins=tuple(sorted(joins.items())))
        elif instruction.name != "EXIT":
            always = False
        if not always:
            yield following

    def _target(self, instruction: Instruction) -> int:
        if instruction.target not in self._at:
            raise ValueError(f"it is not known where {instruction} goes to")
        return self._at[instruction.target]

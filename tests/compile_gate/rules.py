"""What a binary must fulfil to be shipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .binary import Measurement
from .widths import Access

if TYPE_CHECKING:
    from .variants import Variant

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that one block may ask for: 163 KiB on A100, 227 KiB on H100, H200 and
B200, 99 KiB on the Blackwell GPUs that are graphics cards."""

USUAL = (90, 80)
"""What is compiled without being asked for."""

REGISTER_FILE = 65_536
"""Registers of one multiprocessor, which a block must fit in."""

WIDE = 16
"""Bytes of the widest access of one thread before Blackwell."""


def violations(variant: Variant, arch: int, found: Measurement) -> list[str]:
    """What is wrong with the binary, independent of what it was like before."""
    wrong = list(_resources(arch, found))
    if variant.tensor_cores:
        wrong += _tensor_cores(variant, arch, found)
    if variant.wide_accesses:
        wrong += _narrow(found)
    if found.hazards:
        others = len(found.hazards) - 1
        wrong.append(found.hazards[0] + (f" ({others} more such accesses)" if others else ""))
    return wrong


def _resources(arch: int, found: Measurement) -> Iterator[str]:
    if found.spilled or found.local:
        yield (
            f"{found.spilled} bytes spilled and reloaded per thread, "
            f"{found.local} instructions on local memory (LDL, STL)"
        )
    # ptxas keeps to these limits as long as it knows the number of threads.
    limit = min(255, REGISTER_FILE // found.threads)
    if found.registers > limit:
        yield f"{found.registers} registers, at most {limit} with {found.threads} threads"
    # Triton checks this at launch only, when it knows the device.
    if found.shared > SHARED_LIMIT[arch]:
        yield f"{found.shared:,} bytes of shared memory, at most {SHARED_LIMIT[arch]:,}"


def _tensor_cores(variant: Variant, arch: int, found: Measurement) -> Iterator[str]:
    if arch != 90:  # large Blackwell GPUs have instructions of their own, UTCHMMA
        if not found.mma:
            yield "no tensor-core instruction (HMMA)"
        return
    if not found.hgmma:
        yield f"no wgmma (HGMMA), and {found.hmma} HMMA"
    elif variant.operand_a_in_registers and found.hgmma_a_in_registers < found.hgmma:
        through_memory = found.hgmma - found.hgmma_a_in_registers
        yield f"{through_memory} of {found.hgmma} wgmma take operand A from shared memory"
    yield from (f"ptxas {warning}" for warning in found.serialised)


def _narrow(found: Measurement) -> Iterator[str]:
    """Accesses of the streamed tensors that are narrower than they could be.

    These are the tiles at least half as large as the largest one. What is smaller is a vector of
    thresholds, counts or partial sums beside a tile, and scalars are no tiles at all.
    """
    largest = max((access.elements for access in found.accesses), default=0)
    if not largest:
        yield "no load or store of a tile found, so that their widths are not known"
    for access in dict.fromkeys(found.accesses):  # pipelining repeats them
        if 2 * access.elements >= largest and (problem := _problem(access, found.threads)):
            yield f"{access.operation} in {access.place}: {problem}"


def _problem(access: Access, threads: int) -> str | None:
    if access.bytes < WIDE * threads:
        return (
            f"the tile of {access.elements} elements has {access.bytes / threads:g} bytes "
            f"for each of {threads} threads, {WIDE} are needed"
        )
    narrow = sorted(width for width in access.widths if width < WIDE)
    if narrow:
        return f"{len(narrow)} of {len(access.widths)} accesses have {narrow[0]} bytes, not {WIDE}"
    # Guards this check itself: had the way from IR to PTX lost an access, nothing would be narrow.
    if sum(access.widths) * threads < access.bytes:
        return f"only {sum(access.widths) * threads} of {access.bytes} bytes found in the PTX"
    return None

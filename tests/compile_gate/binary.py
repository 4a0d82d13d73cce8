"""Compiles one variant for one architecture and measures the binary."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .hazards import hazards
from .sass import Instruction, instructions_of, main_loop
from .widths import Access, tile_accesses

if TYPE_CHECKING:
    from .variants import Variant

# C7510 to C7520 say for one reason or another that ptxas waits after every single wgmma.
_SERIALISED = re.compile(
    r"\((C75\d\d)\) (?:Potential Performance Loss: )?(.*?)(?: in the function|$)", re.M
)


@dataclass(frozen=True)
class Measurement:
    """What the binary of one variant needs and does."""

    registers: int
    spilled: int
    """Bytes per thread that ptxas spills, stores and loads together."""
    local: int
    """Instructions on local memory: spills, and arrays indexed at run time."""
    shared: int
    hgmma: int
    hgmma_a_in_registers: int
    hmma: int
    loop: int
    """Instructions in an iteration of the main loop, the one with most on tensor cores."""
    loop_mma: int
    """How many of them are on tensor cores."""
    tma: int
    loads: dict[int, int]
    """Global load instructions by width in bits, asynchronous copies included."""
    stores: dict[int, int]
    serialised: tuple[str, ...]
    """What ptxas says where it serialises wgmma."""
    hazards: tuple[str, ...]
    """What touches registers that a wgmma may still use, or why that is not known."""
    accesses: tuple[Access, ...]
    """The loads and stores of the kernel's source."""
    threads: int
    seconds: float

    @property
    def mma(self) -> int:
        """Tensor-core instructions of either kind."""
        return self.hgmma + self.hmma


def prepare(cache: str) -> None:
    """Set up this process for `measure`. Only for processes that do nothing else."""
    from triton import knobs

    # A cached binary has no ptxas log. The private folder keeps the user's cache as it is.
    knobs.cache.dir = cache
    knobs.compilation.always_compile = True
    # The log is that of the very run that made the binary. A second run of ptxas on the same PTX
    # would need the same flags, and these differ: 3.9 adds --regAllocOptLevel=2.
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.store_binary_only = False
    knobs.compilation.disable_line_info = False  # widths.py needs the lines
    # 3.9 announces at every first use that the default of 3.10 differs.
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")


def build(variant: Variant, arch: int) -> tuple[Any, str]:
    """The variant compiled with the installed Triton, and what was printed; `prepare` first."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(variant.kernel, *_specialisation(variant))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options={
                "num_warps": variant.warps,
                "num_stages": variant.stages,
                "enable_fp_fusion": True,  # as the launchers say
            },
        )
    return compiled, printed.getvalue()


def measure(variant: Variant, arch: int) -> Measurement:
    """Build and inspect the result."""
    start = time.perf_counter()
    compiled, log = build(variant, arch)
    instructions = instructions_of(_disassembled(compiled.asm["cubin"]))
    opcodes = Counter(instruction.opcode for instruction in instructions)
    loop, loop_mma = main_loop(instructions)
    return Measurement(
        registers=_number(r"Used (\d+) registers", log),
        spilled=_number(r"(\d+) bytes spill stores", log)
        + _number(r"(\d+) bytes spill loads", log),
        local=_count(opcodes, "LDL", "STL"),
        shared=compiled.metadata.shared,
        hgmma=_count(opcodes, "HGMMA"),
        hgmma_a_in_registers=sum(each.has_a_in_registers for each in instructions),
        hmma=_count(opcodes, "HMMA", "UTCHMMA"),
        loop=loop,
        loop_mma=loop_mma,
        tma=_count(opcodes, "UTMALDG", "UTMASTG"),
        loads=_by_width(opcodes, "LDG", "LDGSTS"),
        stores=_by_width(opcodes, "STG"),
        serialised=tuple(sorted({" ".join(found) for found in _SERIALISED.findall(log)})),
        hazards=_hazards(instructions),
        accesses=tile_accesses(compiled.asm["ttgir"], compiled.asm["ptx"]),
        threads=32 * variant.warps,
        seconds=time.perf_counter() - start,
    )


def _specialisation(variant: Variant) -> tuple[dict[str, Any], dict[tuple, Any], dict[tuple, Any]]:
    """Signature, constants and attributes that a launch with such arguments would come to.

    Constants and attributes go by path: an argument's number, then its place in tuples.
    """
    names, given = variant.kernel.arg_names, variant.arguments
    for problem, arguments in (
        ("missing", set(names) - set(given)),
        ("not arguments of the kernel", set(given) - set(names)),
    ):
        if arguments:
            raise ValueError(f"{', '.join(sorted(arguments))}: {problem}")
    constants, attributes = {}, {}

    def type_of(argument: Any, *path: int, constant: bool = False) -> Any:
        if isinstance(argument, str) and not constant:
            # Host-made descriptors are spelled "tensordesc<bf16[128, 64]>" in 3.6 and 3.9 alike
            # (the space is optional), take no attributes, and are one argument here: shape and
            # strides are appended to the compiled kernel's parameters by Triton itself.
            kind, _, divisor = argument.partition(":")
            if divisor:
                attributes[path] = [["tt.divisibility", int(divisor)]]
            return kind
        if isinstance(argument, tuple) and not constant:
            types = [type_of(each, *path, i) for i, each in enumerate(argument)]
            return argument._make(types) if hasattr(argument, "_make") else tuple(types)
        constants[path] = argument
        return "constexpr"

    signature = {
        name: type_of(given[name], number, constant=parameter.is_constexpr)
        for number, (name, parameter) in enumerate(zip(names, variant.kernel.params, strict=True))
    }
    return signature, constants, attributes


def _disassembled(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _hazards(instructions: Sequence[Instruction]) -> tuple[str, ...]:
    try:
        return tuple(hazards(instructions))
    except ValueError as error:
        return (str(error),)


def _count(opcodes: Counter[str], *names: str) -> int:
    return sum(n for opcode, n in opcodes.items() if opcode.split(".")[0] in names)


def _by_width(opcodes: Counter[str], *names: str) -> dict[int, int]:
    widths: Counter[int] = Counter()
    for opcode, n in opcodes.items():
        name, *modifiers = opcode.split(".")
        if name in names:
            sizes = [int(m.lstrip("US")) for m in modifiers if re.fullmatch(r"[US]?\d+", m)]
            widths[sizes[0] if sizes else 32] += n
    return dict(sorted(widths.items(), reverse=True))


def _number(pattern: str, log: str) -> int:
    found = re.findall(pattern, log)
    if not found:
        raise RuntimeError(f"ptxas did not print {pattern!r}. Its log:\n{log[-2000:]}")
    return max(map(int, found))

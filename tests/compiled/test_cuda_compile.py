"""Compiles the CUDA kernels without a GPU, and checks what the compiler made of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc"))

from dst_build import environment

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted(path.name for path in (CSRC / "cuda").glob("*.cu"))
# What a build compiles for where TORCH_CUDA_ARCH_LIST is not set.
CODES, NAMES = environment.architecture_flags({})
ARCHITECTURES = {name for name in NAMES.split() if name.startswith("sm_")}
FLAGS = (
    "-std=c++20",
    "-O3",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-Xptxas=-v",
    "--fatbin",
)
THREADS = 128  # of every block
REGISTERS = 65536  # of a multiprocessor
SMALL = 2048  # bytes of parameters of the kernels for a few segments

# At least so many accesses of 16 and of 8 bytes: loads, loads, stores, stores. They follow from
# the loops of the source: the number of arrays, times how far each loop is unrolled, for each dtype
# of the gradients or of W * M that a kernel has a loop for.
WIDE = {
    "pack_kernel float32": (28, 0, 16, 20),
    "pack_kernel bfloat16": (10, 14, 20, 12),
    "pack_kernel float16": (10, 14, 20, 12),
    "post_kernel float32": (22, 8, 18, 0),
    "post_kernel bfloat16": (14, 12, 8, 8),
    "post_kernel float16": (14, 12, 8, 8),
    "regularization_kernel": (2, 0, 2, 0),
    "norm_kernel float32": (32, 16, 0, 0),
    "norm_kernel bfloat16": (8, 0, 0, 0),
    "norm_kernel float16": (8, 0, 0, 0),
    "step_kernel sgd float32": (60, 16, 46, 44),
    "step_kernel sgd bfloat16": (12, 4, 20, 8),
    "step_kernel sgd float16": (12, 4, 20, 8),
    "step_kernel adamw float32": (72, 16, 58, 44),
    "step_kernel adamw bfloat16": (14, 4, 22, 8),
    "step_kernel adamw float16": (14, 4, 22, 8),
    # Small or rarely at work.
    "add_pieces_kernel": (0, 0, 0, 0),
    "total_kernel": (0, 4, 0, 0),
}


@dataclass
class Kernel:
    """What one kernel needs and does on one architecture."""

    registers: int
    local: int  # bytes of stack and local memory
    instructions: Counter = field(default_factory=Counter)

    def count(self, prefix: str, suffix: str = "") -> int:
        return sum(
            number
            for name, number in self.instructions.items()
            if name.startswith(prefix) and suffix in name
        )


def nvcc() -> str:
    try:
        return environment.nvcc()
    except environment.BuildError as error:
        pytest.skip(str(error))


def cuobjdump() -> str:
    """The toolkit's, else the one that Triton brings along."""
    beside = shutil.which("cuobjdump", path=str(Path(nvcc()).resolve().parent))
    if beside and shutil.which("nvdisasm", path=str(Path(beside).parent)):
        return beside
    triton = pytest.importorskip("triton", reason="needs cuobjdump and nvdisasm")
    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(found) if found.exists() else pytest.skip("needs cuobjdump and nvdisasm")


def name_of(mangled: str) -> str:
    """Such as "step_kernel adamw float32", and whether its table is small: "small"."""
    names = {key.split()[0] for key in WIDE}
    name = next(name for name in names if f"{len(name)}{name}" in mangled)
    rule = re.search(r"\d(Sgd|AdamW)Rule", mangled)
    dtype = "bfloat16" if "__nv_bfloat16" in mangled else "float16" if "__half" in mangled else ""
    typed = re.search(rf"{name}I(f|6__half|13__nv|NS0_\d+(Sgd|AdamW)Rule)", mangled)
    small = f"Li{SMALL}E" in mangled and "small"
    words = [name, rule and rule[1].lower(), typed and (dtype or "float32"), small]
    return " ".join(word for word in words if word)


def kernels_of(dump: str) -> dict[tuple[str, str], Kernel]:
    """From cuobjdump's text, by name and architecture."""
    kernels: dict[tuple[str, str], Kernel] = {}
    architecture = function = None
    resources = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
    instruction = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    for line in dump.splitlines():
        if found := re.match(r"arch = (\w+)", line.strip()):
            architecture = found[1]
        elif found := re.search(r"Function\s*:?\s*(\w+)", line):
            function = name_of(found[1]), architecture
        elif found := resources.search(line):
            registers, stack, local = map(int, found.groups())
            kernels[function] = Kernel(registers, stack + local)
        elif found := instruction.search(line):
            kernels[function].instructions[found[1]] += 1
    return kernels


def compile(source: str, target: Path) -> str:
    """For all architectures at once; returns what the compiler printed."""
    include = Path(torch.__file__).parent / "include"
    command = [nvcc(), *FLAGS, *CODES, f"-I{CSRC}", "-isystem", str(include)]
    result = subprocess.run(
        [*command, str(CSRC / "cuda" / source), "-o", str(target)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_compile_to_what_was_meant(source, tmp_path):
    dump_tool = cuobjdump()
    target = tmp_path / "kernels.fatbin"
    printed = compile(source, target)
    assert "warning" not in printed.lower(), printed
    spills = {int(n) for n in re.findall(r"(\d+) bytes spill", printed)}
    assert spills == {0}, printed
    dump = subprocess.run(
        [dump_tool, "-res-usage", "-sass", str(target)], capture_output=True, text=True, check=True
    )
    kernels = kernels_of(dump.stdout)
    assert {architecture for _, architecture in kernels} == ARCHITECTURES
    for (name, architecture), kernel in kernels.items():
        check(f"{name} on {architecture}", kernel, WIDE[name.removesuffix(" small")])
    small = {name for name, _ in kernels if name.endswith(" small")}
    assert {f"{name} small" for name, _ in kernels if name not in small | {"total_kernel"}} == small


def check(name: str, kernel: Kernel, wide: tuple[int, ...]) -> None:
    assert kernel.instructions, f"{name}: no code was found"
    assert kernel.local == 0, f"{name}: {kernel.local} bytes of local memory"
    assert kernel.count("LDL") == kernel.count("STL") == 0, f"{name}: spills"
    # As many registers as leave a multiprocessor the threads of two blocks of 256.
    blocks = REGISTERS // (kernel.registers * THREADS)
    assert blocks * THREADS >= 512, f"{name}: {kernel.registers} registers"
    found = tuple(kernel.count(kind, width) for kind in ("LDG", "STG") for width in (".128", ".64"))
    for number, least in zip(found, wide, strict=True):
        assert number >= least, f"{name}: wide accesses {found}, expected {wide}"
    atomics = [op for op in kernel.instructions if op.startswith(("ATOM", "RED"))]
    assert not any("F" in part for op in atomics for part in op.split(".")[1:] if part != "E"), (
        f"{name}: {atomics}, which makes results depend on the order"
    )


def test_every_kernel_is_measured():
    """So that a new kernel, or a table that is out of date, is noticed without a compiler."""
    text = "".join(path.read_text() for path in (CSRC / "cuda").glob("*.cu*"))
    kernels = set(re.findall(r"\b(\w+_kernel)\(const", text))
    assert kernels == {name.split()[0] for name in WIDE}

"""`python -m tests.compile_gate` compiles all shipped kernels without a GPU and judges them."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .baseline import Baseline
from .binary import Measurement
from .parallel import Task, measure_all
from .rules import SHARED_LIMIT, USUAL, violations

if TYPE_CHECKING:
    from .variants import Variant

BASELINE = Path(__file__).with_name("baseline.json")


def main(arguments: Sequence[str] | None = None, variants: Sequence[Variant] | None = None) -> int:
    """Run the gate on what is shipped, or on other variants. 0 is passed, 1 failed, 2 not run."""
    options = _parse(arguments)
    reason = _unavailable(options)
    if reason is not None:
        print(f"compile_gate: {reason}", file=sys.stderr)
        return 2
    if variants is None:
        from .variants import shipped

        variants = shipped()
    names = [variant.name for variant in variants]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        print(f"compile_gate: several variants are named {', '.join(repeated)}", file=sys.stderr)
        return 2
    architectures = sorted(set(options.arch or USUAL), reverse=True)
    tasks = [
        (variant, arch)
        for variant in variants
        if options.filter.lower() in variant.name.lower()
        for arch in architectures
        # Launchers take Ampere's tiles on every GPU that is not a Hopper.
        if (arch if arch == 90 else 80) in variant.architectures
    ]
    if not tasks:
        print(f"compile_gate: no variant matches {options.filter!r}", file=sys.stderr)
        return 2

    import triton

    baseline = Baseline(options.baseline, triton.__version__)
    _print_tools(architectures, baseline, updating=options.update_baseline)
    measured, wrong = _judge(tasks, options.jobs, None if options.update_baseline else baseline)
    if wrong:
        print(f"\n{len(wrong)} violations in {len(tasks)} binaries:")
        print("\n".join(f"  {line}" for line in wrong))
        return 1
    print(f"\n{len(tasks)} binaries, no violation.")
    if options.update_baseline:
        usual = {key: found for key, found in measured.items() if key[1] in USUAL}
        baseline.update(usual, complete=not options.filter)
        print(f"Wrote {baseline.path}")
    elif gone := baseline.gone(set(names)):
        print(f"In the baseline, but not shipped: {', '.join(gone)}. --update-baseline drops them.")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.compile_gate", description=__doc__)
    parser.add_argument(
        "--arch",
        type=int,
        action="append",
        choices=sorted(SHARED_LIMIT),
        help="compute capability without the dot; may be repeated; default: 90 and 80",
    )
    parser.add_argument("--filter", default="", help="only variants whose name contains this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="default: %(default)s")
    parser.add_argument(
        "--update-baseline",
        action="store_true",
        help="write what was measured as the baseline of this version of Triton, if all is well",
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"argument --jobs: at least 1, not {options.jobs}")
    return options


def _unavailable(options: argparse.Namespace) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it has wheels for Linux on x86-64 and ARM"
    from triton import knobs

    if knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, so that nothing would be compiled; unset it"
    if options.update_baseline and not options.baseline.parent.is_dir():
        return f"there is no folder {options.baseline.parent} to write the baseline into"
    return None


def _print_tools(architectures: Sequence[int], baseline: Baseline, *, updating: bool) -> None:
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    assemblers = []
    for arch in architectures:
        tool = get_ptxas(arch)  # depends on the version of Triton, and may be overridden
        assemblers.append(f"sm_{arch} by {Path(tool.path).name} {tool.version}")
    print(f"triton {triton.__version__}, {', '.join(assemblers)}")
    if not baseline.known and not updating:
        print(
            f"No baseline for Triton {baseline.version} in {baseline.path}: "
            "only absolute limits are checked."
        )


def _judge(
    tasks: Sequence[Task], jobs: int, baseline: Baseline | None
) -> tuple[dict[tuple[str, int], Measurement], list[str]]:
    """Print the table row by row; return the measurements and what is wrong."""
    measured = {}
    wrong: list[str] = []
    width = max(len(variant.name) for variant, _ in tasks)
    print(_row(width, "variant", "sm", *COLUMNS), flush=True)
    for (variant, arch), result in zip(tasks, measure_all(tasks, jobs), strict=True):
        if isinstance(result, str):
            problems, cells = [result], ["-"] * (len(COLUMNS) - 1)
        else:
            measured[variant.name, arch] = result
            problems, cells = violations(variant, arch, result), _cells(result)
            if baseline is not None and arch in USUAL:
                problems += baseline.regressions(variant.name, arch, result)
        verdict = "FAIL" if problems else "ok"
        print(_row(width, variant.name, str(arch), *cells, verdict), flush=True)
        wrong += [f"{variant.name}, sm_{arch}: {problem}" for problem in problems]
    return measured, wrong


# Each with its width. `loop` is an iteration of the main loop, of which `mma` on tensor cores.
COLUMNS = {
    "regs": 4, "spill": 5, "shared": 7, "hgmma": 5, "A-reg": 5, "hmma": 5, "loop": 5, "mma": 4,
    "tma": 3, "loads": 14, "stores": 14, "s": 4, "": 4,
}  # fmt: skip


def _cells(found: Measurement) -> list[str]:
    counts = (found.registers, found.spilled, found.shared, found.hgmma)
    counts += (found.hgmma_a_in_registers, found.hmma, found.loop, found.loop_mma)
    counts += (found.tma,)
    widths = (
        " ".join(f"{bits}x{n}" for bits, n in accesses.items()) or "-"
        for accesses in (found.loads, found.stores)
    )
    return [*map(str, counts), *widths, f"{found.seconds:.1f}"]


def _row(width: int, name: str, arch: str, *cells: str) -> str:
    columns = (cell.rjust(size) for cell, size in zip(cells, COLUMNS.values(), strict=True))
    return f"{name.ljust(width)} {arch.rjust(2)} {' '.join(columns)}".rstrip()


if __name__ == "__main__":
    sys.exit(main())

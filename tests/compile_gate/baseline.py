"""What each variant needed when the baseline was written, to notice when it needs more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .binary import Measurement

REGISTER_SLACK = 8
"""Registers are allocated in eights; a smaller difference is the noise of instruction order."""

LOOP_SLACK = 1.1
"""How many times as many instructions an iteration may have."""

HINT = "run with --update-baseline if that is intended"


class Baseline:
    """A JSON file: Triton version -> architecture -> variant -> what it needs."""

    def __init__(self, path: Path, triton_version: str):
        self.path = path
        self.version = ".".join(triton_version.split(".")[:2])
        self._all: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    @property
    def known(self) -> bool:
        """Whether there are entries for this version of Triton."""
        return self.version in self._all

    def regressions(self, name: str, arch: int, found: Measurement) -> list[str]:
        """What is worse than it was. Nothing, for a version of Triton without entries."""
        if not self.known:
            return []
        before = self._section(arch).get(name)
        if before is None:
            return [f"not in the baseline; {HINT}"]
        wrong = []
        if found.registers > before["registers"] + REGISTER_SLACK:
            wrong.append(f"{found.registers} registers, {before['registers']} before; {HINT}")
        if found.shared > before["shared"]:
            wrong.append(
                f"{found.shared} bytes of shared memory, {before['shared']} before; {HINT}"
            )
        if before["mma"] and not found.mma:
            wrong.append(f"no tensor-core instruction, {before['mma']} before; {HINT}")
        if found.loop > LOOP_SLACK * before["loop"]:
            wrong.append(
                f"{found.loop} instructions per iteration ({found.loop_mma} on tensor cores), "
                f"{before['loop']} before ({before['loop_mma']}); {HINT}"
            )
        return wrong

    def gone(self, names: set[str]) -> list[str]:
        """Variants in the baseline that are not shipped any more."""
        known = {name for section in self._all.get(self.version, {}).values() for name in section}
        return sorted(known - names)

    def update(self, found: dict[tuple[str, int], Measurement], *, complete: bool) -> None:
        """Write what was measured; where that is everything, in place of all entries so far."""
        for arch in {arch for _, arch in found}:
            new = {
                name: {
                    "registers": m.registers,
                    "shared": m.shared,
                    "mma": m.mma,
                    "loop": m.loop,
                    "loop_mma": m.loop_mma,
                }
                for (name, measured_arch), m in found.items()
                if measured_arch == arch
            }
            section = new if complete else self._section(arch) | new
            entries = self._all.setdefault(self.version, {})
            entries[str(arch)] = dict(sorted(section.items()))
        self.path.write_text(_lines(self._all))

    def _section(self, arch: int) -> dict[str, dict[str, int]]:
        return self._all.get(self.version, {}).get(str(arch), {})


def _lines(entries: dict[str, Any]) -> str:
    """JSON with one line for each variant, so that a change of one is one line of a diff."""
    versions = []
    for version, archs in sorted(entries.items(), key=lambda item: _as_numbers(item[0])):
        sections = []
        for arch, variants in sorted(archs.items()):
            rows = [f"      {json.dumps(name)}: {json.dumps(v)}" for name, v in variants.items()]
            sections.append(f'    "{arch}": {{\n' + ",\n".join(rows) + "\n    }")
        versions.append(f'  "{version}": {{\n' + ",\n".join(sections) + "\n  }")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))

"""Which kernels are profiled, and what is said of them, with an ncu that is made up."""

import sys

import pytest
from made_up_rows import MADE_UP, ceilings, measured, times
from typer.testing import CliRunner

from bench.cases import LinearCase, WeightsCase
from bench.commands import app
from bench.profile import _OTHERS, _SHARES, _TIME, bound, targets

SMALL, LARGE, WEIGHTS = (
    *(LinearCase(M, 4096, 4096) for M in (128, 1024)),
    WeightsCase("4096x4096"),
)
TF32 = LinearCase(4096, 4096, 4096, dtype="tf32")
FIGURES = [*ceilings(1e12, 1e14), *times(SMALL, "forward", fused=1e-3, dense=1e-4)]
FIGURES += [*times(LARGE, "forward", fused=9e-4), *times(WEIGHTS, "pack", auto=2e-4)]
FIGURES += times(TF32, "forward", fused=1e-3)
DRAM, TENSOR, L2, SM = _SHARES.values()
WAVES, STALL = _OTHERS["waves"], "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
# As ncu prints the raw page: messages, header, units, launches.
PAGE = f"""==PROF== Connected to process 7
"ID","Kernel Name","{_TIME}","{DRAM}","{TENSOR}"
"","","ns","%","%"
"0","fill","3,000","95","0"
"1","pack_kernel<float>","205,000","87.25","n/a"
==PROF== Disconnected
"""
NCU = f"""#!{sys.executable}
import pathlib, sys
assert sys.argv[-5:-3] == ["-m", "bench.profile"], sys.argv
if "{WEIGHTS.name}" in sys.argv:
    sys.exit("no permission")
pathlib.Path(sys.argv[sys.argv.index("--log-file") + 1]).write_text({PAGE!r})
"""


def test_ours_are_ranked_and_one_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    found = measured(tmp_path / "results.csv", FIGURES)
    names = [f"{case.name}/fused/forward" for case in (SMALL, LARGE)] + [
        f"{WEIGHTS.name}/auto/pack"
    ]
    first, second, third = targets(found)
    assert [first.name, second.name, third.name] == names
    bytes_moved = 4096 * 4096 * 4 + 2 * 128 * 4096 * 2  # which takes longer than the FLOPs
    assert first.least == pytest.approx(bytes_moved / 1e12)
    assert second.least == pytest.approx(2 * 1024 * 4096**2 / 1e14)
    (one,) = targets(found, ["tf32.*fused"])
    assert one.name.startswith(TF32.name) and one.least is None, "no ceiling is measured in TF32"

    command = ["profile", str(tmp_path / "results.csv"), "--count", "4"]
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "ncu (Nsight Compute) or a CUDA device" in result.output
    (tmp_path / "ncu").write_text(NCU)
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: MADE_UP)
    result, text = CliRunner().invoke(app, command), (tmp_path / "profile.md").read_text()
    assert (
        result.exit_code == 1 and f"{third.name}: exit code 1, see profile-2.txt" in result.output
    )
    assert "no permission" in (tmp_path / "profile-2.txt").read_text()
    assert text.count("Bound by memory bandwidth (DRAM): 87 % of its peak.") == 2
    assert "| kernel | `pack_kernel<float>` |" in text and "14.45 times" in text
    result = CliRunner().invoke(app, [*command, "--minutes", "0"])
    assert result.exit_code == 1 and result.output.count("no time left") == 3


def test_what_bounds_a_kernel():
    for figures, sentence in (
        ({DRAM: 80, TENSOR: 95}, "memory bandwidth (DRAM): 80 %"),
        ({DRAM: 79.9, TENSOR: 80, SM: 85}, "arithmetic (tensor pipe): 80 %"),
        ({L2: 81, SM: 85}, "bandwidth of L2: 81 %"),
        ({WAVES: 0.4, STALL.format("wait"): 1}, "small grid: 40%"),
        ({WAVES: 0.5, STALL.format("wait"): 1, STALL.format("gmma"): 3}, "75% of a warp's time"),
        ({STALL.format("selected"): 1, STALL.format("not_selected"): 5}, "Not known"),
    ):
        assert sentence in bound({name: str(value) for name, value in figures.items()})

"""`python -m bench profile` with a fake ncu, and the rules by which it judges."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time

import pytest
import torch
from made_up_rows import MADE_UP, ceilings, environment, times, write_rows
from typer.testing import CliRunner

from bench import profiled, profiling
from bench.bounds import OURS, judged, share_of_time, verdict
from bench.cases import Case, ListCase, ModelCase, case_of
from bench.commands import app
from bench.environment import ROOT
from bench.ncu import DRAM, L2, SM, TENSOR, WAVES, Launch, launches_in
from bench.profiled import arguments, call_once

AMP = "bf16-autocast"
LINEAR = Case("linear", 128, 4096, 4096, AMP)
TF32 = Case("linear", 4096, 4096, 4096, "tf32")
WEIGHT = Case("masked_weight", 0, 4096, 4096, AMP)
LIST = ListCase("resnet-50", AMP)
MODEL = ModelCase("gpt", 8, AMP)
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"

# As ncu prints the raw page: what is left of ABOUT stands before the metrics.
ABOUT = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size"'
METRICS = {
    "gpu__time_duration.sum": ("ns", "205,000", "3,000"),
    SM: ("%", "41.5", "12"),
    TENSOR: ("%", "n/a", "0"),
    DRAM: ("%", "87.25", "95"),
    L2: ("%", "50", "20"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "24.8", "60"),
    "launch__registers_per_thread": ("register/thread", "168", "32"),
    "launch__shared_mem_per_block_static": ("byte/block", "1,024", "0"),
    "launch__shared_mem_per_block_dynamic": ("byte/block", "98,304", "0"),
    STALL.format("long_scoreboard"): ("inst", "6", "1"),
    STALL.format("gmma"): ("inst", "3", "0"),
    STALL.format("gmma_not_issued"): ("inst", "3", "0"),
    STALL.format("selected"): ("inst", "1", "1"),
}
KERNELS = (
    "void dst::cuda::(anonymous namespace)::pack_kernel<float>(Table<PackEntry>)",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)",
)


def _line(*values):
    return ",".join(f'"{value}"' for value in values)


def _page(kernels=KERNELS, metrics=METRICS):
    """Messages, header, units, and the launches: theirs first."""
    rows = [
        _line(i, 7, "python3", "host", name, 1, 7, "(128, 1, 1)", *(m[1 + i] for m in columns))
        for i, (name, columns) in enumerate((name, metrics.values()) for name in kernels)
    ]
    return "\n".join(
        [
            "==PROF== Connected to process 7",
            '==PROF== Profiling "pack_kernel" - 0: 0%....50%....100% - 9 passes',
            ABOUT + "," + _line(*metrics),
            _line(*[""] * 8, *(metric[0] for metric in metrics.values())),
            *reversed(rows),
            "==PROF== Disconnected from process 7",
        ]
    )


FAKE = """\
#!{python}
import json, pathlib, sys, time
calls = pathlib.Path({calls!r})
with calls.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
behaviour = json.loads({behaviours!r}).get(sys.argv[-1], "profile")
log = pathlib.Path(sys.argv[sys.argv.index("--log-file") + 1])
if behaviour == "hang":
    time.sleep(60)
if behaviour == "crash":
    print("RuntimeError: no such case")
    sys.exit(1)
if behaviour == "forbidden":
    log.write_text("==PROF== Connected\\n==ERROR== ERR_NVGPUCTRPERM - no permission\\n")
    sys.exit(0)
log.write_text({page!r})
"""


@pytest.fixture
def fake_ncu(tmp_path, monkeypatch):
    """Puts a fake on the PATH that does what it is told for a pass; a function to its calls."""

    def put(page=None, **behaviours):
        folder, calls = tmp_path / "bin", tmp_path / "calls"
        folder.mkdir()
        script = FAKE.format(
            python=sys.executable,
            calls=str(calls),
            behaviours=json.dumps(behaviours),
            page=_page() if page is None else page,
        )
        (folder / "ncu").write_text(script)
        (folder / "ncu").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some GPU")
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()]

    return put


@pytest.fixture
def csv(tmp_path):
    figures = [
        *ceilings(1e12, 1e14),
        *times(LINEAR, "forward", fused=1e-3, dense=1e-4),
        *times(LINEAR, "grad_weight", fused=5e-4),
        *times(WEIGHT, "forward", auto=2e-4),
        *times(LIST, "adamw", auto=1e-3),
        *times(TF32, "forward", fused=1e-3),
        *times(MODEL, "step", dense=1e-1),
    ]
    return write_rows(tmp_path / "in" / "results.csv", figures)


def _profile(*more):
    result = CliRunner().invoke(app, ["profile", *map(str, more)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


TABLE = """\
## `linear-m128-n4096-k4096-bf16-autocast-r0.1`: fused, forward

|  | figure |
| ---: | ---: |
| kernel | `void dst::cuda::(anonymous namespace)::pack_kernel<float>(Table<PackEntry>)` |
| measured | 1 ms |
| floor | 69.2 µs, set by memory |
| measured ÷ floor | 14.45 |
| duration in ncu | 205 µs |
| of the kernels of the call | 99% of 2 |
| SM throughput | 41.5 % |
| tensor pipe | - |
| DRAM | 87.2 % |
| L2 | 50 % |
| achieved occupancy | 24.8 % |
| waves | - |
| registers a thread | 168 |
| shared memory a block | 97 KiB |
| stalls | long_scoreboard 60%, gmma 30% |

Bound by memory bandwidth: DRAM runs at 87 % of its peak.
"""


def test_the_worst_kernels_are_profiled_and_judged(tmp_path, csv, fake_ncu):
    calls = fake_ncu()
    code, output = _profile(csv, "--count", 2, "--out", tmp_path / "out")
    assert code == 0, output
    text = (tmp_path / "out" / "profile.md").read_text()
    assert TABLE in text
    assert "Profiled on Some GPU" in text and MADE_UP in text
    assert [call[-1] for call in calls()] == ["forward", "grad_weight"]
    raw = (tmp_path / "out" / "profile.csv").read_text()
    assert raw.count(ABOUT) == 2
    assert raw.startswith(f"# {LINEAR.name}, fused, forward\n==PROF== ")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"profile.md", "profile.csv"}


def test_ncu_is_called_for_one_call_of_the_pass(csv, fake_ncu):
    calls = fake_ncu()
    assert _profile(csv, "--count", 1)[0] == 0
    (call,) = calls()
    options, command = call[: call.index(sys.executable)], call[call.index(sys.executable) :]
    for pair in (
        ["--clock-control", "none"],
        ["--profile-from-start", "off"],
        ["--page", "raw"],
        ["--print-units", "base"],
        ["--section", "WarpStateStats"],
        ["--section", "LaunchStats"],
    ):
        assert any(options[i : i + 2] == pair for i in range(len(options))), pair
    assert "--csv" in options
    assert {SM, TENSOR, DRAM, L2} < set(options[options.index("--metrics") + 1].split(","))
    assert command[1:3] == ["-m", "bench.profiled"]
    *columns, provider, pass_name = command[3:]
    assert (case_of(*columns), provider, pass_name) == (LINEAR, "fused", "forward")


@pytest.mark.slow
def test_a_failure_does_not_stop_the_others(tmp_path, csv, fake_ncu, monkeypatch):
    monkeypatch.setattr(profiling, "_LONGEST", 4.0)
    calls = fake_ncu(forward="forbidden", grad_weight="hang", adamw="crash")
    begin = time.monotonic()
    code, output = _profile(csv, "--count", 4)
    assert time.monotonic() - begin < 30  # the fake hangs for a minute
    assert code == 1
    assert [call[-1] for call in calls()] == ["forward", "grad_weight", "forward", "adamw"]
    text = (csv.parent / "profile.md").read_text()
    forbidden = "no kernel was profiled: ==ERROR== ERR_NVGPUCTRPERM - no permission."
    assert text.count(f"Not profiled: {forbidden}") == 2
    assert "Not profiled: not finished after 4 s" in text
    assert "Not profiled: exit code 1: RuntimeError: no such case." in text
    for case, pass_name in ((LINEAR, "grad_weight"), (LIST, "adamw"), (WEIGHT, "forward")):
        assert re.search(rf"Not profiled: .*{case.name}, \w+, {pass_name}: ", output)


def test_what_follows_a_failure_is_profiled(csv, fake_ncu):
    fake_ncu(forward="crash")
    code, _ = _profile(csv, "--count", 4)
    assert code == 1
    text = (csv.parent / "profile.md").read_text()
    assert text.count("Not profiled") == 2
    assert text.count("Bound by memory bandwidth") == 2
    assert (csv.parent / "profile.csv").read_text().count(ABOUT) == 2


def test_nothing_is_begun_when_the_time_is_up(csv, fake_ncu):
    fake_ncu()
    code, output = _profile(csv, "--count", 1, "--minutes", 0)
    assert code == 1 and "no time left" in output
    assert "Not profiled: no time left." in (csv.parent / "profile.md").read_text()


def test_one_case_can_be_asked_for_also_without_a_floor(csv, fake_ncu):
    calls = fake_ncu()
    given = ["--case", TF32.name, "--provider", "fused", "--pass", "forward"]
    code, output = _profile(csv, *given)
    assert code == 0, output
    assert calls()[0][-3:] == ["0.1", "fused", "forward"]
    text = (csv.parent / "profile.md").read_text()
    assert TF32.name in text and "floor |" not in text


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        (["--case", LINEAR.name], "Accepted: all three or none."),
        (
            ["--case", "x", "--provider", "fused", "--pass", "forward"],
            f"{LINEAR.name}, {WEIGHT.name}",
        ),
        (["--case", MODEL.name, "--provider", "dense", "--pass", "step"], "is unknown"),
        (["--case", LINEAR.name, "--provider", "mixed", "--pass", "forward"], "dense, fused."),
        (["--case", LINEAR.name, "--provider", "fused", "--pass", "step"], "forward, grad_weight."),
        (["--gpu", "H100"], f"Accepted: part of the name of one of {MADE_UP}"),
    ],
)
def test_what_is_not_in_the_file_cannot_be_profiled(csv, fake_ncu, given, answer):
    fake_ncu()
    code, output = _profile(csv, *given)
    assert code == 2 and answer in output
    assert not (csv.parent / "profile.md").exists()


def test_a_file_without_our_kernels_is_refused(tmp_path, fake_ncu):
    fake_ncu()
    path = write_rows(tmp_path / "a.csv", [*ceilings(), *times(LINEAR, "forward", dense=1e-3)])
    code, output = _profile(path)
    assert code == 2 and "CSV has no time of a kernel of ours" in output
    figures = times(WEIGHT, "forward", auto=1e-3)
    path = write_rows(tmp_path / "cpu.csv", [*ceilings(), *figures], environment("cpu"))
    code, output = _profile(path)
    assert code == 2 and "rows of a CPU only" in output


def test_without_ncu_or_a_gpu_it_says_so(csv, tmp_path, fake_ncu, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, output = _profile(csv)
    assert code == 2 and "ncu (Nsight Compute) is not on the PATH" in output
    fake_ncu()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, output = _profile(csv)
    assert code == 2 and "no CUDA device" in output


# -- what ncu prints, and what follows from it --------------------------------------------------


def test_the_raw_page_is_read_whatever_is_missing():
    theirs, ours = launches_in(_page())
    assert (theirs.name, ours.name) == (KERNELS[1], KERNELS[0])
    assert (theirs.seconds, ours.seconds) == (pytest.approx(3e-6), pytest.approx(205e-6))
    assert ours.figures[DRAM] == 87.25
    assert TENSOR not in ours.figures  # n/a
    assert ours.stalls == [("long_scoreboard", 0.6), ("gmma", 0.3)]
    alone = {DRAM: METRICS[DRAM]}
    assert [launch.seconds for launch in launches_in(_page(metrics=alone))] == [None, None]
    assert launches_in("") == launches_in("==ERROR== no\n") == []


def test_ours_is_judged_the_longest_of_several():
    def launch(name, seconds):
        return Launch(name, {}, seconds)

    vendor = launch("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", 9e-3)
    fill = launch("void at::native::vectorized_elementwise_kernel<4>(int)", 8e-3)
    product, finish = launch("product_kernel", 2e-3), launch("finish_kernel", 1e-3)
    assert judged([vendor, fill, product, finish]) is product
    assert judged([vendor, fill]) is vendor
    assert share_of_time(product, [vendor, fill, product, finish]) == pytest.approx(0.1)
    assert share_of_time(product, [product, launch("x", None)]) is None


def test_kernels_of_ours_are_all_those_in_the_sources():
    triton = "\n".join(
        path.read_text() for path in (ROOT / "dst_kernels/backends/triton").glob("*.py")
    )
    cuda = "\n".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu*"))
    names = re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", triton)
    names += re.findall(r"__global__[^;{]*?(\w+)\(const __grid_constant__", cuda)
    names += re.findall(r"__global__ void __launch_bounds__\(\w+\)\s+(\w+)\((?!const __grid)", cuda)
    assert sorted(set(names)) == sorted(OURS)


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        ({DRAM: 80, TENSOR: 95, L2: 99, SM: 99}, "memory bandwidth: DRAM runs at 80 %"),
        ({DRAM: 79.9, TENSOR: 80, SM: 85}, "arithmetic: the tensor pipe runs at 80 %"),
        ({DRAM: 10, L2: 81, SM: 85}, "bandwidth of L2: it runs at 81 %"),
        ({DRAM: 10, TENSOR: 79, SM: 85}, "busiest part of a multiprocessor runs at 85 %"),
        ({DRAM: 10, WAVES: 0.4, STALL.format("wait"): 1}, "small grid: 40%"),
        (
            {DRAM: 79, WAVES: 0.5, STALL.format("wait"): 1, STALL.format("gmma"): 3},
            "75% of a warp's time goes into waiting for wgmma",
        ),
        ({STALL.format("new"): 1}, "what ncu calls by that name (new)"),
        ({STALL.format("selected"): 1, STALL.format("not_selected"): 5}, "Not known"),
        ({}, "Not known"),
    ],
)
def test_what_bounds_a_kernel(figures, sentence):
    assert sentence in verdict(Launch("product_kernel", figures, 1e-3))


# -- what ncu runs ------------------------------------------------------------------------------


SMALL = (
    (Case("linear", 8, 16, 24, AMP), "packed", "grad_weight"),
    (Case("linear", 8, 16, 24, AMP), "packed", "forward"),
    (Case("masked_weight", 0, 16, 24, AMP), "auto", "backward"),
    (ListCase("small", AMP), "auto", "adamw"),
)


@pytest.mark.parametrize("target", SMALL, ids=lambda target: "-".join(target[1:]))
def test_one_call_is_made_under_the_profiler(target, monkeypatch):
    seen, calls = [], []

    @contextlib.contextmanager
    def window():
        before = len(calls)
        yield
        seen.append(len(calls) - before)

    original = profiled._call

    def counting(call, *more):
        original(lambda: (calls.append(1), call()), *more)

    monkeypatch.setattr(profiled, "_call", counting)
    call_once(*target, torch.device("cpu"), window)
    assert seen == [1]
    assert len(calls) > 1  # after some to warm up


@pytest.mark.parametrize("case", [LINEAR, WEIGHT, LIST, TF32])
def test_the_command_line_names_the_case(case):
    *columns, provider, pass_name = arguments(case, "fused", "forward")
    assert (case_of(*columns), provider, pass_name) == (case, "fused", "forward")


def test_what_goes_wrong_is_the_last_line(monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory\nand much advice")

    monkeypatch.setattr(profiled, "call_once", fail)
    monkeypatch.setattr(sys, "argv", ["profiled", *arguments(LINEAR, "fused", "forward")])
    with pytest.raises(SystemExit) as exit:
        profiled.main()
    assert exit.value.code == "RuntimeError: out of memory"

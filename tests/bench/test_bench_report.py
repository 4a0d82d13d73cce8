"""Tables, plots and the README's table from made-up figures."""

from __future__ import annotations

import pytest
from made_up_rows import ceilings, environment, times, write_rows
from typer.testing import CliRunner

from bench.cases import Case, ListCase, ModelCase
from bench.commands import app
from bench.measurements import by_gpu
from bench.readme import BEGIN, END
from bench.report import markdown, readme_table
from bench.results import read_results
from bench.tables import duration

SMALL, LARGE = (Case("linear", M, 1024, 2048, "bf16-autocast") for M in (16, 1024))
WEIGHT = Case("masked_weight", 0, 1024, 1024, "bf16-autocast")

REPORT = """\
# Benchmark results

![made-up-device-roofline](made-up-device-roofline.png)

## made-up device

made-up device, torch 2.99, triton 3.99, commit abc, 2000-01-01.

Ratios of times in one run: of a CUDA graph's where both sides were captured (short work), else of \
enqueued calls with cold L2. Below 1 is faster.

Ceilings, measured: copy 1000 GB/s, matrix product 100 TFLOP/s.

### Linear, forward and backward

| M | N | K | dtype | dense | auto ÷ dense | dst_eager ÷ dense | dst_compiled ÷ dense \
| auto ÷ best compiled DST |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 16 | 1024 | 2048 | bf16-autocast | 10 µs | 0.50 | 4.00 | - | - |
| 1024 | 1024 | 2048 | bf16-autocast | 1 ms | 2.00 | 4.00 | 1.00 | 2.00 |
| geometric mean |  |  |  |  | 1.00 | 4.00 | 1.00 (1 of 2) | 2.00 (1 of 2) |

### Masked weight, forward (pack)

| M | N | K | dtype | dense | auto ÷ dense | auto, of copy bandwidth |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| - | 1024 | 1024 | bf16-autocast | 5 µs | 2.00 | 0.80 |
| geometric mean |  |  |  |  | 2.00 | 0.80 |

### Our kernels, furthest from their ceiling first

Floor: the longer of a pass's products at the speed of the matrix product above and its least \
bytes at the copy's bandwidth. Times are those of CUDA graphs where captured, whose warm L2 can be \
faster than a copy. Products in float32 and TF32, depthwise convolutions and floors below 2 µs are \
left out.

| case | provider, pass | time | floor | time ÷ floor | floor set by |
| ---: | ---: | ---: | ---: | ---: | ---: |
| `masked_weight-n1024-k1024-bf16-autocast-r0.1` | auto, forward | 10 µs | 6.29 µs | 1.59 | memory |

### Without figures

- `linear-m16-n1024-k2048-bf16-autocast-r0.1`, fused: output: error 1
- `linear-m16-n1024-k2048-bf16-autocast-r0.1`, dst_compiled, backward: RuntimeError: no
"""

README = """\
Forward and backward of one linear layer (bf16 autocast), ours over the others in the same run; \
memory: peak, over dense.
Measured on made-up device, torch 2.99, triton 3.99, commit abc, 2000-01-01.

| tokens | weight | dense | ÷ dense | ÷ compiled DST | ÷ eager DST | memory |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 16 | 1024 x 2048 | 10 µs | 0.50 | - | 0.12 | 1.00 |
| 1024 | 1024 x 2048 | 1 ms | 2.00 | 2.00 | 0.50 | - |
| geometric mean |  |  | 1.00 | 2.00 (1 of 2) | 0.25 | 1.00 (1 of 2) |"""


@pytest.fixture(autouse=True)
def repository(tmp_path, monkeypatch):
    """Figures that nobody measured must not reach the repository's README."""
    monkeypatch.setattr("bench.commands.ROOT", tmp_path)


@pytest.fixture
def csv(tmp_path):
    return write_rows(tmp_path / "in" / "results.csv", _figures())


def _figures():
    both = "forward_backward"
    return [
        *ceilings(),
        *times(SMALL, both, dense=1e-5, auto=5e-6, dst_eager=4e-5),
        *times(LARGE, both, dense=1e-3, auto=2e-3, dst_compiled=1e-3, dst_eager=4e-3),
        *times(WEIGHT, "forward", dense=5e-6, auto=1e-5),
        (WEIGHT, "auto", "forward", "bandwidth", 8e11),
        (SMALL, "auto", both, "memory", 7),
        (SMALL, "dense", both, "memory", 7),
        (SMALL, "fused", "", "error", "output: error 1"),
        (SMALL, "dst_compiled", "backward", "skipped", "RuntimeError: no"),
    ]


def test_the_report(csv):
    found = by_gpu(read_results(csv)).values()
    assert markdown(found, ["made-up-device-roofline.png"]) == REPORT


def test_the_readme_table(csv):
    assert readme_table(by_gpu(read_results(csv)).values()) == README


def test_durations_have_a_unit_that_suits():
    assert [duration(s) for s in (2.5, 0.0123, 0.001, 0.000999, 1.234e-7)] == [
        "2.5 s",
        "12.3 ms",
        "1 ms",
        "999 µs",
        "0.123 µs",
    ]


def _report(*arguments):
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_command_writes_tables_plots_and_readme(tmp_path, csv):
    readme, out = tmp_path / "README.md", tmp_path / "out"
    readme.write_text(f"# Name\n\n{BEGIN}\nold\n{END}\n\nEnd.\n")
    code, output = _report(csv, "--readme", readme, "--out", out)
    assert code == 0, output
    assert readme.read_text() == f"# Name\n\n{BEGIN}\n{README}\n{END}\n\nEnd.\n"
    plots = {f"made-up-device-{kind}.png" for kind in ("roofline", "ratio-to-dense")}
    plots.add("made-up-device-ratio-to-compiled.png")
    assert {path.name for path in out.iterdir()} == {"report.md", *plots}
    for name in plots:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in (out / "report.md").read_text()


@pytest.mark.parametrize("text", [None, "no markers", f"{END} {BEGIN}", f"{BEGIN}{END}{BEGIN}"])
def test_a_readme_without_markers_is_left_alone(tmp_path, csv, text):
    readme = tmp_path / "README.md"
    if text is not None:
        readme.write_text(text)
    code, output = _report(csv, "--readme", readme, "--out", tmp_path)
    assert code == 2
    assert "Accepted: a file with one <!-- bench:begin -->" in output
    assert text is None or readme.read_text() == text


@pytest.mark.parametrize(("gpu", "refreshed"), [("cpu", False), ("made-up device", True)])
def test_the_repositorys_readme_shows_gpus_only(tmp_path, gpu, refreshed):
    path = write_rows(tmp_path / "results.csv", _figures(), environment(gpu))
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\nold\n{END}")
    assert _report(path)[0] == 0
    assert ("old" not in readme.read_text()) == refreshed
    readme.write_text("no markers")
    assert _report(path)[0] == 0
    assert readme.read_text() == "no markers"


def test_several_files_and_devices(tmp_path, csv):
    other = write_rows(
        tmp_path / "other.csv",
        times(SMALL, "forward", dense=1e-6, auto=1e-6),
        environment("Other"),
    )
    code, output = _report(csv, other, "--out", tmp_path / "out")
    assert code == 0, output
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.index("## made-up device") < text.index("## Other")
    code, output = _report(tmp_path / "none.csv")
    assert code == 2 and "cannot be read" in output


VGG = ModelCase("vgg-16", 128, "bf16-autocast")
GPT = ModelCase("gpt", 8, "bf16-autocast")
RESNET = ListCase("resnet-50", "bf16-autocast")

MODELS = """\
### Whole training step, eager (wall clock)

| model | batch | dtype | dense | deferred ÷ dense | grouped ÷ dense | masked ÷ dense \
| dst_eager ÷ dense | dst_compiled ÷ dense | deferred_compiled ÷ dense | dense_compiled ÷ dense \
| masked_compiled ÷ dense |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| vgg-16 | 128 | bf16-autocast | 4 ms | 0.50 | - | - | 2.00 | - | - | - | - |
| gpt | 8 | bf16-autocast | 50 ms | 2.00 | - | - | - | 0.80 | - | 0.40 | 0.60 |
| geometric mean |  |  |  | 1.00 | - | - | 2.00 (1 of 2) | 0.80 (1 of 2) | - | 0.40 (1 of 2) \
| 0.60 (1 of 2) |

### Whole training step, CUDA graph

| model | batch | dtype | dense | deferred ÷ dense | grouped ÷ dense | masked ÷ dense \
| dst_eager ÷ dense | dst_compiled ÷ dense | deferred_compiled ÷ dense | dense_compiled ÷ dense \
| masked_compiled ÷ dense |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| vgg-16 | 128 | bf16-autocast | 2 ms | - | 1.00 | - | - | - | - | - | - |
| geometric mean |  |  |  | - | 1.00 | - | - | - | - | - | - |

### Whole training step, images or tokens per second

| model | batch | dtype | dense | deferred | grouped | masked | dst_eager | dst_compiled \
| deferred_compiled | dense_compiled | masked_compiled |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| vgg-16 | 128 | bf16-autocast | 64000 | - | - | - | 16000 | - | - | - | - |

### Whole training step, launches

| model | batch | dtype | dense | deferred | grouped | masked | dst_eager | dst_compiled \
| deferred_compiled | dense_compiled | masked_compiled |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| vgg-16 | 128 | bf16-autocast | 100 | 97 | - | - | - | - | - | - | - |

### Whole training step, peak memory

| model | batch | dtype | dense | deferred ÷ dense | grouped ÷ dense | masked ÷ dense \
| dst_eager ÷ dense | dst_compiled ÷ dense | deferred_compiled ÷ dense | dense_compiled ÷ dense \
| masked_compiled ÷ dense |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| vgg-16 | 128 | bf16-autocast | 2 GiB | 1.01 | - | - | - | - | - | - | - |
| geometric mean |  |  |  | 1.01 | - | - | - | - | - | - | - |

### Pack all weights

| weights | dtype | ours | ÷ dense | of copy bandwidth |
| ---: | ---: | ---: | ---: | ---: |
| resnet-50 | bf16-autocast | 10 µs | 0.50 | 0.80 |

### Our kernels, furthest from their ceiling first

Floor: the longer of a pass's products at the speed of the matrix product above and its least \
bytes at the copy's bandwidth. Times are those of CUDA graphs where captured, whose warm L2 can be \
faster than a copy. Products in float32 and TF32, depthwise convolutions and floors below 2 µs are \
left out.

| case | provider, pass | time | floor | time ÷ floor | floor set by |
| ---: | ---: | ---: | ---: | ---: | ---: |
| `weights-resnet-50-bf16-autocast-r0.1` | auto, pack | 10 µs | 153 µs | 0.07 | memory |
"""

README_MODELS = """\
Whole training steps (forward, loss, regulariser, backward, optimizer), ours over others in the \
same run, and how many more launches the deferred step has than dense.
Measured on made-up device, torch 2.99, triton 3.99, commit abc, 2000-01-01.

| model | batch | dense | deferred, eager ÷ dense | deferred, graph ÷ dense \
| grouped, eager ÷ dense | grouped, graph ÷ dense | masked ÷ dense, compiled \
| deferred ÷ eager DST | masked ÷ DST, compiled | memory, deferred ÷ dense | more launches |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| vgg-16 | 128 | 4 ms | 0.50 | - | - | 1.00 | - | 0.25 | - | 1.01 | -3 |
| gpt | 8 | 50 ms | 2.00 | - | - | - | 1.50 | - | 0.75 | - | - |"""


@pytest.fixture
def models(tmp_path):
    figures = [
        *ceilings(),
        *times(VGG, "step", dense=4e-3, deferred=2e-3, dst_eager=8e-3),
        (VGG, "dense", "step", "graph_time", 2e-3),
        (VGG, "grouped", "step", "graph_time", 2e-3),
        (VGG, "dense", "step", "throughput", 32000),
        (VGG, "dense", "step", "graph_throughput", 64000),
        (VGG, "dst_eager", "step", "throughput", 16000),
        (VGG, "dense", "step", "memory", 2 * 2**30),
        (VGG, "deferred", "step", "memory", 2.02 * 2**30),
        (VGG, "dense", "step", "launches", 100),
        (VGG, "deferred", "step", "launches", 97),
        *times(GPT, "step", dense=5e-2, deferred=1e-1),
        *times(GPT, "step", dense_compiled=2e-2, masked_compiled=3e-2, dst_compiled=4e-2),
        *times(RESNET, "pack", dense=2e-5, auto=1e-5),
        (RESNET, "auto", "pack", "bandwidth", 8e11),
    ]
    path = write_rows(tmp_path / "results.csv", figures)
    return by_gpu(read_results(path)).values()


def test_the_report_of_whole_models(models):
    text = markdown(models)
    assert text[text.index("###") :] == MODELS


def test_the_readme_table_of_whole_models(models):
    assert readme_table(models) == README_MODELS

"""report.md, its plots and the README's table, from made-up figures."""

import pytest
from made_up_rows import ceilings, environment, measured, times, write_rows

from bench.cases import LinearCase, ModelCase, WeightsCase
from bench.report.tables import BEGIN, END, main_table, refresh_readme, write_report
from bench.results import UsageError, read_results

SMALL, LARGE = (LinearCase(M, 1024, 2048) for M in (16, 1024))
VGG, LIST, BOTH = ModelCase("vgg-16", 128), WeightsCase("resnet-50"), "forward_backward"
FIGURES = [
    *ceilings(),
    *times(SMALL, BOTH, dense=1e-5, auto=5e-6, dst_eager=4e-5),
    *times(LARGE, BOTH, dense=1e-3, auto=2e-3, dst_compiled=1e-3, dst_eager=4e-3, brand_new=1e-3),
    (SMALL, "fused", "", "error", "output: error 1"),
    *((case, "dst_compiled", "backward", "skipped", "Error: no") for case in (SMALL, LARGE)),
    *times(LIST, "pack", dense=2e-5, auto=1e-5),
    *times(LIST, "pack", "bandwidth", auto=8e11),
    *times(VGG, "step", dense=4e-3, deferred=2e-3, dst_eager=8e-3),
    *times(VGG, "step", "graph_time", dense=2e-3, grouped=2e-3, deferred=1.9e-3),
    *times(VGG, "step", "memory", dense=2 * 2**30, deferred=2.02 * 2**30),
]
WHERE = "made-up device, torch 2.99, triton 3.99, commit abc, 2000-01-01."
LINES = """\
| 16 | 1024 | 2048 | bf16-autocast | 10 µs | 0.50 | 4.00 | - |
| 1024 | 1024 | 2048 | bf16-autocast | 1 ms | 2.00 | 4.00 | 1.00 |
| geometric mean |  |  |  |  | 1.00 | 4.00 | 1.00 (1 of 2) |"""


def test_the_report_has_every_contender_plot_and_reason(tmp_path):
    path = write_rows(tmp_path / "results.csv", FIGURES)
    write_rows(path, times(SMALL, "forward", dense=1e-6, auto=1e-6), environment("Other"))
    report, *plots = written = write_report(read_results(path), tmp_path / "out")
    assert sorted(written) == sorted((tmp_path / "out").iterdir()) and len(plots) == 2
    text = report.read_text()
    assert all(f"]({plot.name})" in text for plot in plots)
    parts = [
        f"## made-up device\n\n{WHERE}\n\nCeilings, measured: a copy 1000 GB/s, ",
        "### Whole training step, eager (wall clock)",
        "| vgg-16 | 128 | bf16-autocast | 2 ms | 0.95 | 1.00 |\n",
        "| vgg-16 | 128 | bf16-autocast | 2048 MiB | 1.01 |",
        "| auto ÷ dense | dst_eager ÷ dense | dst_compiled ÷ dense | brand_new ÷ dense |",
        LINES.splitlines()[1] + " 1.00 |\n",
        "| resnet-50 | bf16-autocast | 20 µs | 0.50 | 0.80 |",
        f"- **fused**: output: error 1 (`{SMALL.name}`)",
        f"- **dst_compiled**: Error: no (`{SMALL.name}` backward, `{LARGE.name}` backward)",
        "## Other\n\nOther, torch",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_the_main_table_goes_between_the_markers_of_a_readme(tmp_path):
    table = main_table(measured(tmp_path / "results.csv", FIGURES))
    steps = "| vgg-16 | 128 | bf16-autocast | 2 ms | 0.95 | 1.00 | 4.00 |"
    assert WHERE in table and table.index(LINES) < table.index(steps)
    readme = tmp_path / "README.md"
    readme.write_text(f"# Name\n\n{BEGIN}\nold\n{END}\n\nEnd.\n")
    refresh_readme(readme, table)
    assert readme.read_text() == f"# Name\n\n{BEGIN}\n{table}\n{END}\n\nEnd.\n"
    for text in ("no markers", f"{END} {BEGIN}", f"{BEGIN}{END}{BEGIN}"):
        readme.write_text(text)
        with pytest.raises(UsageError, match="Accepted: a file with one <!-- bench:begin -->"):
            refresh_readme(readme, "table")
        assert readme.read_text() == text

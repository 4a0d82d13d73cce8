"""Cases and suites; results.csv with its columns and cut-off runs; figures read back from it."""

import dataclasses
import itertools

import pytest
from made_up_rows import CPU, MADE_UP, environment, times, write_rows

from bench.cases import ConvCase, LinearCase, ModelCase, WeightsCase, case_named
from bench.contenders import problem_of
from bench.measurements import Measurements, by_device, duration, only_gpu
from bench.results import Environment, UsageError, first_line, read_results
from bench.suites import SUITES

CASE, VGG = LinearCase(16, 32, 64, dtype="bf16"), ModelCase("vgg-16", 128)
AUTO = times(CASE, "forward", auto=1.0)
HEADER = "suite,case,provider,pass,metric,value,unit,M,N,K,dtype,remaining_ratio,"
HEADER += "gpu,torch,triton,commit,date"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.csv"


def test_every_case_is_there_once_and_its_name_reads_back():
    for suite, device in itertools.product(SUITES.values(), ("cuda", "cpu")):
        cases = suite.cases_on(device)
        assert cases and [case_named(case.name) for case in cases] == list(cases)
        assert len(set(cases)) == len(cases)


def test_what_is_no_case_is_refused():
    for kind, sizes, options, message in (
        (LinearCase, (0, 2, 3), {}, "M is 0. Accepted: a positive number"),
        (LinearCase, (1, 2, 3), {"dtype": "int8"}, "dtype 'int8' is unknown. Accepted: bf16-auto"),
        (ModelCase, ("gpt", 8), {"remaining_ratio": 0.01}, "remaining_ratio is 0.01. Accepted: "),
        (ConvCase, (1, 8, 6, 4, 3, 1, 4), {}, "groups is 4. Accepted: a divisor of C and N"),
        (WeightsCase, ("0x8",), {}, "weights is '0x8'. Accepted: resnet-50, small, NxK"),
        (case_named, ("linear-m1-n2-bf16-r0.1",), {}, "no case is named 'linear-m1-n2-bf16-r0.1'"),
        (problem_of, (ModelCase("vgg-11", 8), CPU), {}, "model 'vgg-11' is unknown. Did you mean"),
    ):
        with pytest.raises(UsageError, match=message):
            kind(*sizes, **options)


def test_columns_are_those_promised_and_whole_numbers_exact(path):
    write_rows(path, [*AUTO, (VGG, "auto", "step", "memory", 117_497_857, "B")])
    first, second = "auto,forward,time,1,,16,32,64,bf16", "auto,step,memory,117497857,B,128,,,"
    about = "made-up device,2.99,3.99,abc,2000-01-01T00:00:00Z"
    assert path.read_text().splitlines() == [
        *(HEADER, f"linear,linear-m16-n32-k64-bf16-r0.1,{first},0.1,{about}"),
        f"linear,model-vgg-16-b128-bf16-autocast-r0.1,{second}bf16-autocast,0.1,{about}",
    ]


def test_half_a_row_is_neither_read_nor_kept(path):
    for cut in (1, 30):
        write_rows(write_rows(path, AUTO), times(CASE, "forward", auto=2.0))
        path.write_text(path.read_text()[:-cut])
        assert [row.figure for row in read_results(path)] == [1]
        assert [row.figure for row in read_results(write_rows(path, AUTO))] == [1, 1]
        assert path.read_text().count(HEADER) == 1
        path.unlink()


def test_what_is_no_file_of_results_is_left_alone_and_named(path):
    def refused(message, use=read_results):
        with pytest.raises(UsageError, match=message):
            use(path)

    refused(r"results\.csv cannot be read")
    write_rows(path, [])
    refused("no figures in")
    for text in ("a,b,c\n1,2,3\n", "notes", HEADER + ",more\n"):
        path.write_text(text)
        for use in (read_results, lambda path: write_rows(path, AUTO)):
            refused(r"has the header .* Accepted: 'suite,case,provider", use)
        assert path.read_text() == text
    path.unlink()
    whole = write_rows(path, AUTO).read_text()
    wrong = whole.splitlines()[1].replace(",1,", ",fast,", 1)
    for row, message in ((wrong, "3: .*'fast'"), ("too,short", "3: 2 values for 17 columns")):
        path.write_text(f"{whole}{row}\n")
        refused(f"line {message}")


def test_a_reason_is_one_line_and_a_time_short():
    assert [*map(duration, (2.5, 0.001, 1.2e-7))] == ["2.5 s", "1 ms", "0.12 µs"]
    errors = RuntimeError("\n  a, b\nsecond"), KeyError(), TypeError("It:\nno")
    assert [*map(first_line, errors)] == ["RuntimeError: a, b", "KeyError", "TypeError: It: no"]
    assert len(first_line(RuntimeError("x" * 10_000))) == 300


def test_devices_and_unknown_code_are_not_mixed(path):
    here = Environment.now(CPU, "abc")
    rows = read_results(write_rows(path, AUTO, here))
    assert here.gpu.startswith("cpu: ") and here.made(rows[0]) and not environment().made(rows[0])
    for commit in ("abc-dirty", "unknown"):
        assert not dataclasses.replace(here, commit=commit).made(rows[0]._replace(commit=commit))
    assert by_device(rows)[here.gpu].on_cpu
    with pytest.raises(UsageError, match="no GPU: all rows are of a CPU"):
        only_gpu(rows)
    rows += [rows[0]._replace(gpu=gpu) for gpu in ("Big 1", "Small 2")]
    assert only_gpu(rows, "big").gpu == "Big 1"
    with pytest.raises(UsageError, match="part of the name of one of Big 1, Small 2"):
        only_gpu(rows)


def test_figures_of_one_run_are_compared_the_newest(path):
    where = CASE.name, "forward"
    for date, figures in enumerate(({"auto": 1, "dense": 2}, {"auto": 3, "dense": 4}, {"auto": 9})):
        write_rows(path, times(CASE, "forward", **figures), environment(date=str(date)))
    found = Measurements(MADE_UP, read_results(path))
    others = "dense", ("dst_compiled", "dense"), "dst_compiled"
    assert [found.time_ratio(*where, "auto", one) for one in others] == [0.75, 0.75, None]
    assert found.difference(*where, "time", "auto", "dense") == -1
    assert found.newest(CASE.name, "auto", "forward", "time") == 9
    fastest = [found.fastest(*where, names) for names in (["auto", "dense"], ["dst_compiled"])]
    assert fastest == ["dense", None]
    # Times under a CUDA graph count where everybody has them.
    figures = times(CASE, "forward", auto=4.0, dense=2.0, gemm=1.0)
    figures += times(CASE, "forward", "graph_time", auto=1.0, dense=1.0)
    found = Measurements(MADE_UP, read_results(write_rows(path, figures)))
    assert [found.time_ratio(*where, "auto", other) for other in ("dense", "gemm")] == [1.0, 4.0]
    assert found.time_ratio(*where, ("auto", "gemm"), "dense") == 0.5
    assert found.ratio(*where, ("time", "graph_time"), ("auto", "dense"), "gemm") == 1.0
    assert found.newest(CASE.name, "auto", "forward", ("time", "graph_time")) == 1.0


def test_figures_of_a_contender_found_wrong_later_do_not_count(path):
    wrong = [(CASE, "auto", "", "error", "output: error 1")]
    for date, figures, newest in (("1", AUTO, 1.0), ("2", wrong, None), ("3", AUTO, 1.0)):
        write_rows(path, figures, environment(date=date))
        found = Measurements(MADE_UP, read_results(path))
        assert found.newest(CASE.name, "auto", "forward", "time") == newest
    assert found.reasons == [(CASE.name, "auto", "", "output: error 1")]

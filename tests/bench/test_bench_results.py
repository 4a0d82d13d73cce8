"""results.csv: its columns, appending, cut-off runs, files that are something else."""

from __future__ import annotations

import pytest
from made_up_rows import environment, write_rows

from bench.cases import Case
from bench.errors import UsageError, first_line
from bench.results import ResultsFile, Run, read_all, read_results

CASE = Case("linear", 16, 32, 64, "bf16")
HEADER = (
    "suite,case,provider,pass,metric,value,unit,M,N,K,dtype,remaining_ratio,"
    "gpu,torch,triton,commit,date"
)


def test_columns_are_those_promised(tmp_path):
    path = write_rows(tmp_path / "deep" / "results.csv", [(CASE, "auto", "forward", "time", 0.25)])
    assert path.read_text().splitlines() == [
        HEADER,
        "linear,linear-m16-n32-k64-bf16-r0.1,auto,forward,time,0.25,,16,32,64,bf16,0.1,"
        "made-up device,2.99,3.99,abc,2000-01-01T00:00:00Z",
    ]


def test_whole_numbers_are_exact(tmp_path):
    figures = [(CASE, "auto", "forward", "saved", value) for value in (117_497_857, 117_497_857.0)]
    rows = read_results(write_rows(tmp_path / "results.csv", figures))
    assert [row.value for row in rows] == ["117497857", "1.17498e+08"]


def test_a_row_is_in_the_file_as_soon_as_it_is_added(tmp_path):
    with ResultsFile(tmp_path / "results.csv") as file:
        Run(file, environment()).add("cpu", CASE, "auto", "forward", "time", 1.0, "s")
        (row,) = read_results(file.path)
        assert (row.provider, row.pass_, row.figure, row.unit) == ("auto", "forward", 1.0, "s")


def test_a_second_run_appends(tmp_path):
    path = tmp_path / "results.csv"
    for value in (1.0, 2.0):
        write_rows(path, [(CASE, "auto", "forward", "time", value)])
    assert [row.figure for row in read_results(path)] == [1.0, 2.0]
    assert path.read_text().count(HEADER) == 1


@pytest.mark.parametrize("cut", [1, 30])
def test_half_a_row_is_neither_read_nor_kept(tmp_path, cut):
    path = write_rows(
        tmp_path / "results.csv", [(CASE, "auto", "forward", "time", value) for value in (1.0, 2.0)]
    )
    path.write_text(path.read_text()[:-cut])
    assert [row.figure for row in read_results(path)] == [1.0]
    write_rows(path, [(CASE, "auto", "forward", "time", 3.0)])
    assert [row.figure for row in read_results(path)] == [1.0, 3.0]


@pytest.mark.parametrize("text", ["a,b,c\n1,2,3\n", "notes", HEADER + ",more\n"])
def test_a_file_with_another_header_is_left_alone(tmp_path, text):
    path = tmp_path / "results.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"results\.csv has the header"), ResultsFile(path):
        pass
    with pytest.raises(UsageError, match=r"Accepted: 'suite,case,provider"):
        read_results(path)
    assert path.read_text() == text


def test_rows_that_cannot_be_read_name_their_line(tmp_path):
    path = write_rows(tmp_path / "results.csv", [(CASE, "auto", "forward", "time", 1.0)])
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[1].replace(",1,", ",fast,", 1) + "\n")
    with pytest.raises(UsageError, match=r"line 3: .*'fast'"):
        read_results(path)
    path.write_text(whole + "too,short\n")
    with pytest.raises(UsageError, match="line 3: 2 values for 17 columns"):
        read_results(path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(UsageError, match=r"missing\.csv cannot be read"):
        read_results(tmp_path / "missing.csv")
    with pytest.raises(UsageError, match="no figures in"):
        read_all([write_rows(tmp_path / "results.csv", [])])


def test_a_reason_is_one_line():
    assert first_line(RuntimeError("\n  first, with comma\nsecond")) == (
        "RuntimeError: first, with comma"
    )
    assert first_line(KeyError()) == "KeyError"
    assert first_line(RuntimeError("backend raised:\nValueError: no")) == (
        "RuntimeError: backend raised: ValueError: no"
    )
    assert len(first_line(RuntimeError("x" * 10_000))) == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gemm", 1, 1, 1, "bf16"), "op 'gemm' is unknown. Accepted: linear, masked_weight"),
        (("linear", 1, 1, 1, "int8"), "dtype 'int8' is unknown"),
        (("linear", 0, 1, 1, "bf16"), "M, N, K are 0, 1, 1"),
        (("masked_weight", 5, 1, 1, "bf16"), "M = 0 exactly where op is 'masked_weight'"),
        (("linear", 1, 1, 1, "bf16", 0.01), r"remaining_ratio is 0\.01. Accepted: above 0\.01"),
        (("linear", 1, 1, 1, "bf16", 1.5), r"remaining_ratio is 1\.5"),
    ],
)
def test_cases_that_make_no_sense(arguments, message):
    with pytest.raises(UsageError, match=message):
        Case(*arguments)

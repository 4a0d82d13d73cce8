"""Floors and the ranking of our kernels, from made-up figures."""

from __future__ import annotations

import pytest
from made_up_rows import ceilings, environment, times, write_rows

from bench.cases import Case, ConvCase, ListCase
from bench.floors import ARITHMETIC, MEMORY, distance_of, distinct_first, ranking
from bench.measurements import by_gpu
from bench.results import read_results

AMP = "bf16-autocast"
FEW, MANY = (Case("linear", M, 4096, 4096, AMP) for M in (16, 8192))
TF32 = Case("linear", 4096, 4096, 4096, "tf32")
WEIGHT = Case("masked_weight", 0, 4096, 4096, AMP)
LIST = ListCase("resnet-50", AMP)
CONV = ConvCase(128, 56, 96, 96, 3, AMP)
DEPTHWISE = ConvCase(128, 56, 96, 96, 7, AMP, groups=96)
TINY = Case("masked_weight", 0, 512, 512, AMP)


@pytest.fixture
def measured(tmp_path):
    def of(figures, gpu="H100", *more):
        """`more`: (date, figures) of later runs."""
        path = tmp_path / "results.csv"
        write_rows(path, figures, environment(gpu))
        for date, later in more:
            write_rows(path, later, environment(gpu, date))
        (found,) = by_gpu(read_results(path)).values()
        return found

    return of


def test_a_floor_is_the_longer_of_computing_and_moving(measured):
    figures = times(FEW, "forward", fused=1e-3) + times(MANY, "forward", fused=1e-2)
    found = measured(ceilings(1e12, 1e14) + figures)
    few, many = (distance_of(found, case, "fused", "forward") for case in (FEW, MANY))
    # A float32 weight, bf16 activations; with 16 tokens arithmetic would take 5.4 µs.
    assert few.floor == pytest.approx((4096 * 4096 * 4 + 2 * 16 * 4096 * 2) / 1e12)
    assert (few.bound, few.ratio) == (MEMORY, pytest.approx(1e-3 / few.floor))
    assert many.floor == pytest.approx(2 * 8192 * 4096 * 4096 / 1e14)
    assert many.bound == ARITHMETIC


def test_weights_and_lists_are_bound_by_memory(measured):
    figures = times(WEIGHT, "backward", auto=1e-3) + times(LIST, "adamw", auto=1e-3)
    found = measured(ceilings(1e12)[:1] + figures)  # no product's speed is needed
    by_case = {distance.case: distance for distance in ranking(found)}
    assert by_case[WEIGHT].floor == pytest.approx(4096**2 * (2 + 8) / 1e12)
    assert by_case[LIST].floor == pytest.approx(LIST.numel * (2 + 8 + 16 + 2) / 1e12)
    assert {distance.bound for distance in by_case.values()} == {MEMORY}


def test_products_in_tf32_have_no_floor(measured):
    found = measured(ceilings() + times(TF32, "forward", fused=1e-3))
    assert distance_of(found, TF32, "fused", "forward") is None


def test_time_and_ceilings_are_of_one_run_the_newest_with_both(measured):
    first = ceilings(1e12, 1e30) + times(FEW, "forward", fused=4e-4)
    second = ceilings(2e12, 1e30) + times(FEW, "forward", fused=2e-4)
    third = times(FEW, "forward", fused=1e-4)
    runs = [("2001-01-01T00:00:00Z", second), ("2002-01-01T00:00:00Z", third)]
    distance = distance_of(measured(first, "H100", *runs), FEW, "fused", "forward")
    assert distance.seconds == 2e-4
    assert distance.floor == pytest.approx((4096 * 4096 * 4 + 2 * 16 * 4096 * 2) / 2e12)


def test_the_time_is_that_of_a_graph_where_there_is_one(measured):
    graph = (FEW, "fused", "forward", "graph_time", 3e-4)
    figures = [*times(FEW, "forward", fused=4e-4), graph]
    found = measured(ceilings() + figures)
    assert distance_of(found, FEW, "fused", "forward").seconds == 3e-4


def test_without_a_ceiling_there_is_no_floor(measured):
    found = measured(ceilings()[:1] + times(FEW, "forward", fused=1e-4))
    assert distance_of(found, FEW, "fused", "forward") is None


def test_the_ranking_is_of_our_kernels_alone_the_worst_first(measured):
    figures = [
        *times(FEW, "forward", fused=1e-3, dense=1.0, packed=1.0, auto=1.0),
        *times(FEW, "forward_backward", fused=1.0),
        *times(MANY, "grad_weight", fused=1e-2, gemm=1.0),
        *times(CONV, "grad_input", fused=3e-3),
        *times(DEPTHWISE, "grad_input", fused=1.0),
        *times(WEIGHT, "forward", auto=1e-4, dense=1.0),
        *times(TINY, "forward", auto=1e-3),
        *times(TF32, "forward", fused=1.0),
    ]
    worst = ranking(measured(ceilings() + figures))
    assert [(one.case, one.provider, one.pass_name) for one in worst] == [
        (FEW, "fused", "forward"),
        (CONV, "fused", "grad_input"),
        (MANY, "fused", "grad_weight"),
        (WEIGHT, "auto", "forward"),
    ]
    assert [one.ratio for one in worst] == sorted((one.ratio for one in worst), reverse=True)


def test_a_cpu_has_no_ranking(measured):
    assert ranking(measured(ceilings() + times(WEIGHT, "forward", auto=1e-3), "cpu")) == []


def test_each_kernel_comes_once_before_any_a_second_time(measured):
    figures = [
        *(
            row
            for M, seconds in ((16, 3e-2), (128, 2e-2), (1024, 1e-2))
            for row in times(Case("linear", M, 4096, 4096, AMP), "forward", fused=seconds)
        ),
        *times(FEW, "grad_weight", fused=1e-3),
        *times(WEIGHT, "forward", auto=1.1e-4),
    ]
    worst = distinct_first(ranking(measured(ceilings() + figures)))
    assert [(one.case.M, one.pass_name) for one in worst] == [
        (16, "forward"),
        (16, "grad_weight"),
        (0, "forward"),
        (128, "forward"),
        (1024, "forward"),
    ]

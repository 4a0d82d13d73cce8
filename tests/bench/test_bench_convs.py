"""Single convolutions: what a case is, nothing wrong gets a time, tables of them."""

from __future__ import annotations

import pytest
import torch
from made_up_rows import times, write_rows
from torch import nn

from bench.baselines import BranchFreeConv2d, authors_regularization
from bench.cases import ConvCase, case_of
from bench.correctness import Expectation
from bench.errors import UsageError, WrongResultError
from bench.kinds import providers_for
from bench.measure import load_case
from bench.measurements import by_gpu
from bench.problem import Problem
from bench.providers import PASSES, PIECES, Provider
from bench.report import markdown, readme_table
from bench.results import read_results
from bench.suites import SUITES
from bench.work import flops, least_bytes

CPU = torch.device("cpu")
PLAIN = ConvCase(3, 8, 6, 70, 3, "bf16-autocast")  # more filters than are sampled
STRIDED = ConvCase(2, 9, 4, 8, 3, "fp32", stride=2)
POINTWISE = ConvCase(2, 7, 12, 5, 1, "bf16", remaining_ratio=0.5)
DEPTHWISE = ConvCase(2, 9, 6, 6, 7, "bf16-autocast", groups=6)
STEM = ConvCase(2, 16, 3, 8, 7, "fp16-autocast", stride=2)
ALL = (PLAIN, STRIDED, POINTWISE, DEPTHWISE, STEM)


def _figures(provider, case):
    found = []
    try:
        load_case(case, CPU)(provider, lambda *figure: found.append(figure[:3]))
    except WrongResultError:
        found.append("raised")
    return found


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_the_sizes_are_those_of_torchs_convolution(case):
    layer = nn.Conv2d(**case.layer_options, device="meta")
    output = layer(torch.empty(case.input_shape, device="meta"))
    assert layer.weight.shape == case.weight_shape and layer.bias is None
    assert output.shape == case.output_shape
    assert output.numel() // case.N == case.M
    assert layer.weight[0].numel() == case.K


def test_the_convolutions_of_the_networks_are_in_the_suite():
    """Output positions of a batch, filters, weights of a filter: as in the published tables."""
    sizes = [tuple(map(int, case.sizes)) for case in SUITES["conv"].cases]
    assert sizes[0] == (256 * 56 * 56, 64, 64 * 9)
    assert (256 * 28 * 28, 512, 256) in sizes  # 1x1 with stride 2
    assert (256 * 112 * 112, 64, 3 * 49) in sizes
    assert (128 * 2 * 2, 512, 512 * 9) in sizes
    assert sizes[-1] == (128 * 56 * 56, 96, 49)
    assert len(set(SUITES["conv"].cases)) == len(sizes)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_the_problem_is_what_the_case_says(case):
    problem = Problem(case, CPU)
    (input,) = problem.inputs
    assert input.shape == case.input_shape and problem.grad_output.shape == case.output_shape
    for tensor in (input, problem.weight, problem.grad_output):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert (tensor == 0).float().mean() < 0.01
    rows = problem.weight.flatten(1).abs()
    kept = (rows > problem.threshold[:, None]).sum(1)
    assert kept.float().mean() == pytest.approx(case.K * case.remaining_ratio, abs=1)
    for provider in providers_for("conv", ["dense", "auto", "conv"]):
        weight = provider.build(problem).weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        wanted = problem.mode.compute if provider.name == "conv" else problem.mode.weight
        assert weight.dtype == wanted


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_right_providers_pass(case):
    problem = Problem(case, CPU)
    expectation = Expectation(problem)
    for provider in providers_for("conv"):
        if provider.masked and not provider.compiled:
            expectation.verify(provider.build(problem))


class _OtherPadding(BranchFreeConv2d):
    """Circular: right but for the border."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, padding_mode="circular")


class _LastImageWrong(BranchFreeConv2d):
    def forward(self, input):
        output = super().forward(input)
        return torch.cat([output[:-1], output[-1:] * 1.1])


class _LastFilterUnmasked(BranchFreeConv2d):
    def _masked(self):
        masked = super()._masked()
        return torch.cat([masked[:-1], self.weight[-1:] + 0 * self.threshold[-1]])


WRONG = (_OtherPadding, _LastImageWrong, _LastFilterUnmasked)


@pytest.mark.parametrize("case", [PLAIN, STRIDED, DEPTHWISE], ids=lambda case: case.name)
@pytest.mark.parametrize("layer", WRONG)
def test_a_wrong_provider_has_no_time(layer, case):
    def build(problem):
        options = problem.case.layer_options
        return problem.load_(layer(**options, dtype=problem.weight.dtype))

    error, raised = _figures(Provider("wrong", build, authors_regularization), case)
    assert error[:2] == ("", "error") and ": error" in error[2]
    assert raised == "raised"


def test_every_pass_of_every_provider_has_its_figures():
    for provider in providers_for("conv"):
        if provider.compiled:
            continue
        found = _figures(provider, STRIDED)
        for name in provider.passes:
            metrics = {metric for where, metric, _ in found if where == name}
            assert {"time", "spread", "flops"} <= metrics, (provider.name, name, found)
            assert ("bandwidth" in metrics) == (name != "step")
    by_name = {provider.name: provider.passes for provider in providers_for("conv")}
    assert by_name["fused"] == by_name["packed"] == by_name["dense"] == PASSES + PIECES
    assert by_name["conv"] == ("forward", *PIECES)


def test_work_of_a_pass():
    product = 2 * 2 * 5 * 5 * 8 * 36
    assert [flops(STRIDED, name) for name in ("forward", "backward")] == [product, 2 * product]
    weights, images, outputs = 4 * 8 * 36, 4 * 2 * 4 * 81, 4 * 2 * 8 * 25
    assert least_bytes(STRIDED, "forward") == weights + images + outputs
    assert least_bytes(STRIDED, "grad_weight") == 2 * weights + images + outputs


@pytest.mark.parametrize("case", [*ALL, *SUITES["conv"].cases], ids=lambda case: case.name)
def test_a_case_is_found_again_from_its_columns(case):
    assert case_of(case.name, *case.sizes, case.dtype, f"{case.remaining_ratio:g}") == case


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side": 0}, "batch, side, C, N, kernel, stride, groups are 2, 0, 4, 8, 3, 1, 1"),
        ({"groups": 3}, "Accepted: positive numbers, and groups that divide C and N"),
        ({"groups": 8}, "groups that divide C and N"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"remaining_ratio": 0.0}, r"remaining_ratio is 0\.0"),
    ],
)
def test_cases_that_make_no_sense(changes, message):
    sizes = {"batch": 2, "side": 9, "C": 4, "N": 8, "kernel": 3, "dtype": "bf16"}
    with pytest.raises(UsageError, match=message):
        ConvCase(**sizes | changes)


def test_a_name_that_is_none():
    with pytest.raises(UsageError, match="no convolution is named 'b1-x2'"):
        case_of("conv-b1-x2-bf16-r0.1", "1", "2", "3", "bf16", "0.1")


TABLE = """\
### Convolution, gradient of weight and threshold

| batch | side | C | N | kernel | stride | groups | dtype | dense | fused ÷ dense \
| packed ÷ dense | conv ÷ dense |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 3 | 8 | 6 | 70 | 3 | 1 | 1 | bf16-autocast | 4 µs | 0.50 | 1.00 | - |
| 2 | 9 | 6 | 6 | 7 | 1 | 6 | bf16-autocast | 2 µs | 2.00 | - | 0.50 |
| geometric mean |  |  |  |  |  |  |  |  | 1.00 | 1.00 (1 of 2) | 0.50 (1 of 2) |
"""

README = """\
| images | weight | dense | ÷ dense | ÷ compiled DST | ÷ eager DST | memory |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 3 of 8x8 | 6 to 70, 3x3 | 4 µs | 0.50 | - | - | - |
| 2 of 9x9 | 6 to 6, 7x7, 6 groups | 2 µs | 1.00 | 0.50 | - | - |
| 1 of 4x4 | 2 to 3, 1x1, stride 2 | 2 µs | - | - | - | - |
| geometric mean |  |  | 0.71 (2 of 3) | 0.50 (1 of 3) | - | - |"""


def test_the_tables(tmp_path):
    rows = times(PLAIN, "grad_weight", dense=4e-6, fused=2e-6, packed=4e-6)
    rows += times(DEPTHWISE, "grad_weight", dense=2e-6, fused=4e-6, conv=1e-6)
    both = "forward_backward"
    rows += times(PLAIN, both, dense=4e-6, auto=2e-6)
    rows += times(DEPTHWISE, both, dense=2e-6, auto=2e-6, dst_compiled=4e-6)
    rows += times(ConvCase(1, 4, 2, 3, 1, "bf16-autocast", stride=2), both, dense=2e-6)
    found = by_gpu(read_results(write_rows(tmp_path / "results.csv", rows))).values()
    assert TABLE in markdown(found)
    text = readme_table(found)
    assert text.startswith("Forward and backward of one convolution (bf16 autocast)")
    assert text.endswith(README)

"""Nothing wrong gets a time; everything right does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.baselines import BranchFreeLinear, authors_regularization, branch_free_masked_weight
from bench.cases import Case, ConvCase
from bench.correctness import Expectation
from bench.errors import WrongResultError
from bench.kinds import providers_for
from bench.measure import measure
from bench.modes import MODES
from bench.passes import saved_bytes
from bench.problem import Problem
from bench.providers import Provider

CPU = torch.device("cpu")
LINEAR = Case("linear", 90, 70, 75, "bf16-autocast")  # more rows and tokens than are sampled
WEIGHT = Case("masked_weight", 0, 70, 75, "bf16-autocast")
ON_CPU = sorted(set(MODES) - {"tf32"})


def _figures(provider: Provider, case: Case):
    """What `measure` records: (pass, metric, value)."""
    problem, found = Problem(case, CPU), []
    try:
        measure(provider, problem, Expectation(problem), lambda *figure: found.append(figure[:3]))
    except WrongResultError:
        found.append("raised")
    return found


@pytest.mark.parametrize("dtype", ON_CPU)
@pytest.mark.parametrize("op", ["linear", "masked_weight"])
def test_the_problem_is_what_the_case_says(op, dtype):
    problem = Problem(Case(op, 9 if op == "linear" else 0, 40, 200, dtype, 0.25), CPU)
    kept = (problem.weight.abs() > problem.threshold[:, None]).float().mean(1)
    assert kept.max() <= 0.25 and kept.mean() > 0.22  # 16-bit weights tie with the quantile
    for tensor in (problem.weight, problem.grad_output, *problem.inputs):
        assert (tensor == 0).float().mean() < 0.01
    assert problem.weight.dtype == problem.mode.weight
    assert problem.threshold.dtype == torch.float32
    assert problem.grad_output.dtype == problem.mode.compute
    again = Problem(problem.case, CPU)
    assert torch.equal(again.weight, problem.weight)


@pytest.mark.parametrize("dtype", ON_CPU)
@pytest.mark.parametrize("op", ["linear", "masked_weight"])
def test_right_providers_pass(op, dtype):
    case = Case(op, 90 if op == "linear" else 0, 70, 75, dtype)
    problem = Problem(case, CPU)
    expectation = Expectation(problem)
    for provider in providers_for(op):
        if provider.masked and not provider.compiled:
            expectation.verify(provider.build(problem))


@pytest.mark.parametrize("op", ["linear", "conv"])
def test_tf32_is_judged_by_what_tensor_cores_see(op):
    """Whether torch uses it or, as on a CPU, does not."""
    case = ConvCase(2, 5, 8, 6, 3, "tf32") if op == "conv" else Case("linear", 90, 70, 75, "tf32")
    expectation = Expectation(Problem(case, CPU))
    assert expectation._plain.keys() == expectation._exact.keys()
    for name, exact in expectation._exact.items():
        error = ((expectation._plain[name] - exact).abs().max() / exact.abs().max()).item()
        assert name == "bias" or 1e-4 < error < 2e-3, name


class _DenseForward(BranchFreeLinear):
    def forward(self, input):
        return F.linear(input, self.weight, self.bias) + 0 * self.threshold.sum()


class _DetachedThreshold(BranchFreeLinear):
    """Right outputs; the threshold gets a gradient of zeros."""

    def forward(self, input):
        masked = branch_free_masked_weight(self.weight, self.threshold.detach())
        return F.linear(input, masked, self.bias) + (0 * self.threshold.sum()).to(masked.dtype)


class _NoThreshold(BranchFreeLinear):
    def forward(self, input):
        masked = branch_free_masked_weight(self.weight, self.threshold.detach())
        return F.linear(input, masked, self.bias)


class _LastTokenWrong(BranchFreeLinear):
    def forward(self, input):
        output = super().forward(input)
        return torch.cat([output[:-1], output[-1:] * 1.1])


class _NaNSomewhere(BranchFreeLinear):
    def forward(self, input):
        output = super().forward(input)
        poison = torch.zeros_like(output)
        poison[31, 7] = torch.nan
        return output + poison


class _OtherDtype(BranchFreeLinear):
    def forward(self, input):
        return super().forward(input).float()


class _Sloppy(BranchFreeLinear):
    """As exact as half the bits of bfloat16."""

    def forward(self, input):
        output = super().forward(input)
        return output + (output * 2**-6).detach() * torch.randn_like(output).sign()


WRONG = {
    _DenseForward: "output: error",
    _DetachedThreshold: "threshold: error",
    _NoThreshold: "threshold has no gradient",
    _LastTokenWrong: "output: error",
    _NaNSomewhere: "output is not finite",
    _OtherDtype: "output is torch.float32",
    _Sloppy: "output: error",
}


def _provider(layer: type[nn.Linear]) -> Provider:
    def build(problem: Problem) -> nn.Module:
        N, K = problem.weight.shape
        return problem.load_(layer(K, N, dtype=problem.weight.dtype))

    return Provider("wrong", build, authors_regularization)


@pytest.mark.parametrize("layer", WRONG)
def test_a_wrong_provider_has_no_time(layer):
    error, raised = _figures(_provider(layer), LINEAR)
    assert error[:2] == ("", "error")
    assert error[2].startswith(WRONG[layer])
    assert raised == "raised"


def test_a_provider_that_cannot_run_says_why_and_has_no_time():
    def build(problem: Problem) -> nn.Module:
        raise RuntimeError("no such device\nsecond line")

    provider = Provider("absent", build, authors_regularization)
    assert _figures(provider, LINEAR) == [("", "skipped", "RuntimeError: no such device")]


def test_a_pass_that_fails_leaves_the_others():
    class NoBackward(nn.Linear):
        def forward(self, input):
            return super().forward(input).detach()

    provider = Provider("dense", _provider(NoBackward).build)
    found = _figures(provider, LINEAR)
    timed = [name for name, metric, _ in found if metric == "time"]
    assert timed == ["forward"]
    assert [name for name, metric, _ in found if metric == "skipped"] == [
        "backward",
        "forward_backward",
        "step",
    ]


@pytest.mark.parametrize("case", [LINEAR, WEIGHT], ids=["linear", "masked_weight"])
def test_every_pass_of_every_provider_has_its_figures(case):
    for provider in providers_for(case.op):
        if provider.compiled:
            continue
        found = _figures(provider, case)
        for name in provider.passes:
            metrics = {metric for where, metric, _ in found if where == name}
            assert {"time", "spread"} <= metrics, (provider.name, name, found)
            assert "memory" not in metrics and "host_time" not in metrics  # not on a CPU
            assert ("flops" in metrics) == (case.op == "linear")
            assert ("bandwidth" in metrics) == (name != "step")
        assert all(value > 0 for _, metric, value in found if metric == "time")


def test_a_step_leaves_the_case_as_it_is():
    problem = Problem(LINEAR, CPU)
    (provider,) = providers_for("linear", ["auto"])
    built = []
    keeps = Provider(
        "auto", lambda p: built.append(provider.build(p)) or built[-1], provider.regularization
    )
    measure(keeps, problem, Expectation(problem), lambda *figure: None)
    assert torch.equal(built[0].weight, problem.weight)
    assert torch.equal(built[0].threshold, problem.threshold)


def test_saved_bytes_are_those_beside_input_and_parameters():
    problem = Problem(LINEAR, CPU)
    N, K = problem.weight.shape
    by_name = {provider.name: provider for provider in providers_for("linear")}

    def saved(name):
        return saved_bytes(by_name[name].build(problem), problem)

    assert saved("dense") == 2 * N * K  # the weight as autocast made it
    assert saved("gemm") == 0
    assert saved("fused") <= 4 * N
    assert saved("packed") <= 2 * N * K + 4 * N

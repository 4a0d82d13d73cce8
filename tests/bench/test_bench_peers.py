"""Sparse training in turns, ours and peers': who is right, who is missing, what a turn counts."""

import dataclasses
import itertools
import sys

import pytest
import torch
from made_up_rows import CPU, bench, environment
from torch import nn

from bench.cases import FP64, TrainingCase
from bench.contenders import CONTENDERS, Contender, problem_of
from bench.contenders.models import TRAININGS, Training, masked
from bench.contenders.peers import fix_
from bench.measure import timing
from bench.measure.run import already_measured, run_suite
from bench.measure.verify import Expectation
from bench.report.tables import write_report
from bench.results import ResultsFile, WrongResultError, read_results
from bench.suites import SUITES, Suite
from dst_kernels.training import latency

LENET = TrainingCase("lenet-300-100", 16, dtype="fp32")
SMALL = [LENET, *(TrainingCase(name, 8, dtype="fp32") for name in ("mlp-4096", "resnet-18"))]
BY_NAME = {contender.name: contender for contender in TRAININGS}


def _right(contender, case):
    expectation = Expectation(case, CPU)
    for mode in (FP64, case.mode) if contender.exact else (case.mode,):
        expectation._check_training(contender, mode)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.model}")
        for name, case in itertools.product(BY_NAME, SMALL)
        if name != "dense" and not ("deferred" in name and case.model == "resnet-18")
    ],
)
def test_everybody_trains_as_the_reference_of_the_same_masks(name, case):
    if name.startswith("sparse"):
        pytest.importorskip(name)
    if (name, case.model) == ("sparselab", "resnet-18"):
        with pytest.raises(TypeError, match="sparselab has linear layers only, no "):
            _right(BY_NAME[name], case)
    else:
        _right(BY_NAME[name], case)


class Kept(nn.Module):
    """What a peer is: kept values alone, as a parameter of its own; `wrong` ones decay twice."""

    def __init__(self, layer, shape, wrong=1.0):
        super().__init__()
        self.places, self.shape = layer.weight.detach().ne(0), layer.weight.shape
        assert shape[-1] == self.shape[1] and 0.05 < self.places.float().mean() < 0.7
        self.values, self.bias = nn.Parameter(layer.weight.detach()[self.places]), layer.bias
        self.values.register_hook(lambda grad: grad * wrong)

    def dense_weight(self):
        return self.values.new_zeros(self.shape).masked_scatter(self.places, self.values)

    def forward(self, input):
        return nn.functional.linear(input, self.dense_weight(), self.bias)


def test_a_peer_is_verified_by_its_dense_weights():
    for wrong in (1.0, 0.9):
        peer = lambda layer, shape, wrong=wrong: Kept(layer, shape, wrong)  # noqa: E731
        about = {"convert": lambda model: masked(model, skip_last=True), "fused": True}
        about |= {"groups": lambda model: [*model.parameters()]}
        about |= {"fix": lambda model, input, peer=peer: fix_(model, input, peer)}
        make = lambda setup, about=about: Training(setup, **about)  # noqa: E731
        peer = Contender("peer", make, ("step",), reference=BY_NAME["sparselab"].reference)
        if wrong == 1.0:
            _right(peer, LENET)
            names = set(make(problem_of(LENET, CPU))._parameters())
            assert names == {f"fc{i}.{of}" for i in (1, 2, 3) for of in ("weight", "bias")}
        else:
            with pytest.raises(WrongResultError, match="after a few steps in fp64: error"):
                _right(peer, LENET)


def test_dense_and_ours_keep_what_the_case_says_down_to_one_percent():
    setup = problem_of(dataclasses.replace(LENET, remaining_ratio=0.01), CPU)
    for name in ("deferred", "fixed_sgd", "fixed_deferred"):
        training = BY_NAME[name].make(setup)
        training.step(), training.step()
        shares = [m.remaining_ratio() for m in training.model.modules() if hasattr(m, "masking")]
        assert len(shares) == 3 - name.startswith("fixed") and max(shares) < 0.0103


def test_turns_are_medians_of_ratios_in_rounds(monkeypatch):
    def slow_twice(by):  # as a neighbour does, in some rounds
        rounds = iter(range(1000))
        return lambda: by * (2 if next(rounds) % 3 == 0 else 1)

    monkeypatch.setattr(latency, "_seconds", lambda call, count: call())
    found = timing.in_turns({"dense": slow_twice(0.1), "ours": slow_twice(0.05)}, "dense")
    assert found["ours"] == (pytest.approx(0.05), pytest.approx(0.0)), "alike in every round"
    assert found["dense"][0] == 0.1
    assert timing.in_turns({"ours": slow_twice(0.05)}, "dense")["ours"][0] == 0.05


def test_a_case_is_measured_as_a_whole_and_absent_peers_say_why(tmp_path, monkeypatch):
    for name in ("sparselab", "sparseprop", "sparseprop.modules"):
        monkeypatch.setitem(sys.modules, name, None)
    cases = [dataclasses.replace(LENET, remaining_ratio=share) for share in (0.05, 0.1, 0.2)]
    suite, threads = Suite("sparse-training", tuple(cases)), torch.get_num_threads()
    monkeypatch.setattr(latency, "_ROUNDS", 2)
    monkeypatch.setitem(SUITES, suite.name, suite)
    path, here = tmp_path / "results.csv", environment("cpu: Made up")
    with ResultsFile(path, here) as file:
        outcome = run_suite(suite, file, CPU, filters=["/(dense|deferred|sparse.*)$"])
        assert (outcome.measured, outcome.wrong) == (12, {})
        rows = read_results(path)
        done = already_measured(rows, suite, "cpu", here) - {(cases[0].name, "deferred")}
        outcome = run_suite(suite, file, CPU, filters=["/(dense|deferred|sparse.*)$"], done=done)
        assert outcome.measured == 4, "all of the case took their turns"
    timed = {row.provider for row in rows if row.metric == "time"} - {"ceiling"}
    assert timed == {"dense", "deferred"}
    reasons = {row.provider: row.value for row in rows if row.metric == "skipped"}
    assert reasons.keys() == {"sparselab", "sparseprop"} and "sparselab" in reasons["sparselab"]
    report, *plots = write_report(rows, tmp_path)
    assert "deferred ÷ dense" in report.read_text() and plots[-1].name.endswith("-training.png")
    torch.set_num_threads(threads)
    assert bench("check", path)[0] in (0, 1) and CONTENDERS["training"] is TRAININGS

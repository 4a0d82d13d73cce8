"""Predictions: the arithmetic, the counting, and that nobody takes them for measurements."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import pytest
import torch
from made_up_rows import ceilings, environment, times, write_rows
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from bench import predict as predictions
from bench import readme
from bench.baselines import authors_masked_weight
from bench.cases import Case, ConvCase, ListCase, ModelCase
from bench.commands import app
from bench.environment import CPU, Environment, is_predicted
from bench.goals import GOALS
from bench.machine import MACHINES, Kernel, gpu_time, optimizer_launches, total_bytes
from bench.measurements import by_gpu
from bench.predict import predict, predict_case
from bench.predict_models import _Steps
from bench.results import read_results
from bench.suites import SUITES
from bench.trace import fake_tensors, fused, trace

H200 = MACHINES["h200"]
FLOOR = 2e-6
LAYER = Case("linear", 1024, 4096, 4096, "bf16-autocast")
STEP = ModelCase("linear-4096", 1024, "bf16-autocast")
FIRST = SUITES["linear"].cases[0]
PREDICTED = Environment.of_prediction("NVIDIA H200", "abc")


def _figures(case, machine=H200):
    """By (provider, pass, metric)."""
    return {tuple(row[:3]): row[3] for row in predict_case(case, machine)}


def _command(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.output


# -- the arithmetic ----------------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_kernel_takes_its_traffic_or_its_arithmetic(machine):
    streaming = Kernel("copy", bytes=3e9, flops=1)
    assert streaming.seconds(machine, 3e12) == 1e-3 + FLOOR
    product = Kernel("mm", bytes=1, flops=machine.bf16 / 4, share=0.5)
    assert product.seconds(machine, machine.copy) == 0.5 + FLOOR
    twice = dataclasses.replace(product, launches=2)
    assert twice.seconds(machine, machine.copy) == 0.5 + 2 * FLOOR
    assert gpu_time([streaming, product], machine) == pytest.approx(
        3e9 / machine.copy + 0.5 + 2 * FLOOR
    )


def test_a_cache_serves_what_fits_it_and_only_when_warm():
    inside = [Kernel("copy", bytes=H200.l2)]
    assert gpu_time(inside, H200) == H200.l2 / H200.copy + FLOOR
    assert gpu_time(inside, H200, warm=True) == H200.l2 / H200.l2_speed + FLOOR
    outside = [*inside, Kernel("copy", bytes=1, launches=0)]
    assert gpu_time(outside, H200, warm=True) == pytest.approx(gpu_time(outside, H200), rel=1e-12)


def test_rates_of_dtypes():
    exact, rounded = (Kernel("mm", 0, 1e12, torch.float32, tf32) for tf32 in (False, True))
    half = Kernel("mm", 0, 1e12, torch.float16)
    seconds = [each.seconds(H200, 1.0) for each in (exact, rounded, half)]
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == 3


def test_launches_of_torchs_optimizers():
    """At most 320 blocks of 65,536 elements, and 48 or 36 tensors, in each."""
    assert optimizer_launches([1] * 48, adamw=False) == 1
    assert optimizer_launches([1] * 49, adamw=False) == 2
    assert optimizer_launches([1] * 49, adamw=True) == 3  # and one for its counts
    assert optimizer_launches([321 * 65536], adamw=False) == 2


# -- the counting ------------------------------------------------------------------------------


def test_the_authors_masking_is_what_was_counted_by_hand():
    """8 kernels, 42 bytes a weight and a wait in the forward pass (performance, section 1)."""
    side = 1024
    with fake_tensors():
        weight = torch.randn(side, side, requires_grad=True)
        threshold = torch.rand(side, requires_grad=True)
        found = trace(lambda: authors_masked_weight(weight, threshold))
    assert (found.launches, found.syncs) == (8, 1)
    assert total_bytes(found.kernels) / side**2 == pytest.approx(42, rel=0.01)


def test_what_costs_nothing_and_what_is_read_twice():
    with fake_tensors():
        images = torch.randn(4, 8, 6, 6)
        norm = nn.BatchNorm2d(8)
        assert trace(lambda: images.view(4, -1).t()[0]).kernels == []
        assert trace(lambda: torch.empty(100)).kernels == []
        (fill,) = trace(lambda: torch.zeros(100)).kernels
        (add,) = trace(lambda: images.add_(1)).kernels
        (copy,) = trace(lambda: images[0].copy_(images[1])).kernels
        hundred, one = torch.empty(100), torch.empty(())
        (broadcast,) = trace(lambda: one.expand(100) + hundred).kernels
        counted, batch_norm = trace(lambda: norm(images)).kernels
    size = images.numel() * 4
    assert (fill.bytes, add.bytes, copy.bytes) == (400, 2 * size, size // 2)
    assert broadcast.bytes == 4 + 400 + 400
    assert counted.name == "add_" and batch_norm.launches == 2
    assert 3 * size < batch_norm.bytes < 3 * size + 1000


def test_products_of_convolutions():
    with fake_tensors():
        for groups, shape in ((1, (6, 4, 3, 3)), (4, (4, 1, 3, 3))):
            images = torch.randn(2, 4, 10, 10, requires_grad=True)
            weight = torch.randn(shape, requires_grad=True)
            output = []
            forward = trace(lambda: output.append(F.conv2d(images, weight, groups=groups)))  # noqa: B023
            backward = trace(lambda: output[0].backward(torch.empty_like(output[0])))  # noqa: B023
            each = 2 * 2 * 8 * 8 * weight.numel()
            assert [kernel.flops for kernel in forward.kernels] == [each]
            assert [kernel.flops for kernel in backward.kernels] == [each, each]


def test_memory_is_that_of_tensors_alive_together():
    def call():
        first = torch.ones(1000)
        second = first + 1
        del first
        return second + 1

    with fake_tensors():
        assert trace(call).peak == 2 * 4000


def test_a_compiler_writes_no_intermediates():
    product = Kernel("mm", 7, flops=1, reads=((2, 20),))
    run = [
        Kernel("add", 30, reads=((0, 10),), writes=((1, 20),)),
        Kernel("mul", 40, reads=((1, 20),), writes=((2, 20),)),
        Kernel("neg", 50, reads=((1, 20),), writes=((3, 30),)),
    ]
    kernels = fused([*run, product, run[0]])
    # Reads 0; writes 2, which the product reads, and 3, which nobody has read yet.
    assert [kernel.bytes for kernel in kernels] == [10 + 20 + 30, 7, 10 + 20]
    norm = Kernel("native_batch_norm", 30, launches=2, reads=((0, 10),), writes=((1, 10),))
    (both,) = fused([norm, Kernel("relu_", 20, reads=((1, 10),), writes=((1, 10),))])
    assert (both.bytes, both.launches) == (2 * 10 + 10, 2)


# -- layers ------------------------------------------------------------------------------------


def test_a_dense_layer_by_hand():
    """bf16 autocast on an H200: casts, three products bound by arithmetic, sums of dY."""
    found = _figures(LAYER)
    weights, activations = 2**24, 2 * 1024 * 4096
    product = 2 * 1024 * weights / 788e12 + FLOOR
    cast = 6 * weights / 4.3e12 + FLOOR
    small = 6 * 4096 / 4.3e12 + FLOOR
    bias = (activations + 2 * 4096) / 4.3e12 + FLOOR
    assert found["gemm", "forward", "time"] == pytest.approx(product)
    assert found["dense", "forward", "time"] == pytest.approx(product + cast + small)
    assert found["dense", "grad_weight", "time"] == pytest.approx(product + cast)
    assert found["dense", "forward_backward", "time"] == pytest.approx(
        3 * product + 2 * cast + 2 * small + bias, rel=1e-3
    )
    assert found["dense", "forward", "host_time"] == pytest.approx(3 * 5e-6)


def test_fused_products_reach_their_shares():
    tokens = Case("linear", 65536, 4096, 4096, "bf16-autocast")
    found = _figures(tokens)
    for name, share in (("forward", 0.65), ("grad_input", 0.65), ("grad_weight", 0.9)):
        reached = found["gemm", name, "time"] / found["fused", name, "time"]
        assert reached == pytest.approx(share, rel=0.02)
    assert found["packed", "grad_input", "time"] == found["gemm", "grad_input", "time"]
    same = Case("linear", 65536, 4096, 4096, "bf16")
    assert _figures(same)["fused", "forward", "time"] < found["fused", "forward", "time"]


def test_a_fused_gradient_of_few_tiles_goes_through_slabs():
    """1024²: 64 tiles of 128x128 share 132 multiprocessors, so two slabs of G."""
    found = _figures(Case("linear", 8192, 1024, 1024, "bf16-autocast"))
    weights = 1024**2
    product = 2 * 8192 * weights / (0.9 * 788e12) + FLOOR
    slabs = (2 * 4 + 8) * weights / 4.3e12 + 2 * FLOOR
    seconds = found["fused", "grad_weight", "time"]
    assert seconds == pytest.approx(product + slabs, rel=1e-3)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_pack_is_bound_by_memory(machine):
    case = Case("masked_weight", 0, 8192, 8192, "bf16-autocast")
    found = _figures(case, machine)
    thresholds = 2 * 4 * 8192
    moved = (6 * 8192**2 + thresholds) / machine.copy
    assert found["auto", "forward", "time"] == pytest.approx(moved + 2 * FLOOR, rel=1e-6)
    assert found["auto", "forward", "bandwidth"] < machine.copy


def test_more_tokens_are_never_faster():
    by_provider = defaultdict(list)
    for tokens in (16, 128, 1024, 8192):
        case = Case("linear", tokens, 1024, 1024, "bf16-autocast")
        for key, value in _figures(case).items():
            if key[2] in ("time", "graph_time", "memory"):
                by_provider[key].append(value)
    assert len(by_provider) > 40
    for key, values in by_provider.items():
        assert values == sorted(values), key


def test_auto_is_what_the_planner_takes():
    for tokens, path in ((16, "fused"), (1024, "mixed"), (65536, "packed")):
        found = _figures(dataclasses.replace(LAYER, M=tokens))
        seconds = {
            name: found[name, "forward_backward", "time"]
            for name in ("auto", "fused", "packed", "mixed")
        }
        assert seconds["auto"] == seconds[path] == min(seconds.values())


def test_an_eager_layer_waits_for_the_device():
    """Its masking moves 214 bytes a weight (performance, section 1) and stops the host."""
    found = _figures(LAYER)
    extra = (
        found["dst_eager", "forward_backward", "time"] - found["dense", "forward_backward", "time"]
    )
    masking = (42 + 156) * 2**24 / 4.3e12  # 25 kernels as the baseline here has them
    assert extra == pytest.approx(masking + 25 * FLOOR + 20e-6, rel=0.01)
    assert ("dst_eager", "forward_backward", "graph_time") not in found


def test_a_convolution_has_no_estimate_that_beats_cudnn():
    case = ConvCase(256, 14, 256, 256, 3, "bf16-autocast")
    found = _figures(case)
    for name in ("forward", "grad_input"):
        assert found["fused", name, "time"] > found["conv", name, "time"]
    assert found["auto", "forward", "time"] == found["packed", "forward", "time"]
    flops = 2 * 256 * 14 * 14 * 256 * 256 * 9
    assert found["conv", "forward", "time"] == pytest.approx(flops / (0.33 * 788e12) + FLOOR)


@pytest.mark.parametrize(("name", "launches"), [("pack", 2), ("post", 1), ("sgd", 2), ("adamw", 2)])
def test_lists_by_hand(name, launches):
    moved = {"pack": 6, "post": 10, "sgd": 20, "adamw": 28}[name] * 4 * 4096**2
    found = _figures(ListCase("4x4096x4096", "bf16-autocast"))
    seconds = moved / 4.3e12 + launches * FLOOR
    assert found["auto", name, "time"] == pytest.approx(seconds)
    assert found["auto", name, "bandwidth"] == pytest.approx(moved / seconds)


# -- whole steps -------------------------------------------------------------------------------


def test_bytes_of_a_step():
    """A weight: grouped 4 more than dense under autocast, deferred 12 fewer (performance, 2)."""
    steps = _Steps(STEP).all()
    weights = 2**24
    moved = {name: total_bytes(step.kernels) / weights for name, step in steps.items()}
    assert moved["deferred"] - moved["dense"] == pytest.approx(-12, abs=0.02)
    assert moved["grouped"] - moved["dense"] == pytest.approx(4, abs=0.02)
    assert moved["masked"] - moved["dense"] == pytest.approx(4, abs=0.05)
    assert moved["dst_eager"] - moved["dense"] == pytest.approx(198, abs=0.1)
    # Counting reads each weight once more.
    assert moved["dst_compiled"] - moved["masked_compiled"] == pytest.approx(4, abs=0.02)
    assert moved["deferred_compiled"] - moved["dense_compiled"] == pytest.approx(0, abs=0.02)
    assert steps["dst_eager"].syncs == 1


def test_a_small_step_is_bound_by_its_host():
    found = _figures(ModelCase("lenet-300-100", 128, "bf16-autocast"))
    launches = found["dense", "step", "launches"]
    assert found["dense", "step", "time"] == pytest.approx(launches * 5e-6)
    assert found["dense", "step", "graph_time"] < found["dense", "step", "time"]
    # Three layers cost Python, but spare casts of weights and gradients, six launches.
    assert found["deferred", "step", "launches"] < launches
    assert found["deferred", "step", "time"] > found["dense", "step", "time"]
    assert found["dst_eager", "step", "time"] > launches * 5e-6 + 3 * 20e-6


def test_a_large_step_is_bound_by_the_gpu():
    found = _figures(STEP)
    for name in ("dense", "deferred", "grouped"):
        assert found[name, "step", "time"] == found[name, "step", "graph_time"]
    assert found["deferred", "step", "memory"] < found["dense", "step", "memory"]
    larger = _figures(dataclasses.replace(STEP, batch=2048))
    for key, value in found.items():
        if key[2] in ("time", "graph_time", "memory"):
            assert larger[key] > value, key


def test_the_cast_of_cuda_comes_back_in_float32():
    """Layer norms do so under autocast on CUDA, not on a CPU."""
    with fake_tensors(), torch.autocast("cpu", torch.bfloat16):
        images = torch.randn(8, 64, dtype=torch.bfloat16)
        layer = nn.LayerNorm(64)
        cast, norm = trace(lambda: layer(images)).kernels
    assert (cast.name, cast.bytes) == ("_to_copy", 6 * images.numel())
    assert norm.bytes > 8 * images.numel()


# -- rows --------------------------------------------------------------------------------------


LARGE = ("wrn-28-8", "resnet-50", "gpt", "convnext-t", "vit-b-16")  # seconds each to trace


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """Predictions for both machines, of all but large models."""
    every = {case.name: case for case in SUITES["model"].cases}
    few = tuple(case for case in every.values() if case.model not in LARGE)
    with pytest.MonkeyPatch.context() as patch:
        suites = {**SUITES, "model": dataclasses.replace(SUITES["model"], cases=few)}
        patch.setattr(predictions, "SUITES", suites)
        return {
            name: predict(machine, tmp_path_factory.mktemp(name), goals_only=True)
            for name, machine in MACHINES.items()
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_each_goal_of_gpus_has_a_predicted_figure(predicted, name):
    (found,) = by_gpu(read_results(predicted[name])).values()
    assert is_predicted(found.gpu) and MACHINES[name].name in found.gpu
    # What has a reason has no other rows; compiled DST has another contender.
    with_reasons = {case for case, provider, *_ in found.reasons if provider == "dense"}
    assert with_reasons == {case.name for case in SUITES["model"].cases if case.model == "lstm-a"}
    left_out = {case.name for case in SUITES["model"].cases if case.model in LARGE}
    for goal in GOALS:
        if goal.device != CPU:
            figure = goal.figure(found)
            assert (with_reasons | left_out).issuperset(figure.missing), goal.title
            assert (figure.value is None) == (len(figure.missing) == figure.cases)
    assert _command("check", predicted[name])[0] == 1  # some are expected to be missed


@pytest.mark.slow
def test_a_slower_memory_takes_longer(predicted):
    slow, fast = (by_gpu(read_results(predicted[name])) for name in ("h100", "h200"))
    (slow,), (fast,) = slow.values(), fast.values()
    for case in (*SUITES["steps"].cases, SUITES["model"].cases[0]):
        times = [found.newest(case.name, "dense", "step", "graph_time") for found in (slow, fast)]
        assert times[0] > times[1]


def _few(monkeypatch):
    suites = {name: dataclasses.replace(SUITES[name], cases=()) for name in SUITES}
    suites["streaming"] = dataclasses.replace(
        SUITES["streaming"], cases=(ListCase("small", "bf16-autocast"), FIRST)
    )
    monkeypatch.setattr(predictions, "SUITES", suites)


def test_the_command_writes_rows_of_a_device_that_is_none(tmp_path, monkeypatch):
    _few(monkeypatch)
    for _ in range(2):  # the second takes the place of the first
        code, output = _command("predict", "--gpu", "h200", "--out", tmp_path)
        assert code == 0, output
    rows = read_results(tmp_path / "results.csv")
    assert {(row.gpu, row.torch, row.triton) for row in rows} == {
        ("NVIDIA H200, predicted", "none", "none")
    }
    assert len({row.date for row in rows}) == 1
    found = by_gpu(rows)["NVIDIA H200, predicted"]
    assert found.newest("copy", "ceiling", "forward", "bandwidth") == 4.3e12
    assert found.newest(FIRST.name, "auto", "forward_backward", "time") > 0
    few = tmp_path / "few"
    assert _command("predict", "--gpu", "h200", "--out", few, "--goals-only")[0] == 0
    (fewer,) = by_gpu(read_results(few / "results.csv")).values()
    assert 0 < len(fewer.rows) < len(rows) / 2
    for goal in GOALS:
        assert goal.figure(fewer) == goal.figure(found)


def test_bad_input_of_predict(tmp_path):
    code, output = _command("predict", "--gpu", "a100", "--out", tmp_path)
    assert code == 2 and "--gpu 'a100' is unknown. Accepted: h100, h200." in output
    path = write_rows(tmp_path / "results.csv", ceilings())
    before = path.read_text()
    code, output = _command("predict", "--gpu", "h200", "--out", tmp_path)
    assert code == 2 and "measured on made-up device" in output
    assert path.read_text() == before


# -- what reads them -----------------------------------------------------------------------------


def test_no_planners_table_of_predictions(tmp_path):
    rows = [
        row
        for name in ("forward", "grad_input", "grad_weight")
        for row in times(LAYER, name, fused=1.0, packed=2.0)
    ]
    path = write_rows(tmp_path / "results.csv", rows, PREDICTED)
    out = tmp_path / "table.json"
    code, output = _command("plan", path, "--out", out)
    assert code == 2 and "'NVIDIA H200, predicted'. Accepted: rows that were measured" in output
    assert not out.exists()


def test_no_predictions_in_the_readme(tmp_path, monkeypatch):
    rows = times(LAYER, "forward_backward", auto=1.0, dense=2.0, dst_eager=3.0)
    path = write_rows(tmp_path / "results.csv", rows, PREDICTED)
    ours = tmp_path / "README.md"
    text = f"{readme.BEGIN}\nNot yet measured.\n{readme.END}\n"
    ours.write_text(text)
    code, output = _command("report", path, "--readme", ours)
    assert code == 2 and "CSV has predicted rows" in output and ours.read_text() == text
    monkeypatch.setattr("bench.commands.ROOT", tmp_path)
    assert _command("report", path)[0] == 0
    assert ours.read_text() == text
    assert "Ceilings, predicted" in (tmp_path / "report.md").read_text()
    write_rows(path, rows, environment("Big 1"))
    assert _command("report", path)[0] == 0
    assert "Measured on Big 1" in ours.read_text() and "predicted" not in ours.read_text()


def _line(output, title):
    return next(line for line in output.splitlines() if title in line).split()


def test_check_shows_what_was_predicted_beside_what_came(tmp_path):
    case = ModelCase("vgg-16", 128, "bf16-autocast")
    came = times(case, "step", grouped=0.5, dst_eager=1.0)
    measured = write_rows(tmp_path / "measured.csv", came)
    expected = times(case, "step", grouped=0.7, dst_eager=1.0)
    path = write_rows(tmp_path / "predicted.csv", expected, PREDICTED)
    title = "vgg-16, eager: grouped ÷ dst_eager"
    code, output = _command("check", measured, "--predicted", path)
    assert code == 0  # by what came
    assert "Goals, made-up device beside NVIDIA H200, predicted" in output
    assert _line(output, "verdict") == ["verdict", "figure", "predicted", "limit", "goal"]
    assert _line(output, title)[:5] == ["met", "0.500", "0.700", "≤", "0.60"]
    assert _line(output, "vgg-16, eager: deferred")[:5] == ["not", "measured", "-", "-", "≤"]
    code, output = _command("check", measured)
    assert _line(output, "verdict") == ["verdict", "figure", "limit", "goal"]
    assert _line(output, title)[:4] == ["met", "0.500", "≤", "0.60"]
    code, output = _command("check", path)
    assert code == 1 and _line(output, title)[:2] == ["missed", "0.700"]


def test_predictions_are_for_gpus(tmp_path):
    measured = write_rows(tmp_path / "cpu.csv", times(FIRST, "forward", auto=1.0), environment(CPU))
    path = write_rows(tmp_path / "predicted.csv", times(FIRST, "forward", auto=1.0), PREDICTED)
    code, output = _command("check", measured, "--predicted", path)
    assert code == 0 and "beside" not in output


def test_what_is_no_prediction_is_refused(tmp_path):
    measured = write_rows(tmp_path / "measured.csv", ceilings())
    code, output = _command("check", measured, "--predicted", measured)
    assert code == 2
    assert "--predicted has rows of made-up device. Accepted: those of one GPU" in output
    both = write_rows(tmp_path / "both.csv", ceilings(), PREDICTED)
    write_rows(both, ceilings(), Environment.of_prediction("NVIDIA H100", "abc"))
    code, output = _command("check", measured, "--predicted", both)
    assert code == 2 and "NVIDIA H200, predicted, NVIDIA H100, predicted" in output

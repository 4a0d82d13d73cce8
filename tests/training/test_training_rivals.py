"""`--method`: what is trained and shown, what is refused, and that a stop changes no bit."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_training_target import interrupted_in_the_third_epoch
from torch.nn.functional import cross_entropy

import dst_kernels
from dst_kernels.training.config import RunConfig
from dst_kernels.training.data import Data, TensorBatches
from dst_kernels.training.errors import UsageError
from dst_kernels.training.loop import Observer, train
from dst_kernels.training.models import load_model
from dst_kernels.training.rivals import METHODS, RIVALS, parse_options
from dst_kernels.training.state import new_state

NOT_EXACT = ("str", "dns", "sparse-momentum", "deep-r")  # counts drift, or follow from thresholds


def options_of(name):
    density = ("--method-options", "start=-4") if name == "str" else ("--density", 0.2)
    every = ("--method-options", "every=10") if name in ("set", "rigl", "dsr", "magnitude") else ()
    return "--epochs", 4, "--method", name, *density, *every


def rows_of(run):
    with open(run / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_every_method_of_the_package_has_a_name():
    assert {kind.__name__ for kind in RIVALS.values()} == set(dst_kernels.methods.__all__)
    assert ("dst", *RIVALS) == METHODS


@pytest.mark.parametrize("name", RIVALS)
def test_a_run_trains_and_is_read_again(cli, run_of, name):
    run = run_of(*options_of(name))
    rows, summary = rows_of(run), json.loads((run / "summary.json").read_text())
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert (summary["method"], summary["thresholds"]) == (name, 0)
    assert summary["execution"] == "fixed masks" and not (run / "thresholds.png").exists()
    assert summary["remaining_ratio"] < 0.9
    if name not in NOT_EXACT:
        assert summary["kept_weights"] == round(0.2 * 266_200)
    model = load_model(run)
    assert dst_kernels.sparsity_report(model).kept == summary["kept_weights"]
    shown = " ".join(cli("evaluate", run).output.split())
    accuracy = f"{100 * summary['test_accuracy']:.2f} %"
    assert f"{accuracy} of epoch 4 of 4, when it was {accuracy}" in shown
    assert "nan" not in shown and "fixed" not in shown
    assert f"{name}, density 0.2" in cli("report", run).output or name == "str"


@pytest.mark.parametrize("name", RIVALS)
def test_a_stop_changes_no_bit(cli, run_of, tmp_path, name):
    whole, begun = run_of(*options_of(name)), tmp_path / "begun"
    with interrupted_in_the_third_epoch():
        assert cli("train", *options_of(name), "--out", begun).exit_code == 130
    result = cli("train", "--resume", begun)
    assert result.exit_code == 0, result.output
    expected, actual = (load_file(run / "model.safetensors") for run in (whole, begun))
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
    assert rows_of(begun) == rows_of(whole)


def test_more_epochs_keep_the_schedule(cli, run_of, tmp_path):
    whole = run_of(*options_of("rigl"))
    begun = tmp_path / "begun"
    options = (*options_of("rigl")[2:], "--method-epochs", 4, "--epochs", 3)
    assert cli("train", *options, "--out", begun).exit_code == 0
    assert cli("train", "--resume", begun, "--epochs", 4).exit_code == 0
    assert (begun / "config.json").read_text() == (whole / "config.json").read_text()
    assert rows_of(begun) == rows_of(whole)
    assert replace(RunConfig(method="set", density=0.1, epochs=3), epochs=9).method_epochs == 3


def test_changes_of_masks_are_recorded(run_of):
    rows = rows_of(run_of(*options_of("set")))
    assert all(row["churn"] > 0.02 for row in rows)
    ever = [row["ever_active"] for row in rows]
    assert ever[0] == pytest.approx(0.2, abs=1e-5) and ever == sorted(set(ever))


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_a_method_steps_after_the_optimizer_and_sees_its_gradients(name):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(24, 1, 6, 6, generator=generator), torch.arange(24) % 3
    batches = TensorBatches(images, labels, 24)  # one step an epoch: the order has no effect
    data = Data(batches, batches, (1, 6, 6), 3)
    config = RunConfig(
        method=name, density=0.3, method_options="every=2", epochs=6, lr=0.1, weight_decay=1e-3
    )
    trained = new_state(config, data, torch.device("cpu"))
    train(trained, config, data, Observer(), save=lambda state: None)

    torch.manual_seed(0)
    model = dst_kernels.training.models.build_model(config, (1, 6, 6), 3)
    parameters = [p for key, p in model.named_parameters() if not key.endswith("threshold")]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)
    steps = {"steps": 6} if name == "rigl" else {}
    method = RIVALS[name](model, optimizer, density=0.3, every=2, **steps)
    start = [layer.mask.clone() for layer in method.layers]
    for _ in range(6):
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        method.step()
        optimizer.zero_grad()
    assert any((m != layer.mask).any() for m, layer in zip(start, method.layers, strict=True))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(trained.weights[key], value)


def test_the_density_of_dst_is_its_target():
    config = RunConfig(density=0.1)
    assert config == RunConfig(target=0.1) and config.kind == "target 0.1"
    assert RunConfig.from_dict(config.to_dict()) == config
    old = {k: v for k, v in config.to_dict().items() if "method" not in k and k != "density"}
    assert RunConfig.from_dict(old) == config


def test_options_of_methods_are_numbers_flags_and_words():
    found = parse_options("every=938,rate=5e-1,soft=true,scope=layer,start=-3.0")
    assert found == {"every": 938, "rate": 0.5, "soft": True, "scope": "layer", "start": -3.0}
    assert type(found["every"]) is int and parse_options(None) == {}
    assert math.isnan(parse_options("rate=nan")["rate"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "sett"), "--method 'sett' is unknown. Did you mean set?"),
        (("--method", "set"), "--density is None. Accepted with --method set: a share of weights"),
        (("--method-options", "rate=1"), "--method-options with --method dst, which has none"),
        (("--density", 0.1, "--target", 0.1), "--density 0.1 and --target 0.1 are the same option"),
        (("--density", 0.1, "--alpha", 1), "--alpha and --density contradict each other"),
        (("--density", 1), "--density is 1.0. Accepted: a number above 0 and below 1"),
        *(
            (("--method", "set", "--density", 0.1, *more), words)
            for more, words in (
                (("--method-options", "speed=1"), "'speed' is unknown. Accepted: every, rate,"),
                (("--method-options", "rate"), "--method-options is 'rate'. Accepted: different"),
                (("--method-options", "rate=1,rate=2"), "Accepted: different names with a number"),
                (("--method-options", "rate=7"), "--method set: rate must be at most 1, but is 7"),
                (("--method-options", "rate=x"), "--method set: rate must be "),
                (("--alpha", 1, "--surrogate", "triangular"), "--alpha, --surrogate with --method"),
                (("--threshold-weight-decay", 0), "set, which trains no thresholds"),
                (("--target", 0.1), "--target with --method set, which trains no thresholds"),
                (("--freeze-epoch", 2), "--freeze-epoch with --method set"),
                (("--restore-collapsed",), "--restore-collapsed with --method set"),
                (("--fsdp",), "--fsdp with --method set, which does not work with that"),
                (("--graph",), "--graph with --method set"),
            )
        ),
    ],
)
def test_what_does_not_fit_is_refused(cli, tmp_path, options, words):
    result = cli("train", *options)
    assert result.exit_code == 2 and words in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_thresholds_of_a_configuration_are_refused_too():
    with pytest.raises(UsageError, match="--granularity with --method set"):
        RunConfig(method="set", density=0.1, granularity="layer")

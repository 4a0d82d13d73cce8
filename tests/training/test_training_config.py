from __future__ import annotations

import json
import math

import pytest

from dst_kernels.training.config import RunConfig
from dst_kernels.training.errors import UsageError
from dst_kernels.training.presets import DATASET_PRESETS, PRESETS


def test_default_preset_is_the_digits_anchor():
    config = RunConfig.from_preset("digits")
    assert (config.model, config.dataset) == ("lenet-300-100", "digits")
    assert (config.alpha, config.epochs, config.batch_size) == (4e-3, 100, 64)
    assert (config.optimizer, config.lr, config.momentum) == ("sgd", 0.01, 0.9)
    assert (config.weight_decay, config.threshold_weight_decay) == (0, 0)
    assert (config.granularity, config.surrogate) == ("row", "long_tailed")


def test_mnist_presets_are_the_papers():
    for name, model in (("mnist", "lenet-300-100"), ("mnist-lenet-5", "lenet-5")):
        config = RunConfig.from_preset(name)
        assert (config.dataset, config.model) == ("mnist", model)
        assert (config.alpha, config.epochs, config.lr, config.batch_size) == (5e-4, 20, 0.01, 64)
    for model in ("lstm-a", "lstm-b"):
        config = RunConfig.from_preset(f"mnist-{model}")
        assert (config.model, config.optimizer, config.skip_last) == (model, "adam", True)
        assert (config.alpha, config.epochs, config.lr, config.batch_size) == (1e-3, 20, 1e-3, 100)


@pytest.mark.parametrize(
    ("preset", "model"),
    [
        ("cifar10", "vgg-16"),
        ("cifar10-vgg-16", "vgg-16"),
        ("cifar10-wrn-16-8", "wrn-16-8"),
        ("cifar10-wrn-16-10", "wrn-16-10"),
        ("cifar10-wrn-28-8", "wrn-28-8"),
        ("imagenet", "resnet-50"),
    ],
)
def test_presets_of_colour_images_follow_their_schedules(preset, model):
    config = RunConfig.from_preset(preset)
    assert (config.model, config.optimizer, config.lr, config.gamma) == (model, "sgd", 0.1, 0.1)
    assert (config.momentum, config.alpha) == (0.9, 5e-6)
    assert (config.weight_decay, config.threshold_weight_decay) == (1e-4, 1e-4)
    schedule = (config.dataset, config.epochs, config.milestones, config.batch_size)
    if preset == "imagenet":
        assert schedule == ("image-folder", 90, (30, 60, 80), 256)
        assert config.image_size == 224
        assert "not the paper's" in PRESETS[preset].description
    else:
        assert schedule == ("cifar10", 160, (80, 120), 64)


def test_the_preset_in_a_file_is_only_a_label():
    """`cifar10` was torchvision's ResNet-18."""
    old = {**RunConfig.from_preset("cifar10").to_dict(), "model": "resnet18"}
    assert RunConfig.from_dict(old).model == "resnet18"


def test_every_preset_is_valid_and_survives_json():
    assert set(DATASET_PRESETS.values()) <= set(PRESETS)
    for name in PRESETS:
        config = RunConfig.from_preset(name, seed=3)
        assert config.preset == name
        assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("dataset", "mnits", "Did you mean mnist"),
        ("granularity", "column", "row, layer, element"),
        ("surrogate", "sigmoid", "long_tailed, rectangular, triangular, straight_through"),
        ("optimizer", "lbfgs", "sgd, adam"),
        ("amp", "fp16", "none, bf16"),
        ("preset", "imagnet", "digits, mnist"),
        ("alpha", -1.0, "at least 0"),
        ("alpha", math.nan, "at least 0"),
        ("alpha", True, "at least 0"),
        ("epochs", 0, "an integer of at least 1"),
        ("epochs", 1.5, "an integer of at least 1"),
        ("batch_size", 1, "an integer of at least 2"),
        ("lr", 0.0, "above 0"),
        ("lr", math.inf, "above 0"),
        ("momentum", 1.0, "below, 1"),
        ("weight_decay", -1e-4, "at least 0"),
        ("threshold_lr", -0.1, "at least 0"),
        ("milestones", (80, 40), "ascending"),
        ("milestones", (0,), "ascending"),
        ("reset_ratio", 1.5, "from 0 to 1, or none"),
        ("seed", -1, "at least 0 and at most 9223372036854775807"),
        ("seed", 2**63, "at least 0 and at most 9223372036854775807"),
        ("seed", 1.0, "at least 0 and at most 9223372036854775807"),
        ("validation", 0.0, "above 0 and below 1, or none"),
        ("validation", 1.0, "above 0 and below 1, or none"),
        ("workers", -1, "at least 0"),
        ("dense", "yes", "true or false"),
        ("model", "", "a name"),
    ],
)
def test_invalid_values_are_refused_by_name(field, value, accepted):
    with pytest.raises(UsageError) as caught:
        RunConfig(**{field: value})
    message = str(caught.value)
    assert f"--{field.replace('_', '-')}" in message
    assert repr(value) in message
    assert accepted in message


def test_boundaries_are_accepted():
    RunConfig(alpha=0, momentum=0, reset_ratio=None, threshold_lr=0.0, seed=2**63 - 1)
    RunConfig(reset_ratio=1, milestones=(1, 2), weight_decay=0)


def test_foreign_configurations_are_refused():
    values = RunConfig().to_dict()
    for wrong in ({**values, "extra": 1}, {}, [], {**values, "milestones": [3, 1]}):
        with pytest.raises(UsageError):
            RunConfig.from_dict(wrong)


def test_files_of_older_versions_go_on_layer_by_layer():
    config = RunConfig.from_preset("digits")
    old = {k: v for k, v in config.to_dict().items() if k not in ("layer_by_layer", "compile")}
    assert RunConfig.from_dict(old).execution == "layer by layer" != config.execution

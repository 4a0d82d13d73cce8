from __future__ import annotations

import pytest
import torch
from torch import nn

import dst_kernels
from dst_kernels.training.config import RunConfig
from dst_kernels.training.errors import UsageError
from dst_kernels.training.models import _dense_model, build_model, input_channels, load_model
from dst_kernels.training.results import weights_by_layer

RESNET_50 = ("resnet-50", "resnet50")


def thresholds_by_layer(model):
    return {name: part.threshold for name, part in weights_by_layer(model).items()}


@pytest.mark.parametrize(
    ("name", "weights", "thresholds"),
    [
        ("lenet-300-100", 266_200, 410),
        ("lenet-5", 430_500, 580),
        ("lstm-a", 210_944, 2_048),
        ("lstm-b", 815_104, 4_096),
    ],
)
def test_masked_weights_and_thresholds_are_as_many_as_the_papers(name, weights, thresholds):
    config = RunConfig(model=name, skip_last=name.startswith("lstm"))
    model = build_model(config, (1, 28, 28), 10)
    report = dst_kernels.sparsity_report(model)
    assert report.total == weights
    assert sum(t.numel() for t in thresholds_by_layer(model).values()) == thresholds
    assert report.remaining_ratio > 0.999  # training starts dense


@pytest.mark.parametrize(
    ("name", "weights", "thresholds"),
    [
        ("vgg-16", 14_977_728, 4_746),
        ("wrn-16-8", 10_954_160, 4_506),
        ("wrn-16-10", 17_107_632, 5_626),
        ("wrn-28-8", 23_340_464, 8_090),
        ("resnet-50", 25_502_912, 27_560),  # not in the paper: all but norms and a bias
    ],
)
def test_networks_for_colour_images_are_masked_as_the_papers(name, weights, thresholds):
    with torch.device("meta"):  # sizes are all that counts
        model = _dense_model(name, (3, 32, 32), 1000 if name == "resnet-50" else 10)
        dst_kernels.sparsify_(model, dst_kernels.SparsifyConfig.paper())
    of_layers = {key: p for key, p in model.named_parameters() if "threshold" in key}
    masked = [model.get_parameter(key.replace("threshold", "weight")) for key in of_layers]
    assert sum(weight.numel() for weight in masked) == weights
    assert sum(threshold.numel() for threshold in of_layers.values()) == thresholds


def test_resnet_50_is_torchvisions():
    assert (input_channels("resnet-50"), input_channels("vgg-16")) == (3, None)
    with torch.device("meta"):
        state, wanted = (_dense_model(n, (3, 224, 224), 7).state_dict() for n in RESNET_50)
    assert {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in wanted.items()}


@pytest.mark.parametrize("name", ["vgg-16", "wrn-16-8"])
def test_networks_start_as_the_papers(name):
    torch.manual_seed(0)
    model = _dense_model(name, (3, 32, 32), 10)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert (module.weight == (0.5 if name == "vgg-16" else 1)).all()
            assert (module.bias == 0).all()
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        # Kaiming uniform with a = sqrt(5) is U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).
        bound = module.weight[0].numel() ** -0.5
        assert 0.97 * bound < module.weight.abs().max() <= bound
        spread = bound / 3**0.5
        assert module.weight.std().item() == pytest.approx(spread, rel=0.1)
        assert (module.bias is None) == isinstance(module, nn.Conv2d)
        assert module.bias is None or module.bias.abs().max() <= bound


def test_vgg_16_has_13_convolutions_and_two_linear_layers():
    kinds = [type(module).__name__ for module in _dense_model("vgg-16", (3, 32, 32), 10)]
    convolution, pool = ["Conv2d", "BatchNorm2d", "ReLU"], ["MaxPool2d"]
    halves = 2 * (2 * convolution + pool) + 2 * (3 * convolution + pool) + 3 * convolution
    head = ["AvgPool2d", "Flatten", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert kinds == halves + head


@pytest.mark.parametrize(("name", "side"), [("vgg-16", 32), ("lenet-5", 16)])
def test_too_small_images_are_refused_with_what_is_needed(name, side):
    _dense_model(name, (3, side, side), 10)
    message = rf"'{name}' does not take the 3x{side}x{side - 1} .*: it needs {side}x{side} or more"
    with pytest.raises(UsageError, match=message):
        build_model(RunConfig(model=name), (3, side, side - 1), 10)


def test_dense_twin_starts_from_the_same_weights_and_has_no_thresholds():
    models = []
    for dense in (False, True):
        torch.manual_seed(7)
        models.append(build_model(RunConfig(model="lenet-5", dense=dense), (1, 28, 28), 10))
    sparse, dense = (dict(model.named_parameters()) for model in models)
    assert set(sparse) - set(dense) == {f"{n}.threshold" for n in ("conv1", "conv2", "fc3", "fc4")}
    for name, weight in dense.items():
        assert torch.equal(weight, sparse[name])


def test_an_lstm_reads_rows_from_top_to_bottom():
    model = build_model(RunConfig(model="lstm-a", dense=True), (3, 6, 4), 10).eval()
    images = torch.randn(2, 3, 6, 4)
    rows = images.permute(2, 0, 1, 3).flatten(2)  # height first, then all of a row's channels
    wanted = model.fc(model.lstm(rows.transpose(0, 1))[0][:, -1])
    torch.testing.assert_close(model(images), wanted)
    assert model.lstm.input_size == 12


def test_options_reach_the_masked_layers():
    config = RunConfig(
        granularity="layer", surrogate="triangular", reset_ratio=None, skip_first=True
    )
    model = build_model(config, (1, 28, 28), 10)
    assert set(thresholds_by_layer(model)) == {"fc2", "fc3"}
    assert all(t.numel() == 1 for t in thresholds_by_layer(model).values())
    assert model.fc2.surrogate == "triangular"
    assert model.fc2.reset_ratio is None
    skipped = build_model(RunConfig(skip_last=True), (1, 28, 28), 10)
    assert set(thresholds_by_layer(skipped)) == {"fc1", "fc2"}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 32),
        ("squeezenet1_1", 32),
        pytest.param("googlenet", 64, marks=pytest.mark.slow),
    ],
)
def test_torchvision_classifiers_train_masked(name, size):
    model = build_model(RunConfig(model=name), (3, size, size), 5)
    logits = model(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(t.grad is not None for t in thresholds_by_layer(model).values())


def test_building_leaves_running_statistics_alone():
    model = build_model(RunConfig(model="resnet18", dense=True), (3, 32, 32), 10)
    assert model.training
    assert model.bn1.num_batches_tracked == 0
    assert torch.equal(model.bn1.running_mean, torch.zeros(64))


@pytest.mark.parametrize("name", ["lenet-5", "alexnet", "vit_b_16"])
def test_images_which_a_model_cannot_take_are_refused(name):
    channels = 1 if name.startswith("lenet") else 3
    with pytest.raises(UsageError, match=rf"--model '{name}' does not take the {channels}x10x10"):
        build_model(RunConfig(model=name), (channels, 10, 10), 10)


def test_load_model_gives_back_what_was_trained(run_of):
    run = run_of("--epochs", 4)
    state = torch.get_rng_state()
    model = load_model(run)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    assert set(saved) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name])

"""`--init` with checkpoints of the authors' code: its networks are written out here."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dst_kernels
from dst_kernels.training.config import RunConfig
from dst_kernels.training.errors import UsageError
from dst_kernels.training.models import VGG, LeNet5, RowLSTM, WideResNet, build_model
from dst_kernels.training.weights import authors_layout, load_weights

LAYERS = (8, 0, 8, 0, 16, 0, 16, 0, 16)


class Checkpoint(dict):
    """The tensors of a network by the authors' names: made where they are first used, at random."""

    def tensor(self, name, *shape, low=-0.3, high=0.3):
        if name not in self:
            self[name] = torch.empty(shape).uniform_(low, high)
        return self[name].double()

    def masked(self, name, *shape):
        weight = self.tensor(f"{name}.weight", *shape)
        threshold = self.tensor(f"{name}.threshold", shape[0], low=0, high=0.1)
        return weight * (weight.abs() > threshold.view(-1, *[1] * (len(shape) - 1)))

    def conv(self, x, name, outputs, kernel=3, stride=1, bias=False):
        weight = self.masked(name, outputs, x.shape[1], kernel, kernel)
        bias = self.tensor(f"{name}.bias", outputs) if bias else None
        return F.conv2d(x, weight, bias, stride, padding=1 if kernel == 3 else 0)

    def linear(self, x, name, outputs):
        bias = self.tensor(f"{name}.bias", outputs)
        return F.linear(x, self.masked(name, outputs, x.shape[1]), bias)

    def norm(self, x, name):
        width = x.shape[1]
        self.setdefault(f"{name}.num_batches_tracked", torch.tensor(7))
        mean = self.tensor(f"{name}.running_mean", width)
        variance = self.tensor(f"{name}.running_var", width, low=0.5, high=2)
        weight = self.tensor(f"{name}.weight", width, low=0.5, high=2)
        bias = self.tensor(f"{name}.bias", width)
        return F.relu(F.batch_norm(x, mean, variance, weight, bias))


def lenet_5(file, x):
    x = F.max_pool2d(F.relu(file.conv(x, "conv1", 20, 5, bias=True)), 2)
    x = F.max_pool2d(F.relu(file.conv(x, "conv2", 50, 5, bias=True)), 2)
    return file.linear(F.relu(file.linear(x.flatten(1), "fc3", 500)), "fc4", 10)


def lstm(file, x, units=8):
    rows = x.transpose(1, 2).flatten(2)  # [N, height, channels * width]
    for layer in (1, 2):
        h = c = rows.new_zeros(len(x), units)
        outputs = []
        for row in rows.unbind(1):
            sums = {}
            for gate in "ifuo":
                cell = f"lstm{layer}.cell"
                total = file.tensor(f"{cell}.bias_{gate}", units)
                for source, vector in (("x", row), ("h", h)):
                    name = f"{cell}.weight_{source}{gate}", vector.shape[1], units
                    cut = f"{cell}.threshold_{source}{gate}", units
                    weight, threshold = file.tensor(*name), file.tensor(*cut, low=0, high=0.1)
                    total = total + vector @ (weight * (weight.abs() > threshold))
                sums[gate] = total
            c = sums["f"].sigmoid() * c + sums["i"].sigmoid() * sums["u"].tanh()
            h = sums["o"].sigmoid() * c.tanh()
            outputs.append(h)
        rows = torch.stack(outputs, 1)
    bias = file.tensor("fc.bias", 10)  # the last layer is dense
    return rows[:, -1] @ file.tensor("fc.weight", 10, units).T + bias


def vgg(file, x):
    index = 0
    for filters in LAYERS:
        if filters:
            x = file.norm(file.conv(x, f"feature.{index}", filters), f"feature.{index + 1}")
        else:
            x = F.max_pool2d(x, 2)
        index += 3 if filters else 1
    x = F.avg_pool2d(x, 2).flatten(1)
    return file.linear(
        file.norm(file.linear(x, "classifier.0", 16), "classifier.1"), "classifier.3", 10
    )


def wide_resnet(file, x, depth=16, width=2):
    x = file.conv(x, "conv1", 16)
    for group in (1, 2, 3):
        for layer in range((depth - 4) // 6):
            name, filters = f"block{group}.layer.{layer}", 16 * width * 2 ** (group - 1)
            stride = 2 if group > 1 and layer == 0 else 1
            active = file.norm(x, f"{name}.bn1")
            hidden = file.norm(
                file.conv(active, f"{name}.conv1", filters, stride=stride), f"{name}.bn2"
            )
            if layer == 0:
                x = file.conv(active, f"{name}.convShortcut", filters, 1, stride)
            x = x + file.conv(hidden, f"{name}.conv2", filters)
    return file.linear(file.norm(x, "bn1").mean((2, 3)), "fc", 10)


NETWORKS = {
    "lenet-5": (lenet_5, LeNet5, {}, (1, 28, 28)),
    "lstm": (lstm, RowLSTM, {"units": 8}, (1, 12, 9)),
    "vgg": (vgg, VGG, {"layers": LAYERS}, (3, 32, 32)),
    "wrn": (wide_resnet, WideResNet, {"depth": 16, "width": 2}, (3, 16, 16)),
}


def made(name, seed=0):
    """A checkpoint, a masked model of ours, images and what the authors' network says to them."""
    forward, kind, options, shape = NETWORKS[name]
    torch.manual_seed(seed)
    images, file = torch.rand(3, *shape), Checkpoint()
    wanted = forward(file, images.double())
    model = dst_kernels.sparsify_(
        kind(shape, 10, **options), filter_fn=lambda module, layer: (name, layer) != ("lstm", "fc")
    )
    return file, model.eval(), images, wanted


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("column", [False, True])
def test_outputs_are_those_of_the_authors_network(tmp_path, name, column):
    file, model, images, wanted = made(name)
    written = {
        key: value.unsqueeze(1) if column and "threshold" in key else value
        for key, value in file.items()
    }
    torch.save(written, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    load_weights(model, tmp_path / "model.pth")
    torch.testing.assert_close(model.double()(images.double()), wanted)
    assert 0.5 < dst_kernels.sparsity_report(model).remaining_ratio < 0.95


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_written_as_the_authors_and_read_again_is_the_same(tmp_path, name):
    file, model, images, _ = made(name)
    if name == "lstm":
        for layer in (0, 1):  # their cells have one bias
            nn.init.zeros_(getattr(model.lstm, f"bias_hh_l{layer}"))
    for threshold in (p for key, p in model.named_parameters() if "threshold" in key):
        nn.init.uniform_(threshold, 0, 0.05)
    written = {n: v.clone() for n, v in authors_layout(model, model.state_dict()).items()}
    assert {n: v.shape for n, v in written.items()} == {n: v.shape for n, v in file.items()}
    torch.save(written, tmp_path / "model.pth")
    other = made(name, seed=1)[1]
    load_weights(other, tmp_path / "model.pth")
    assert torch.equal(other(images), model(images))
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.pop("lstm2.cell.weight_ho"), "lacks 'lstm2.cell.weight_ho'"),
        (lambda v: v.update({"lstm3.cell.bias_i": torch.zeros(8)}), "has 'lstm3.cell.bias_i'"),
        (
            lambda v: v.update({"lstm1.cell.weight_xi": torch.zeros(8, 9)}),
            "has another shape of 'lstm1.cell.weight_xi'",
        ),
        (
            lambda v: v.update({"lstm1.cell.threshold_hu": torch.zeros(2, 4)}),
            "has another shape of 'lstm1.cell.threshold_hu'",
        ),
    ],
)
def test_errors_name_the_tensors_as_the_file_does(tmp_path, change, said):
    file, model, _, _ = made("lstm")
    change(file)
    torch.save(dict(file), tmp_path / "model.pth")
    with pytest.raises(UsageError, match=said):
        load_weights(model, tmp_path / "model.pth")


@pytest.mark.parametrize("options", [(), ("--dense",)])
def test_a_run_begins_with_an_authors_checkpoint(cli, tmp_path, options):
    torch.manual_seed(3)
    images, file = torch.rand(2, 1, 28, 28), Checkpoint()
    lstm(file, images.double(), units=128)
    torch.save(dict(file), tmp_path / "model.pth")
    recipe = (
        "--epochs",
        1,
        "--batch-size",
        1437,
        "--lr",
        1e-12,
        "--alpha",
        0,
        "--skip-last",
        *options,
    )
    result = cli("train", "--model", "lstm-a", *recipe, "--init", "model.pth", "--out", "run")
    assert result.exit_code == 0, result.output
    state = torch.load(tmp_path / "run" / "checkpoint.pt")["model"]
    config = RunConfig(model="lstm-a", dense=bool(options), skip_last=True)
    model = build_model(config, (1, 28, 28), 10).eval()
    model.load_state_dict(state)
    if options:
        file.update({key: value * 0 - 1 for key, value in file.items() if "threshold" in key})
    wanted = lstm(file, images.double(), units=128)
    torch.testing.assert_close(model.double()(images.double()), wanted, rtol=0, atol=1e-4)

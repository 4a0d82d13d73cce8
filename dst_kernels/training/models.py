"""Classifiers by name: the paper's LeNets and LSTMs, and every classifier of torchvision."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import RunConfig
from .errors import UsageError, require_one_of

__all__ = ["LeNet5", "LeNet300", "RowLSTM", "build_model", "input_channels", "load_model"]


class LeNet300(nn.Module):
    """LeNet-300-100: two hidden layers of 300 and 100 units."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.fc1 = nn.Linear(channels * height * width, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(images.flatten(1)))
        return self.fc3(F.relu(self.fc2(hidden)))


class LeNet5(nn.Module):
    """LeNet-5 in Caffe's form: 20 and 50 filters of 5x5, then 500 units."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        if min(height, width) < 16:
            raise ValueError("it needs 16x16 or more")
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        rows, columns = (((size - 4) // 2 - 4) // 2 for size in (height, width))
        self.fc3 = nn.Linear(50 * rows * columns, 500)
        self.fc4 = nn.Linear(500, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(F.relu(self.conv1(images)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)
        return self.fc4(F.relu(self.fc3(features.flatten(1))))


class RowLSTM(nn.Module):
    """Two LSTM layers that read an image row by row, and a linear layer on what is left at the end.

    The paper's LSTM-a has 128 units, LSTM-b 256.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, units: int) -> None:
        super().__init__()
        channels, _, width = shape
        self.lstm = nn.LSTM(channels * width, units, num_layers=2, batch_first=True)
        self.fc = nn.Linear(units, classes)

    def forward(self, images: Tensor) -> Tensor:
        output, _ = self.lstm(images.transpose(1, 2).flatten(2))
        return self.fc(output[:, -1])


_PAPERS = {
    "lenet-300-100": LeNet300,
    "lenet-5": LeNet5,
    "lstm-a": functools.partial(RowLSTM, units=128),
    "lstm-b": functools.partial(RowLSTM, units=256),
}


def input_channels(name: str) -> int | None:
    """The channels a model insists on, None where it takes any; UsageError for an unknown name."""
    if name in _PAPERS:
        return None
    import torchvision.models as zoo

    require_one_of(
        "--model",
        name,
        (*_PAPERS, *zoo.list_models(module=zoo)),
        note=f"{', '.join(_PAPERS)} or a name from torchvision.models.list_models(), "
        "such as resnet18 or vgg16_bn",
    )
    return 3


def build_model(config: RunConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The configured model, on the CPU, with fresh weights from torch's global generator.

    The dense twin gets the very weights which the sparse model starts from.
    """
    import dst_kernels

    input_channels(config.model)
    try:
        model = _dense_model(config.model, shape, classes)
        with torch.no_grad():  # in eval mode, which leaves running statistics alone
            logits = model.eval()(torch.zeros(2, *shape))
        if logits.shape != (2, classes):
            raise ValueError(f"its output has shape {list(logits.shape)}")
    except (RuntimeError, ValueError, AssertionError, AttributeError) as error:
        size = "x".join(map(str, shape))
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"--model {config.model!r} does not take the {size} images of {config.dataset}: "
            f"{reason}. Accepted: a classifier that fits their size."
        ) from error
    model.train()
    if config.dense:
        return model
    sparse = dst_kernels.SparsifyConfig(
        granularity=config.granularity,
        reset_ratio=config.reset_ratio,
        surrogate=config.surrogate,
        skip_first=config.skip_first,
        skip_last=config.skip_last,
    )
    return dst_kernels.sparsify_(model, sparse)


def _dense_model(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    if name in _PAPERS:
        return _PAPERS[name](shape, classes)
    import torchvision.models as zoo

    options: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}  # one output, like all the others
    elif name.startswith("vit_"):
        options = {"image_size": shape[1]}
    return zoo.get_model(name, weights=None, num_classes=classes, **options)


def load_model(directory: str | Path) -> nn.Module:
    """The trained model of a finished run directory, on the CPU in eval mode."""
    from safetensors.torch import load_file

    from .files import MODEL, read_config, read_summary

    directory = Path(directory)
    config, summary = read_config(directory), read_summary(directory)
    with torch.random.fork_rng(devices=[]):
        model = build_model(config, tuple(summary["input_shape"]), summary["classes"])
    model.load_state_dict(load_file(directory / MODEL))
    return model.eval()

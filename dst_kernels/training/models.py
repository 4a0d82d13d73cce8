"""Build models by name: the paper's networks, torchvision's classifiers, a language model.

The networks of this file take images [N, *shape] and return logits [N, classes].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import RunConfig
from .errors import UsageError, require_one_of
from .gpt import GPT
from .rivals import new_method


class LeNet300(nn.Module):
    """Build LeNet-300-100: two hidden layers of 300 and 100 units."""

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
    """Build LeNet-5 as in Caffe: 20 and 50 filters of 5x5, then 500 units."""

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
    """Build two LSTM layers that read an image row by row, and a linear layer on the last output.

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


_VGG_16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)


class VGG(nn.Sequential):
    """Build a VGG with batch norm for small images.

    `layers` has the filters of each convolution, and 0 for a pooling that halves the image. The
    default is VGG-16 for 32x32 images: 13 convolutions and two linear layers.
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, layers: tuple[int, ...] = _VGG_16
    ) -> None:
        inputs, *sides = shape
        halvings = layers.count(0) + 1
        if min(sides) < 2**halvings:
            raise ValueError(f"it needs {2**halvings}x{2**halvings} or more")
        features: list[nn.Module] = []
        for filters in layers:
            if not filters:
                features.append(nn.MaxPool2d(2))
                continue
            convolution = nn.Conv2d(inputs, filters, 3, padding=1, bias=False)
            features += [convolution, nn.BatchNorm2d(filters), nn.ReLU(inplace=True)]
            inputs = filters
        outputs = inputs * (sides[0] >> halvings) * (sides[1] >> halvings)
        hidden = nn.Linear(outputs, inputs), nn.BatchNorm1d(inputs), nn.ReLU(inplace=True)
        head = nn.AvgPool2d(2), nn.Flatten(), *hidden, nn.Linear(inputs, classes)
        super().__init__(*features, *head)
        for module in self:
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.constant_(module.weight, 0.5)


class WideBlock(nn.Module):
    """Apply batch norm, ReLU and a 3x3 convolution twice, and add the input.

    A 1x1 convolution adapts the input if the number of channels changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        active = F.relu(self.norm1(input), inplace=True)
        residual = input if self.shortcut is None else self.shortcut(active)
        hidden = F.relu(self.norm2(self.conv1(active)), inplace=True)
        return self.conv2(hidden) + residual


class WideResNet(nn.Sequential):
    """Build the wide ResNet for small images that is known as WRN-`depth`-`width`."""

    def __init__(
        self, shape: tuple[int, int, int], classes: int, depth: int = 28, width: int = 8
    ) -> None:
        blocks: list[nn.Module] = []
        inputs = 16
        for group, filters in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range((depth - 4) // 6):
                blocks.append(WideBlock(inputs, filters, 2 if group and not block else 1))
                inputs = filters
        stem = nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)
        norm = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)
        super().__init__(stem, *blocks, *norm, *head)


_OURS: dict[str, Callable[..., nn.Module]] = {
    "lenet-300-100": LeNet300,
    "lenet-5": LeNet5,
    "lstm-a": functools.partial(RowLSTM, units=128),
    "lstm-b": functools.partial(RowLSTM, units=256),
    "vgg-16": VGG,
    "wrn-16-8": functools.partial(WideResNet, depth=16),
    "wrn-16-10": functools.partial(WideResNet, depth=16, width=10),
    "wrn-28-8": WideResNet,
    "gpt-mini": GPT,
}
_TORCHVISIONS = {"resnet-50": "resnet50"}  # the paper's name of a network that torchvision has


def input_channels(name: str) -> int | None:
    """Return the number of channels a model needs, None if any; raise UsageError for its name."""
    if name in _OURS:
        return None
    import torchvision.models as zoo

    papers = (*_OURS, *_TORCHVISIONS)
    require_one_of(
        "--model",
        name,
        (*papers, *zoo.list_models(module=zoo)),
        note=f"{', '.join(papers)} or a name from torchvision.models.list_models(), such as "
        "resnet18 or vgg16_bn",
    )
    return 3


def build_model(config: RunConfig, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return the configured model on the CPU, with new weights from torch's global generator.

    The dense twin gets the same weights as the sparse model. Raises UsageError if the model does
    not exist or does not take images of this shape.
    """
    import dst_kernels

    input_channels(config.model)
    try:
        model = _dense_model(config.model, shape, classes)
        with torch.no_grad():  # in eval mode, which does not change running statistics
            logits = model.eval()(example_input(shape))
        if logits.shape != ((2, *shape, classes) if len(shape) == 1 else (2, classes)):
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


def example_input(shape: tuple[int, ...]) -> Tensor:
    """Return zeros in the place of two inputs: images of a shape [C, H, W], or ids of [context]."""
    return torch.zeros(2, *shape, dtype=torch.int64 if len(shape) == 1 else torch.float32)


def _dense_model(name: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    if name in _OURS:
        return _OURS[name](shape, classes)
    import torchvision.models as zoo

    options: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}  # a single output, as the others
    elif name.startswith("vit_"):
        options = {"image_size": shape[1]}
    name = _TORCHVISIONS.get(name, name)
    return zoo.get_model(name, weights=None, num_classes=classes, **options)


def load_model(directory: str | Path) -> nn.Module:
    """Return the trained model of a finished run directory, on the CPU in eval mode."""
    from safetensors.torch import load_file

    from .files import MODEL, read_config, read_summary

    directory = Path(directory)
    config, summary = read_config(directory), read_summary(directory)
    with torch.random.fork_rng(devices=[]):
        model = build_model(config, tuple(summary["input_shape"]), summary["classes"])
    if config.rival is not None:  # it may have added parameters
        new_method(config, model, torch.optim.SGD(model.parameters(), momentum=0.9), steps=1)
    model.load_state_dict(load_file(directory / MODEL))
    return model.eval()

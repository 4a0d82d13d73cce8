"""What is trained: networks in plain torch.nn with their random data, loss and optimizer.

The paper's are those of `dst_kernels.training`. torchvision is imported where one of its networks
is built, and has no stochastic depth here: each way of training must meet the same network.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dst_kernels.training.gpt import GPT
from dst_kernels.training.models import VGG, LeNet5, LeNet300, RowLSTM, WideResNet

from .cases import Mode, Shape

SGD, ADAMW = "sgd", "adamw"


def _gpt_2(vocabulary: int, context: int, width: int = 768, layers: int = 12, heads: int = 12):
    """Build GPT-2 without dropout; its head shares the embedding's weight and so stays dense."""
    network = GPT((context,), vocabulary, layers, width, heads)
    network.head = nn.Linear(width, vocabulary, bias=False)
    network.head.weight = network.tokens.weight
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    return network


_zoo = partial(importlib.import_module, "torchvision.models")


def _resnet_small() -> nn.Module:
    """Build a block of each width, each a quarter as wide outside and a sixteenth inside."""
    resnet = _zoo().resnet
    narrow = type("NarrowBottleneck", (resnet.Bottleneck,), {"expansion": 1})
    return resnet.ResNet(narrow, [1, 1, 1, 1], num_classes=10, width_per_group=4)


def _convnext_small() -> nn.Module:
    """Build blocks that count from the first step on."""
    convnext = _zoo().convnext
    blocks = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)]
    return convnext.ConvNeXt(blocks, layer_scale=1.0, num_classes=10)


def _vit(**sizes: int) -> nn.Module:
    """Build a vision transformer, ViT-B/16 without sizes."""
    zoo = _zoo()
    network = zoo.VisionTransformer(**sizes) if sizes else zoo.vit_b_16(weights=None)
    # torchvision starts it at zero, where a masked weight stays.
    nn.init.normal_(network.heads.head.weight, std=0.02)
    return network


def _for_cifar(network: nn.Module) -> nn.Module:
    """Give a ResNet the start for small images: a 3x3 convolution and no pooling."""
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return network


def _perceptron(*sizes: int) -> nn.Module:
    layers = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def image_layout(device: torch.device) -> torch.memory_format:
    """Return the layout of images and kernels with which torch is the fastest."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


# What draws a batch; `on` says where: generator and device.


def _images(shape: Shape, classes: int, batch: int, mode: Mode, **on) -> tuple[Tensor, Tensor]:
    images = torch.randn(batch, *shape, **on)
    images = images.to(mode.weight, memory_format=image_layout(images.device))
    return images, torch.randint(classes, (batch,), **on)


def _text(vocabulary: int, context: int, batch: int, mode: Mode, **on) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(vocabulary, (batch, context + 1), **on)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _activations(inputs: int, outputs: int, batch: int, mode: Mode, **on) -> tuple[Tensor, Tensor]:
    # In the compute dtype: a layer amid others gets what the product before it gave.
    input, grad = (torch.randn(batch, n, **on).to(mode.compute) for n in (inputs, outputs))
    return input.requires_grad_(), grad


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


@dataclass(frozen=True)
class Model:
    """What is trained, on what and by which rule.

    `network` draws fresh weights from torch's global generator. Without a `loss` the target is the
    gradient of the output, and the input wants one, as in a layer amid others.
    """

    network: Callable[[], nn.Module]
    data: Callable[..., tuple[Tensor, Tensor]]  # of a number of samples, a mode, and `on`
    optimizer: str = SGD
    small: str | None = None  # a model of the same kind in which the same code is verified
    loss: Callable[[Tensor, Tensor], Tensor] | None = _cross_entropy
    unit: str = "images"  # what throughput counts
    units: int = 1  # of a sample


def _papers(kind: type[nn.Module], shape: Shape, *rest, **sizes) -> Model:
    return Model(partial(kind, shape, 10, **sizes), partial(_images, shape, 10), *rest)


def _gpt(vocabulary: int, context: int, small: str | None = None, **size: int) -> Model:
    network, data = (
        partial(_gpt_2, vocabulary, context, **size),
        partial(_text, vocabulary, context),
    )
    return Model(network, data, ADAMW, small, unit="tokens", units=context)


def _layer(inputs: int, outputs: int, small: str | None = None) -> Model:
    network = lambda: nn.Sequential(nn.Linear(inputs, outputs))  # noqa: E731
    return Model(network, partial(_activations, inputs, outputs), ADAMW, small, None, "tokens")


_MNIST, _CIFAR, _TINY = (1, 28, 28), (3, 32, 32), (3, 16, 16)
_IMAGENET, _CIFAR_10 = partial(_images, (3, 224, 224), 1000), partial(_images, _CIFAR, 10)
_VIT_SMALL = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2}
_VIT_SMALL |= {"hidden_dim": 32, "mlp_dim": 64, "num_classes": 10}

MODELS = {
    "lenet-300-100": _papers(LeNet300, _MNIST),
    "lenet-5": _papers(LeNet5, _MNIST),
    "lstm-a": _papers(RowLSTM, _MNIST, ADAMW, "lstm-small", units=128),
    "vgg-16": _papers(VGG, _CIFAR, SGD, "vgg-small"),
    "wrn-28-8": _papers(WideResNet, _CIFAR, SGD, "wrn-small"),
    "mlp-4096": Model(
        partial(_perceptron, 1024, 4096, 4096, 1024),
        partial(_images, (1, 32, 32), 1024),
        SGD,
        "mlp",
    ),
    "resnet-18": Model(
        lambda: _for_cifar(_zoo().resnet18(num_classes=10)), _CIFAR_10, SGD, "resnet-18-small"
    ),
    "resnet-50": Model(lambda: _zoo().resnet50(weights=None), _IMAGENET, SGD, "resnet-small"),
    "convnext-t": Model(
        lambda: _zoo().convnext_tiny(weights=None, stochastic_depth_prob=0.0),
        *(_IMAGENET, ADAMW, "convnext-small"),
    ),
    "vit-b-16": Model(_vit, _IMAGENET, ADAMW, "vit-small"),
    "gpt": _gpt(50257, 1024, "gpt-small"),
    "linear-4096": _layer(4096, 4096, "linear-64"),
    "lstm-small": _papers(RowLSTM, (1, 5, 6), ADAMW, units=8),
    "vgg-small": _papers(VGG, _CIFAR, layers=(8, 0, 8, 0, 16, 0, 16, 0, 16)),
    "wrn-small": _papers(WideResNet, _TINY, depth=10, width=1),
    "mlp": Model(partial(_perceptron, 256, 96, 80, 48), partial(_images, (1, 16, 16), 48)),
    "resnet-18-small": Model(lambda: _for_cifar(_resnet_small()), _CIFAR_10),
    "resnet-small": Model(_resnet_small, _CIFAR_10),
    "convnext-small": Model(_convnext_small, _CIFAR_10, ADAMW),
    "vit-small": Model(partial(_vit, **_VIT_SMALL), partial(_images, _TINY, 10), ADAMW),
    "gpt-small": _gpt(61, 16, width=32, layers=2, heads=2),
    "linear-64": _layer(64, 48),
}
"""By the names that a `ModelCase` may have: first those for a GPU, then their small kin."""

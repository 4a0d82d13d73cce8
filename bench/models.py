"""Whole training problems, by name: network, random data, loss and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modes import Mode
from .networks import GPT, VGG, RowLSTM, WideResNet, lenet_5, lenet_300_100
from .torchvision_networks import (
    convnext_small,
    convnext_t,
    resnet_50,
    resnet_small,
    vit_b_16,
    vit_small,
)

__all__ = ["ADAMW", "MODELS", "SGD", "Loss", "Model"]

SGD, ADAMW = "sgd", "adamw"

Draw = Callable[[int, torch.Generator, Mode], tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Model:
    """What is trained.

    Args:
        network: builds it, with fresh weights from torch's global generator.
        data: draws a batch (input, target) for a number of samples on the generator's device.
        optimizer: SGD (with momentum) or ADAMW.
        loss: of output and target; None: the target is the gradient of the output, and the input
            wants one, as in a layer amid others.
        small: the name of a model of the same kind in which the same code is verified.
        unit: what throughput counts, and `units` how many of them a sample has.
    """

    network: Callable[[], nn.Module]
    data: Draw
    optimizer: str
    loss: Loss | None
    small: str
    unit: str = "images"
    units: int = 1


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def _images(*shape: int, classes: int = 10) -> Draw:
    def draw(batch: int, generator: torch.Generator, mode: Mode) -> tuple[Tensor, Tensor]:
        device = generator.device
        images = torch.randn(batch, *shape, generator=generator, device=device).to(mode.weight)
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(classes, (batch,), generator=generator, device=device)
        return images, labels

    return draw


def _text(vocabulary: int, context: int) -> Draw:
    def draw(batch: int, generator: torch.Generator, mode: Mode) -> tuple[Tensor, Tensor]:
        shape = (batch, context + 1)
        tokens = torch.randint(vocabulary, shape, generator=generator, device=generator.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return draw


def _activations(inputs: int, outputs: int) -> Draw:
    """In the compute dtype: a layer amid others gets what the product before it gave."""

    def draw(batch: int, generator: torch.Generator, mode: Mode) -> tuple[Tensor, Tensor]:
        device = generator.device
        input, grad = (
            torch.randn(batch, size, generator=generator, device=device).to(mode.compute)
            for size in (inputs, outputs)
        )
        return input.requires_grad_(), grad

    return draw


def _layer(inputs: int, outputs: int, small: str) -> Model:
    return Model(
        lambda: nn.Sequential(nn.Linear(inputs, outputs)),
        _activations(inputs, outputs),
        ADAMW,
        None,
        small,
        unit="tokens",
    )


def _classifier(
    network: Callable[[], nn.Module], data: Draw, small: str, optimizer: str = SGD
) -> Model:
    return Model(network, data, optimizer, _cross_entropy, small)


def _gpt(vocabulary: int, context: int, small: str, **size: int) -> Model:
    return Model(
        lambda: GPT(vocabulary, context, **size),
        _text(vocabulary, context),
        ADAMW,
        _cross_entropy,
        small,
        unit="tokens",
        units=context,
    )


_IMAGENET = _images(3, 224, 224, classes=1000)
_CIFAR = _images(3, 32, 32)

MODELS = {
    "lenet-300-100": _classifier(lenet_300_100, _images(784), "lenet-300-100"),
    "lenet-5": _classifier(lenet_5, _images(1, 28, 28), "lenet-5"),
    "lstm-a": _classifier(RowLSTM, _images(28, 28), "lstm-small", ADAMW),
    "vgg-16": _classifier(VGG, _CIFAR, "vgg-small"),
    "wrn-28-8": _classifier(WideResNet, _CIFAR, "wrn-small"),
    "resnet-50": _classifier(resnet_50, _IMAGENET, "resnet-small"),
    "convnext-t": _classifier(convnext_t, _IMAGENET, "convnext-small", ADAMW),
    "vit-b-16": _classifier(vit_b_16, _IMAGENET, "vit-small", ADAMW),
    "gpt": _gpt(50257, 1024, "gpt-small"),
    "linear-4096": _layer(4096, 4096, "linear-64"),
    "vgg-small": _classifier(
        lambda: VGG((8, None, 8, None, 16, None, 16, None, 16)), _CIFAR, "vgg-small"
    ),
    "lstm-small": _classifier(lambda: RowLSTM(6, 8), _images(5, 6), "lstm-small", ADAMW),
    "wrn-small": _classifier(lambda: WideResNet(10, 1), _images(3, 16, 16), "wrn-small"),
    "resnet-small": _classifier(resnet_small, _CIFAR, "resnet-small"),
    "convnext-small": _classifier(convnext_small, _CIFAR, "convnext-small", ADAMW),
    "vit-small": _classifier(vit_small, _images(3, 16, 16), "vit-small", ADAMW),
    "gpt-small": _gpt(61, 16, "gpt-small", width=32, layers=2, heads=2),
    "linear-64": _layer(64, 48, "linear-64"),
}

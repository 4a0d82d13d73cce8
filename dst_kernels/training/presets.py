"""Define the presets: recipes by name, as values of a run's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# The preset of each data set, if none is given. An alpha that suits 23 steps per epoch would prune
# nearly everything in a run of 938 steps per epoch.
DATASET_PRESETS = {
    "digits": "digits",
    "mnist": "mnist",
    "fashion-mnist": "mnist",
    "cifar10": "cifar10",
    "cifar100": "cifar10",
    "image-folder": "imagenet",
    "text": "text",
}


class Preset(NamedTuple):
    """Hold a recipe's description, and the fields in which it differs from the defaults."""

    description: str
    values: Mapping[str, Any]


# Its last layer is dense, as in the paper.
_LSTM = {
    "dataset": "mnist",
    "optimizer": "adam",
    "lr": 1e-3,
    "batch_size": 100,
    "alpha": 1e-3,
    "epochs": 20,
    "skip_last": True,
}
_CIFAR = {
    "dataset": "cifar10",
    "alpha": 5e-6,
    "epochs": 160,
    "lr": 0.1,
    "milestones": (80, 120),
    "weight_decay": 1e-4,
    "threshold_weight_decay": 1e-4,
    "threads": 0,
}

PRESETS: dict[str, Preset] = {
    "digits": Preset("LeNet-300-100 on scikit-learn's digits; no download, seconds on a CPU", {}),
    "mnist": Preset(
        "the paper's LeNet-300-100 on MNIST, 20 epochs",
        {"dataset": "mnist", "alpha": 5e-4, "epochs": 20},
    ),
    "mnist-lenet-5": Preset(
        "the paper's LeNet-5-Caffe on MNIST, 20 epochs",
        {"dataset": "mnist", "model": "lenet-5", "alpha": 5e-4, "epochs": 20},
    ),
    "mnist-lstm-a": Preset(
        "the paper's LSTM-a on MNIST, an image row at a time, 20 epochs",
        {**_LSTM, "model": "lstm-a"},
    ),
    "mnist-lstm-b": Preset("the same with LSTM-b", {**_LSTM, "model": "lstm-b"}),
    "cifar10": Preset("the paper's VGG-16 on CIFAR-10, 160 epochs", {**_CIFAR, "model": "vgg-16"}),
    "cifar10-vgg-16": Preset("the same as cifar10", {**_CIFAR, "model": "vgg-16"}),
    **{
        f"cifar10-{model}": Preset(f"the same with {model.upper()}", {**_CIFAR, "model": model})
        for model in ("wrn-16-8", "wrn-16-10", "wrn-28-8")
    },
    # The paper has figures of ResNet-50, but not how they came about.
    "imagenet": Preset(
        "ResNet-50 on an image folder such as ImageNet, 90 epochs; the usual recipe, not the "
        "paper's, which is not published (nor its alpha); --lr is for batches of 256",
        {
            "dataset": "image-folder",
            "model": "resnet-50",
            "alpha": 5e-6,
            "epochs": 90,
            "batch_size": 256,
            "lr": 0.1,
            "milestones": (30, 60, 80),
            "weight_decay": 1e-4,
            "threshold_weight_decay": 1e-4,
            "threads": 0,
        },
    ),
    "text": Preset(
        "a small GPT on the characters of a text file, which --data-dir names",
        {
            "dataset": "text",
            "model": "gpt-mini",
            "optimizer": "adam",
            "lr": 1e-3,
            "batch_size": 16,
            "alpha": 4e-5,
            "epochs": 2,
            "threads": 0,
        },
    ),
}

"""Networks of torchvision, which is imported where one is built.

Without stochastic depth: each way of training must meet the same network in every step.
"""

from __future__ import annotations

from types import ModuleType

from torch import nn

__all__ = [
    "convnext_small",
    "convnext_t",
    "resnet_50",
    "resnet_small",
    "vit_b_16",
    "vit_small",
]


def _zoo() -> ModuleType:
    try:
        from torchvision import models
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this network is torchvision's, which is not installed here. "
            "Install the bench extra: pip install -e '.[bench]'"
        ) from error
    return models


def resnet_50() -> nn.Module:
    return _zoo().resnet50(weights=None)


def resnet_small() -> nn.Module:
    """A block of each width, each a quarter as wide outside and a sixteenth inside."""
    resnet = _zoo().resnet
    narrow = type("NarrowBottleneck", (resnet.Bottleneck,), {"expansion": 1})
    return resnet.ResNet(narrow, [1, 1, 1, 1], num_classes=10, width_per_group=4)


def convnext_t() -> nn.Module:
    return _zoo().convnext_tiny(weights=None, stochastic_depth_prob=0.0)


def convnext_small() -> nn.Module:
    """With blocks that count from the first step on."""
    convnext = _zoo().convnext
    blocks = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)]
    return convnext.ConvNeXt(blocks, layer_scale=1.0, num_classes=10)


def vit_b_16() -> nn.Module:
    return _with_random_head(_zoo().vit_b_16(weights=None))


def vit_small() -> nn.Module:
    return _with_random_head(
        _zoo().VisionTransformer(
            image_size=16,
            patch_size=4,
            num_layers=2,
            num_heads=2,
            hidden_dim=32,
            mlp_dim=64,
            num_classes=10,
        )
    )


def _with_random_head(vit: nn.Module) -> nn.Module:
    """torchvision starts it at zero, where a masked weight stays."""
    nn.init.normal_(vit.heads.head.weight, std=0.02)
    return vit

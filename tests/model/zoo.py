"""Small versions of other people's models, and helpers to prune them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dst_kernels.nn import MaskedLayer
from dst_kernels.nn.find import named_masked_weights
from dst_kernels.nn.weight import MaskedWeight


@dataclasses.dataclass(frozen=True)
class Example:
    """How to build a model, an input for it, and how many layers conversion masks."""

    name: str
    build: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    masked: int
    exact: bool = True  # masked and dense layers call the same kernel, so outputs are bit-equal


def resnet18() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet18(num_classes=10)


def mobilenet_v3_small() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.mobilenet_v3_small(num_classes=10, dropout=0.0)


def mobilenet_v3_start() -> nn.Module:
    """Its first four blocks, with every kind of layer that the others have: quicker to compile."""
    mobilenetv3 = pytest.importorskip("torchvision.models.mobilenetv3")
    blocks, _ = mobilenetv3._mobilenet_v3_conf("mobilenet_v3_small")
    return mobilenetv3.MobileNetV3(blocks[:4], last_channel=64, num_classes=10, dropout=0.0)


def torchvision_vit() -> nn.Module:
    vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")
    model = vision_transformer.VisionTransformer(
        image_size=16,
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=10,
    )
    nn.init.normal_(model.heads.head.weight, std=0.1)  # starts at 0 by default
    return model


def timm_convnext() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "convnext_atto", num_classes=10, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)
    )


def short_resnet50() -> nn.Module:
    """One block where ResNet-50 has three to six of the same."""
    resnet = pytest.importorskip("torchvision.models.resnet")
    return resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1], num_classes=10)


def small_convnext() -> nn.Module:
    """ConvNeXt with narrow stages."""
    convnext = pytest.importorskip("torchvision.models.convnext")
    sizes = [(16, 32, 1), (32, 48, 1), (48, 64, 2), (64, None, 1)]
    stages = [convnext.CNBlockConfig(*each) for each in sizes]
    return convnext.ConvNeXt(stages, stochastic_depth_prob=0.0, num_classes=10)


class UNet(nn.Module):
    """Convolutions on the way down, transposed ones on the way up, skips between.

    `width` and twice as many channels; any image sides that are multiples of 4.
    """

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        wide = 2 * width
        self.start = nn.Conv2d(3, width, 3, padding=1, padding_mode="reflect")
        self.down1 = nn.Conv2d(width, wide, 3, stride=2, padding=1, bias=False)
        self.down2 = nn.Conv2d(wide, wide, 3, stride=2, padding=1, groups=2)
        self.up2 = nn.ConvTranspose2d(wide, wide, 3, 2, padding=1, output_padding=1, groups=2)
        self.up1 = nn.ConvTranspose2d(2 * wide, width, 2, stride=2)
        self.end = nn.Conv2d(2 * width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        first = self.start(image).relu()
        second = self.down1(first).relu()
        up = self.up2(self.down2(second).relu()).relu()
        up = self.up1(torch.cat([up, second], 1)).relu()
        return self.end(torch.cat([up, first], 1))


class Gpt2(nn.Module):
    """A random tiny GPT-2 that returns logits."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=16,
            vocab_size=50,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        self.model = transformers.GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


def image(size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))


EXAMPLES = {
    "resnet18": Example("resnet18", resnet18, image(32), 21),
    "torchvision_vit": Example("torchvision_vit", torchvision_vit, image(16), 10),
    "mobilenet_v3_small": Example("mobilenet_v3_small", mobilenet_v3_small, image(32), 54),
    "timm_convnext": Example("timm_convnext", timm_convnext, image(32), 20),
    "gpt2": Example("gpt2", Gpt2, tokens, 8, exact=False),
}


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, MaskedLayer)}


def masked_weights(model: nn.Module) -> dict[str, MaskedWeight]:
    return dict(named_masked_weights(model))


@torch.no_grad()
def prune_half(model: nn.Module) -> None:
    """Every row's threshold to the median of its weights' magnitudes."""
    for part in masked_weights(model).values():
        rows, _ = part.gathered()
        median, threshold = rows.abs().flatten(1).median(1).values, part.threshold
        fits = threshold.numel() == median.numel()
        threshold.copy_(median.view(threshold.shape) if fits else median.mean())


@torch.no_grad()
def settle(model: nn.Module, input: Tensor, batches: int = 3) -> nn.Module:
    """Give normalisation layers running statistics that are not their initial ones."""
    model.train()
    for _ in range(batches):
        model(input)
    return model.eval()


@torch.no_grad()
def prune_below(model: nn.Module, quantile: float) -> nn.Module:
    """Prune this share of each layer, after its rows got other sizes, so that some go whole."""
    for part in masked_weights(model).values():
        size = torch.randn(part.weight.shape[:1], generator=torch.Generator().manual_seed(2)).exp()
        part.weight.mul_(size.view(-1, *[1] * (part.weight.dim() - 1)))
        part.threshold.fill_(part.weight.abs().double().quantile(quantile))
    return model


def outputs(model: nn.Module, *input: Tensor) -> list[Tensor]:
    """All tensors in what the model returns."""
    with torch.no_grad():
        output = model(*input)
    return [each for each in torch.utils._pytree.tree_leaves(output) if torch.is_tensor(each)]

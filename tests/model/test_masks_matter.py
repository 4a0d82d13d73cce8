"""No masked layer is ignored: with all of its weights pruned, the model's output changes.

Some modules read the weights of their children instead of calling them. A masked child there would
look pruned in every report and compute densely, so conversion has to leave it dense.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from zoo import EXAMPLES, masked_weights, settle

import dst_kernels

CONFIG = dst_kernels.SparsifyConfig(reset_ratio=None)


def image(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def torchvision_swin(version):
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    block, merge = {
        1: (swin.SwinTransformerBlock, swin.PatchMerging),
        2: (swin.SwinTransformerBlockV2, swin.PatchMergingV2),
    }[version]
    model = swin.SwinTransformer(
        [2, 2], 8, [2, 2], [2, 2], [2, 2], num_classes=4, block=block, downsample_layer=merge
    )
    return model, image(2, 3, 16, 16)


def torchvision_video_swin():
    swin = pytest.importorskip("torchvision.models.video.swin_transformer")
    model = swin.SwinTransformer3d([2, 2, 2], 8, [2], [2], [2, 2, 2], num_classes=4)
    return model, image(1, 3, 4, 8, 8)


def timm_model(name, size=32, **options):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=4, **options), image(2, 3, size, size)


def transformers_model(config_name, model_name, input, **options):
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**options))
    model.pooler = None  # its output is not looked at
    return FirstOutput(model), input


class FirstOutput(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input):
        return self.model(input)[0]


SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SMALL_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TOKENS = torch.arange(12).reshape(2, 6)
MODELS = {
    "torchvision_swin": functools.partial(torchvision_swin, 1),
    "torchvision_swin_v2": functools.partial(torchvision_swin, 2),
    "torchvision_video_swin": torchvision_video_swin,
    "timm_vit": functools.partial(timm_model, "vit_tiny_patch16_224", **SMALL_VIT),
    "timm_beit": functools.partial(timm_model, "beit_base_patch16_224", **SMALL_VIT),
    "timm_eva": functools.partial(timm_model, "eva02_tiny_patch14_224", **SMALL_VIT),
    "timm_swin_v2": functools.partial(
        timm_model,
        "swinv2_tiny_window8_256",
        img_size=32,
        window_size=4,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(2, 2),
    ),
    "timm_naflexvit": functools.partial(
        timm_model, "naflexvit_base_patch16_gap", embed_dim=16, depth=1, num_heads=2
    ),
    "timm_mobilevit_v2": functools.partial(timm_model, "mobilevitv2_050"),
    "transformers_bert": functools.partial(
        transformers_model, "BertConfig", "BertModel", TOKENS, vocab_size=50, **SMALL_BERT
    ),
    "transformers_wavlm": functools.partial(
        transformers_model,
        "WavLMConfig",
        "WavLMModel",
        image(1, 800),
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        layerdrop=0.0,
        **SMALL_BERT,
    ),
    "transformers_mamba2": functools.partial(
        transformers_model,
        "Mamba2Config",
        "Mamba2Model",
        TOKENS,
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        state_size=4,
        num_heads=4,
        head_dim=8,
        n_groups=1,
        chunk_size=4,
    ),
    **{
        name: lambda example=example: (example.build(), example.input())
        for name, example in EXAMPLES.items()
        if name != "resnet18"
    },
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_every_mask_matters(build):
    torch.manual_seed(0)
    model, input = build()
    for parameter in model.parameters():
        if parameter.dim() < 2:  # zero biases, and scales at 0 that would hide a whole branch
            parameter.add_(0.2 + 0.1 * torch.randn_like(parameter))
    settle(model, input, 1)

    def output(training):
        torch.manual_seed(3)  # dropout and stochastic depth
        return model.train(training)(input)

    # Training changes the statistics that evaluation uses, so it comes first here, last below.
    dense = {training: output(training) for training in (True, False)}
    dst_kernels.sparsify_(model, CONFIG)
    weights = masked_weights(model)
    assert weights
    for training in (False, True):
        unpruned = output(training)
        torch.testing.assert_close(unpruned, dense[training], rtol=1e-4, atol=1e-5)
        ignored = []
        for name, part in weights.items():
            part.threshold.fill_(1e9)
            if torch.equal(output(training), unpruned):
                ignored.append(name)
            part.threshold.zero_()
        assert not ignored, training

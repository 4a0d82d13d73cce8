"""Parameters that no layer of ours holds: masked where their module's forward reads them."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from zoo import masked_weights, prune_half

import dst_kernels
from dst_kernels import mask_parameter_, optim

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
TRANSFORMERS = {
    "MixtralForCausalLM": {**SMALL, "num_local_experts": 4},
    "Qwen2MoeForCausalLM": {
        **SMALL, **EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 48
    },
    "DeepseekV3ForCausalLM": {
        **SMALL, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "qk_nope_head_dim": 8,
    },
    "OlmoeForCausalLM": {**SMALL, **EXPERTS},
    "GraniteMoeForCausalLM": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "JambaForCausalLM": {
        **SMALL, **EXPERTS, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    "MambaForCausalLM": {
        "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 64
    },
    "Mamba2ForCausalLM": {
        "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 64,
        "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8,
    },
    "WavLMModel": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "conv_dim": (16, 16), "conv_stride": (5, 2),
        "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
        "apply_spec_augment": False, "layerdrop": 0.0, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
    },
    "BeitForImageClassification": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "image_size": 32, "patch_size": 8,
    },
}  # fmt: skip
# Tables that are looked up, not multiplied with, and what is smaller than a row.
TABLES = ("embed", "A_log", "bias_table", "token", "pos", "gru_rel")


def transformers_model(name: str):
    cls = getattr(pytest.importorskip("transformers"), name)
    model = cls(cls.config_class(**TRANSFORMERS[name]))
    for key, parameter in model.named_parameters():
        if "experts" in key or "router" in key or key.endswith("gate.weight"):
            nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(0, 64, (2, 24))
    given = {
        "WavLMModel": torch.randn(2, 400),
        "BeitForImageClassification": torch.randn(2, 3, 32, 32),
    }
    return model, (given.get(name, tokens),)


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 32),)


def transformer():
    model = nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=True)
    return model, (torch.randn(2, 5, 32), torch.randn(2, 4, 32))


def attention_of_other_sizes():
    model = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    return model, (torch.randn(2, 5, 8), torch.randn(2, 4, 6), torch.randn(2, 4, 4))


def small_ones():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.ModuleList([nn.LSTMCell(4, 5), nn.GRUCell(5, 5), nn.RNNCell(5, 5)])
            self.bilinear = nn.Bilinear(5, 5, 6)
            self.normed = parametrizations.weight_norm(nn.Linear(6, 6))
            self.spectral = parametrizations.spectral_norm(nn.Conv1d(6, 6, 1))

        def forward(self, x):
            hidden = self.cells[0](x)[0]
            hidden = self.cells[2](self.cells[1](hidden))
            return self.spectral(self.normed(self.bilinear(hidden, hidden))[..., None])

    return Model(), (torch.randn(3, 4),)


MODELS = {
    **{name: functools.partial(transformers_model, name) for name in TRANSFORMERS},
    "encoder": encoder,
    "transformer": transformer,
    "attention": attention_of_other_sizes,
    "small": small_ones,
}
FAST = ("MixtralForCausalLM", "encoder", "attention", "small")
every_model = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in MODELS]
)


def output_of(model, inputs):
    torch.manual_seed(1)
    output = model(*inputs)
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def in_every_way(model, inputs):
    """Outputs in training and in evaluation, with and without gradients."""
    outputs = [output_of(model.train(), inputs), output_of(model.eval(), inputs)]
    with torch.no_grad():
        return [each.detach() for each in (*outputs, output_of(model, inputs))]


@every_model
def test_all_that_multiplies_is_masked_and_trains(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    dense, keys = in_every_way(model, inputs), set(model.state_dict())
    dst_kernels.sparsify_(model)
    weights = masked_weights(model)
    masked = {id(part.weight) for part in weights.values()}
    left = {
        key: parameter.numel()
        for key, parameter in model.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in masked and "threshold" not in key
        and "parametrizations" not in key and not any(table in key for table in TABLES)
    }  # fmt: skip
    total = sum(part.weight.numel() for part in weights.values())
    assert sum(left.values()) <= 0.01 * total, left
    assert keys <= set(model.state_dict()), "a dense checkpoint's keys stay"
    for ours, theirs in zip(in_every_way(model, inputs), dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    prune_half(model)
    loss = output_of(model.train(), inputs).square().mean()
    (loss + 1e-3 * dst_kernels.sparse_regularization(model)).backward()
    for key, part in weights.items():
        assert part.threshold.grad.isfinite().all() and part.threshold.grad.any(), key
    by_hand = dst_kernels.finalize_(copy.deepcopy(model))
    assert not any("threshold" in key for key in by_hand.state_dict())
    for ours, theirs in zip(
        in_every_way(model, inputs), in_every_way(by_hand, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    dst_kernels.densify_(model)
    for ours, theirs in zip(in_every_way(model, inputs), dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Experts(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = order
        self.matrices = nn.Parameter(torch.randn(*((3, 4, 5) if order == "out, in" else (3, 5, 4))))
        self.reads = 0

    def forward(self, x):
        first, second = self.matrices, self.matrices
        assert first is second, "masked once per forward"
        formula = "bi,eoi->beo" if self.order == "out, in" else "bi,eio->beo"
        return torch.einsum(formula, x, first)


@pytest.mark.parametrize("order", ["out, in", "in, out"])
@pytest.mark.parametrize("granularity", ["row", "layer", "element"])
def test_experts_have_thresholds_and_guards_of_their_own(order, granularity):
    torch.manual_seed(0)
    model = Experts(order).double()
    assert mask_parameter_(model, "matrices", experts=order, granularity=granularity) is model
    shape = {"row": (3, 4), "layer": (3,), "element": model.matrices.shape}[granularity]
    assert model.threshold_matrices.shape == shape
    with torch.no_grad():
        model.threshold_matrices.uniform_(0.3, 0.6)
        model.threshold_matrices[1] = 9.0  # collapses, and alone
    x = torch.randn(2, 5, dtype=torch.float64)
    rows = model.matrices.detach() if order == "out, in" else model.matrices.detach().mT
    limits = model.threshold_matrices.detach().clone()
    limits[1] = 0
    if granularity == "element":
        limits = limits if order == "out, in" else limits.mT
    else:
        limits = limits.view(3, -1, 1)
    expected = torch.einsum("bi,eoi->beo", x, rows * (rows.abs() > limits))
    output = model(x)
    torch.testing.assert_close(output, expected)
    assert not model.threshold_matrices[1].any(), "a training forward commits the reset"
    output.square().sum().backward()
    assert model.threshold_matrices.grad.shape == shape
    assert 0 < dst_kernels.remaining_ratio(model) < 1
    torch.testing.assert_close(dst_kernels.finalize_(model)(x), expected)


def test_copies_compiled_steps_and_optimizers():
    torch.manual_seed(0)
    model = mask_parameter_(Experts("out, in"), "matrices", experts="out, in")
    nn.init.constant_(model.threshold_matrices, 0.3)
    x = torch.randn(2, 5)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(twin(x), expected)
        assert twin.matrices is not model.matrices
    twins = model, copy.deepcopy(model)
    first = torch.optim.SGD(dst_kernels.parameter_groups(twins[0]), lr=0.1)
    other = optim.DSTSGD(nn.Sequential(twins[1], dst_kernels.nn.MaskedLinear(4, 4)), lr=0.1)
    for _ in range(3):
        for each, optimizer in zip(twins, (first, other), strict=True):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(twins[0].state_dict(), twins[1].state_dict())


@pytest.mark.slow
def test_a_compiled_step():
    model, (x,) = encoder()
    dst_kernels.sparsify_(model)
    prune_half(model)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for each in (model, compiled):
        each(x).square().sum().backward()
    for (key, ours), theirs in zip(twin.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=key)


def test_a_second_parameter_of_one_module():
    cell = mask_parameter_(nn.GRUCell(3, 4), "weight_ih", matrices=3, reset_ratio=None)
    nn.init.constant_(cell.threshold_weight_ih, 0.2)
    mask_parameter_(cell, "weight_hh", matrices=3)
    assert cell.masking.reset_ratio is None and cell.threshold_weight_ih.min() == 0.2
    assert [*masked_weights(cell)] == ["weight_ih", "weight_hh"]
    assert type(dst_kernels.densify_(cell)) is nn.GRUCell


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((None, "weight"), {}, TypeError, "module must be a torch.nn.Module"),
        ((nn.Bilinear(2, 3, 4), "wait"), {}, ValueError, "name must be .*weight, bias"),
        ((nn.Bilinear(2, 3, 4), "bias"), {}, ValueError, "at least 2 dimensions"),
        ((nn.Bilinear(2, 3, 4), "weight"), {"experts": "rows"}, ValueError, "experts must be"),
        ((nn.Embedding(2, 3), "weight"), {"experts": "out, in"}, ValueError, "three dimensions"),
        (
            (nn.GRUCell(2, 3), "weight_ih"),
            {"matrices": 2},
            ValueError,
            "matrices must divide the 9",
        ),
        ((nn.GRUCell(2, 3), "weight_ih"), {"surrogate": "no"}, ValueError, "surrogate must be"),
        ((dst_kernels.nn.MaskedLinear(2, 3), "weight"), {}, ValueError, "masked already"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        mask_parameter_(*arguments, **options)

"""`finalize_` with sparse formats, and all formats on other people's models."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from torch import nn
from zoo import EXAMPLES, outputs, prune_below, settle, short_resnet50

from dst_kernels import finalize_, sparsify_
from dst_kernels.backends import unavailable
from dst_kernels.nn import SparseConv1d, SparseConv2d, SparseLinear
from dst_kernels.nn.sparse import SparseLayer


def sparse_names(model):
    return {name for name, m in model.named_modules() if isinstance(m, SparseLayer)}


class Own(nn.Linear):
    pass


def every_kind():
    """Layers of every kind, pruned: names 0, 2, 4 and 5 have a sparse form."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, groups=2, stride=2),
        nn.Flatten(2),
        nn.Conv1d(4, 6, 2),
        nn.Linear(8, 8, bias=False),
        nn.Linear(8, 8),
        nn.Linear(8, 8),
        Own(8, 8),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.LSTM(8, 8),
    ).double()
    model[7].weight = model[6].weight
    return prune_below(sparsify_(model.eval()), 0.7), torch.randn(2, 3, 7, 7).double()


@pytest.mark.parametrize("example", [False, True])
def test_csr_makes_masked_layers_sparse_in_place(example, caplog):
    model, input = every_kind()
    expected, layers, seen = outputs(model, input), list(model), []
    model[5].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    with caplog.at_level(logging.INFO, "dst_kernels"):
        assert finalize_(model, "csr", input if example else None) is model
    assert all(new is old for new, old in zip(model, layers, strict=True))
    assert sparse_names(model) == {"0", "2", "4", "5", "9.linear1", "9.linear2"}
    kinds = [type(model[i]) for i in (0, 2, 4, 5, 6, 8)]
    assert kinds == [SparseConv2d, SparseConv2d, SparseConv1d, SparseLinear, nn.Linear, Own]
    torch.testing.assert_close(outputs(model, input), expected, rtol=1e-12, atol=1e-12)
    assert seen[-1] is SparseLinear and model[6].weight is model[7].weight
    kept = len(model[0].values)
    assert f"0: SparseConv2d, {kept} of 216 weights" in caplog.text
    assert sorted(dict(model[5].named_buffers())) == ["columns", "row_starts", "values"]
    assert finalize_(model, "csr") is model and len(sparse_names(model)) == 6


def test_auto_compacts_and_then_takes_what_wins(monkeypatch):
    asked = []

    def wins(*question):
        asked.append(question)
        return len(asked) == 2

    monkeypatch.setattr("dst_kernels.model._sparse_layers.wins", wins)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[2].weight[0] = 0
    small = copy.deepcopy(model)
    input = torch.randn(5, 4)
    finalize_(sparsify_(small), "auto", input)
    cpu, dtype = torch.device("cpu"), torch.float32
    sizes = (4, 4, 16), (3, 4, 8)
    assert asked == [(*each, cpu, dtype, "linear", None) for each in sizes]
    assert [type(small[0]), type(small[2])] == [nn.Linear, SparseLinear]
    torch.testing.assert_close(small(input), model(input))
    finalize_(sparsify_(model), "auto")
    assert [type(each) for each in model] == [nn.Linear, nn.ReLU, nn.Linear], "nothing won"


@pytest.mark.parametrize(("side", "batched"), [(4, True), (4, False), (8, True)])
def test_convolutions_of_few_positions_stay_dense(side, batched):
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 1)).eval()
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight *= torch.rand_like(layer.weight) < 0.03
    input = torch.randn(*[1] * batched, 64, side, side)
    finalize_(sparsify_(model), "auto", input)
    library = unavailable("cpu") is None
    assert isinstance(model[0], SparseConv2d) == (side == 8 and library)


def test_a_failed_check_leaves_no_sparse_layer():
    model, input = every_kind()
    dense = finalize_(copy.deepcopy(model))
    model.append(nn.Dropout().eval())
    model[-1].forward = lambda x: tuple(each + torch.rand(1) for each in x[:1])
    with pytest.raises(RuntimeError, match=r"format 'csr' an output .* is the model random"):
        finalize_(model, "csr", input)
    del model[-1]
    assert repr(model) == repr(dense) and torch.equal(model(input)[0], dense(input)[0])


def test_models_may_ask_for_dtype_and_shape_of_a_sparse_weight():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 3)

        def forward(self, x):
            return self.proj(x.to(self.proj.weight.dtype)[..., : self.proj.weight.shape[1]])

    model, input = Asks().eval(), torch.randn(2, 6).double()
    expected = model(input)
    sparse = finalize_(sparsify_(model), "csr", input)
    torch.testing.assert_close(sparse(input), expected)
    weight, dense = sparse.proj.weight, sparse.proj.to_dense().weight
    for name in ("dtype", "device", "shape", "ndim", "is_cuda"):
        assert getattr(weight, name) == getattr(dense, name)
    assert weight.size(0) == 3 and weight.size() == weight.shape == (3, 6)
    assert (weight.dim(), weight.numel(), weight.requires_grad) == (2, 18, False)


@pytest.mark.filterwarnings("ignore:.*deprecated")  # torch.ao.quantization, in favour of torchao
def test_int8_for_what_stayed_dense():
    pruned = prune_below(sparsify_(nn.Linear(64, 128)), 0.9)
    dense = nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)
    model = nn.Sequential(pruned, nn.ReLU(), *dense).eval()
    input = torch.randn(32, 64)
    (expected,) = outputs(model, input)
    size = len(pickled(finalize_(copy.deepcopy(model)).state_dict()))
    quantize_dynamic = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    small = quantize_dynamic(finalize_(model, "csr", input), {nn.Linear})
    (got,) = outputs(small, input)
    assert [small[i]._get_name() for i in (0, 2)] == ["SparseLinear", "DynamicQuantizedLinear"]
    assert 0 < (got - expected).norm() / expected.norm() < 0.06
    assert len(pickled(small.state_dict())) < 0.4 * size


def pickled(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def tiny(kind, config, **options):
    """A random model of transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, **options}
    config = getattr(transformers, config)(num_hidden_layers=2, vocab_size=50, **sizes)
    return getattr(transformers, kind)(config)


MODELS = {
    **{name: (EXAMPLES[name].build, EXAMPLES[name].input) for name in EXAMPLES if name != "gpt2"},
    "resnet50": (short_resnet50, EXAMPLES["resnet18"].input),
    "bert": (lambda: tiny("BertModel", "BertConfig"), EXAMPLES["gpt2"].input),
    "opt": (lambda: tiny("OPTForCausalLM", "OPTConfig", ffn_dim=64), EXAMPLES["gpt2"].input),
    "llama": (
        lambda: tiny("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2),
        EXAMPLES["gpt2"].input,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("quantile", [0.5, 0.95])
@pytest.mark.parametrize("name", MODELS)
def test_other_peoples_models_stay_the_same(name, quantile):
    build, make_input = MODELS[name]
    torch.manual_seed(0)
    input = make_input()
    model = settle(build(), input).double()
    input = input.double() if input.is_floating_point() else input
    prune_below(sparsify_(model), quantile)
    expected = outputs(model, input)
    size = sum(p.numel() for p in finalize_(copy.deepcopy(model)).parameters())
    for format in ("compact", "csr", "auto"):
        small = finalize_(copy.deepcopy(model), format, input)
        for new, old in zip(outputs(small, input), expected, strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=1e-11 * old.abs().max().item())
        if format == "compact":
            assert sum(p.numel() for p in small.parameters()) < size
        if format == "csr":
            assert sparse_names(small)

"""Tools that record, fuse, quantise or merge modules: right, or an error that says what to do."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import dst_kernels
from dst_kernels.nn.find import named_masked_weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated:DeprecationWarning", "ignore::FutureWarning"
)


class Convolutions(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=bias)
        self.bn = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 2, 3, groups=2, bias=bias)
        self.fc = nn.Linear(2 * 36, 5, bias=bias)

    def forward(self, x):
        return self.fc(torch.relu(self.up(self.bn(self.conv(x)))).flatten(1))


class Reads(nn.Module):
    """Uses a weight without calling the layer that has it."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(4, 5), nn.Bilinear(5, 5, 3)

    def forward(self, x):
        hidden = nn.functional.linear(x, self.read.weight)
        return self.called(hidden, hidden)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, 2, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


CASES = {
    "convolutions": (Convolutions, (2, 1, 6, 6)),
    "without bias": (lambda: Convolutions(bias=False), (2, 1, 6, 6)),
    "read": (Reads, (2, 4)),
    "recurrent": (Recurrent, (2, 3, 4)),
    "attention": (Attention, (2, 3, 4)),
}
every_case = pytest.mark.parametrize("name", CASES)


def masked(name="convolutions", fixed=False):
    """A model in evaluation whose masks act, an input, and its output."""
    torch.manual_seed(0)
    make, shape = CASES[name]
    model = dst_kernels.sparsify_(make())
    with torch.no_grad():
        for _, part in named_masked_weights(model):
            part.threshold.fill_(float(part.weight.abs().median()))
    if fixed:
        dst_kernels.freeze_masks_(model)
    x = torch.randn(shape)
    with torch.no_grad():
        output = model.eval()(x)
    assert 0 < dst_kernels.remaining_ratio(model) < 0.7
    return model, x, output


def close(output, expected):
    torch.testing.assert_close(output.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fixed", [False, True])
@every_case
def test_a_trace_computes_with_masked_weights(name, fixed):
    model, x, expected = masked(name, fixed)
    with warnings.catch_warnings():
        if name not in ("recurrent", "attention"):  # torch's own code for these warns
            warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, x, check_trace=False)
    close(traced(x), expected)
    graph = str(traced.inlined_graph)
    assert "dst_kernels::" not in graph and "aten::" in graph
    with torch.no_grad():  # parameters of the trace, not constants
        next(traced.parameters()).mul_(2)
    assert not torch.allclose(traced(x), expected)
    with pytest.raises(RuntimeError, match=r"model\.eval\(\) first, or dst_kernels\.finalize_"):
        torch.jit.trace(model.train(), x)


@every_case
def test_an_exported_program_needs_torch_alone(name):
    model, x, expected = masked(name)
    program = torch.export.export(model, (x,))
    close(program.module()(x), expected)
    assert not [node for node in program.graph.nodes if "dst_kernels" in str(node.target)]
    with pytest.raises(RuntimeError, match=r"model\.eval\(\) first, or dst_kernels\.finalize_"):
        torch.export.export(model.train(), (x,))


@pytest.mark.slow
def test_an_exported_file_is_read_where_dst_kernels_is_not(tmp_path):
    model, x, expected = masked()
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; x = torch.load('x.pt'); program = torch.export.load('model.pt2'); "
        "torch.save(program.module()(x).detach(), 'y.pt'); assert 'dst_kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    close(torch.load(tmp_path / "y.pt"), expected)


@pytest.mark.parametrize("name", ["convolutions", "without bias", "recurrent", "attention"])
def test_masked_layers_are_leaves_of_a_torch_fx_graph(name):
    model, x, expected = masked(name)
    graph = torch.fx.symbolic_trace(model)
    close(graph(x), expected)
    leaves = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert leaves >= {key for key, module in model.named_children()}
    with torch.no_grad():  # the very layers, which train on
        dst_kernels.prune_(model, 0.3, scope="layer")
    close(graph(x), model(x).detach())
    assert not torch.allclose(graph(x), expected)


def test_torch_fx_says_that_it_cannot_record_what_a_forward_reads():
    model, x, expected = masked("read")
    with pytest.raises(RuntimeError, match=r"cannot record weight of a .*finalize_\(model\) first"):
        torch.fx.symbolic_trace(model)
    close(torch.fx.symbolic_trace(dst_kernels.finalize_(model))(x), expected)


def test_torch_jit_script_says_what_to_do():
    model, x, expected = masked()
    with pytest.raises(RuntimeError, match=r"cannot compile a masked model: .*finalize_\(model\)"):
        torch.jit.script(model)
    close(torch.jit.script(dst_kernels.finalize_(model))(x), expected)


@every_case
def test_quantisation_says_what_to_do(name):
    kinds = {nn.Linear, nn.LSTM}
    model, x, expected = masked(name)
    with pytest.raises(RuntimeError, match=r"cannot be quantized: .*finalize_\(model\) first"):
        torch.ao.quantization.quantize_dynamic(model, kinds)
    if name in ("attention", "read"):  # a quantised layer's weight is a method, which these read
        return
    quantized = torch.ao.quantization.quantize_dynamic(dst_kernels.finalize_(model), kinds)
    assert (quantized(x) - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_norm_is_folded_into_a_dense_copy(bias):
    model, x, expected = masked("convolutions" if bias else "without bias")
    model.bn.running_mean.uniform_(-1, 1), model.bn.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        expected = model(x)
    folded = copy.deepcopy(model)
    folded.conv, folded.bn = fuse_conv_bn_eval(folded.conv, folded.bn), nn.Identity()
    assert type(folded.conv) is nn.Conv2d
    close(folded(x), expected)

    class Mine(nn.Linear):
        def __getattr__(self, name):
            return super().__getattr__(name)

    mine = Mine(72, 5, bias=bias).eval()
    dst_kernels.sparsify_(nn.Sequential(mine))
    mine.load_state_dict(model.fc.state_dict())
    model.fc = mine
    linear, norm = model.fc, nn.BatchNorm1d(5).eval()
    norm.running_mean.uniform_(-1, 1)
    inner = torch.randn(2, 72)
    close(fuse_linear_bn_eval(linear, norm)(inner), norm(linear(inner)).detach())
    assert type(model.fc) is not nn.Linear, "the original stays masked"


def test_weights_that_torch_prunes():
    """They are computed from others: say what bakes them in."""
    model, x, _ = masked()
    prune.l1_unstructured(model.fc, "weight", 0.5)
    expected = model(x).detach()
    with pytest.raises(
        RuntimeError, match=r"fc \(MaskedLinear\): .*torch\.nn\.utils\.prune\.remove"
    ):
        dst_kernels.finalize_(model)
    prune.remove(model.fc, "weight")
    close(dst_kernels.finalize_(model)(x), expected)
    assert sorted(name for name in model.state_dict() if "fc" in name) == ["fc.bias", "fc.weight"]


def test_what_tools_are_shown_changes_nothing_else():
    """Neither copies and pickles, nor what is looked up on a layer by mistake."""
    model, x, expected = masked()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.conv) is type(model.conv)
        close(other(x), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    close(torch.load(file, weights_only=False)(x), expected)
    for name in ("qconfig", "base_layer", "__deepcopy__", "nothing"):
        assert not hasattr(model.conv, name)
    dense = dst_kernels.densify_(model)
    assert "__module__" not in vars(dense.conv)

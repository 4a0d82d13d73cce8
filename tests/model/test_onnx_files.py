"""`save_onnx`: the file is small, and right for onnxruntime."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo import EXAMPLES, outputs, prune_below, settle

from dst_kernels import finalize_, save_onnx, sparsify_


class LeNet5(nn.Sequential):
    def __init__(self):
        convolutions = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        layers = [part for conv in convolutions for part in (conv, nn.ReLU(), nn.AvgPool2d(2))]
        linear = nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)
        super().__init__(*layers, nn.Flatten(), *linear)


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 512, batch_first=True), 2)


MODELS = {  # build, an input, and the share of the dense file
    "lenet-5": (LeNet5, lambda: torch.randn(2, 1, 28, 28), 0.14),
    "encoder": (encoder, lambda: torch.randn(2, 9, 128), 0.15),
    "resnet18": (EXAMPLES["resnet18"].build, EXAMPLES["resnet18"].input, 0.095),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize(
    ("name", "format"),
    [("lenet-5", "masked"), ("lenet-5", "auto"), ("encoder", "csr"), ("resnet18", "csr")],
)
def test_onnxruntime_gives_the_masked_models_results(name, format, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    build, make_input, share = MODELS[name]
    input = make_input()
    model = prune_below(sparsify_(settle(build(), input)), 0.95)
    (expected,) = outputs(model, input)
    dense = finalize_(copy.deepcopy(model))
    size = len(torch.onnx.export(dense, (input,), verbose=False).model_proto.SerializeToString())
    if format != "masked":
        finalize_(model, format, input)
    before, file = repr(model), tmp_path / "model.onnx"
    batch = {0: torch.export.Dim.DYNAMIC}
    options = {"dynamic_shapes": [batch]} if name == "lenet-5" else {}
    save_onnx(model, file, input, **options)
    assert repr(model) == before and file.stat().st_size < share * size
    proto = onnx.load(file)
    onnx.checker.check_model(proto)
    assert len(proto.graph.sparse_initializer) >= 4
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: input.numpy()})
    scale = expected.abs().max().item()
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=0, atol=1e-5 * scale)


def test_what_save_onnx_cannot_use(tmp_path, monkeypatch):
    model, file = nn.Linear(4, 2), tmp_path / "model.onnx"
    installed = {"onnx": "a spec"}
    monkeypatch.setattr("dst_kernels.model.onnx_file.find_spec", installed.get)
    with pytest.raises(ImportError, match=r"^save_onnx needs onnxscript: pip install 'dst_kernels"):
        save_onnx(model, file, torch.ones(1, 4))
    installed["onnxscript"] = "a spec"
    with pytest.raises(RuntimeError, match="example_input needs a model in evaluation mode"):
        save_onnx(model, file, torch.ones(1, 4))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, but is None"):
        save_onnx(None, file, torch.ones(1, 4))
    assert not file.exists()

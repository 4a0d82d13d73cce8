"""`dst-kernels export`, `bench-model`, `evaluate FILE`: the model of a finished run as a file."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch

import dst_kernels
from dst_kernels.model.sparse_file import read_sparse, write_sparse
from dst_kernels.training import latency
from dst_kernels.training.export import read_export
from dst_kernels.training.latency import take_turns
from dst_kernels.training.models import load_model

SHORT = ("--epochs", 2)
RUNS = {
    "sparse": SHORT,
    "dense": (*SHORT, "--dense"),
    "fixed": (*SHORT, "--freeze-epoch", 1),
    "rival": (*SHORT, "--method", "set", "--density", 0.1),
    "lenet-5": (*SHORT, "--model", "lenet-5", "--dataset", "mnist", "--data-dir", "mnist-data"),
}


def export(cli, *arguments):
    result = cli("export", *arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("format", ["dense", "auto"])
@pytest.mark.parametrize("kind", RUNS)
def test_the_file_has_the_model_of_the_run(cli, run_of, mnist_dir, tmp_path, kind, format):
    if kind == "lenet-5":
        result = cli("train", *RUNS[kind], "--batch-size", 8, "--out", "run")
        assert result.exit_code == 0, result.output
    else:
        run_of(*RUNS[kind], to=tmp_path / "run")
    output = export(cli, "run", "--format", format, "--out", "model.safetensors")
    trained = dst_kernels.finalize_(load_model(tmp_path / "run"))
    dense = sum(tensor.nbytes for tensor in trained.state_dict().values())
    size, share = re.search(r"model\.safetensors +([\d,]+) bytes, ([\d.]+) %", output).groups()
    assert int(size.replace(",", "")) == (tmp_path / "model.safetensors").stat().st_size
    assert float(share) == pytest.approx(100 * int(size.replace(",", "")) / dense, rel=0.02)
    exported = read_export(tmp_path / "model.safetensors")
    images = torch.randn(3, *exported.shape)
    torch.testing.assert_close(exported.model(images), trained(images), rtol=1e-4, atol=1e-5)
    result = cli("evaluate", "model.safetensors")
    assert result.exit_code == 0, result.output
    now, then = re.search(r"accuracy +([\d.]+) % .* when it was ([\d.]+) %", result.output).groups()
    assert now == then


@pytest.mark.slow
def test_a_language_model(cli, tmp_path):
    (tmp_path / "book.txt").write_text("to be or not to be, that is the question. " * 60)
    short = ("--epochs", 1, "--dataset", "text", "--data-dir", "book.txt", "--batch-size", 4)
    assert cli("train", *short, "--out", "run").exit_code == 0
    export(cli, "run")
    result = cli("evaluate", "run/sparse.safetensors")
    now, then = re.search(r"perplexity +([\d.]+) .* when it was ([\d.]+)", result.output).groups()
    assert now == then
    (tmp_path / "book.txt").write_text("to be or not to be, that is a question! " * 60)
    result = cli("evaluate", "run/sparse.safetensors")
    assert result.exit_code == 2
    assert "FILE run/sparse.safetensors is of another data set" in result.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_an_onnx_file_takes_any_batch(cli, run_of, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    run_of(*SHORT, to=tmp_path / "run")
    output = export(cli, "run", "--format", "onnx")
    assert "run/model.onnx" in output and "smaller, not faster" in output
    session = onnxruntime.InferenceSession("run/model.onnx", providers=["CPUExecutionProvider"])
    trained = load_model(tmp_path / "run").eval()
    for batch in (1, 5):
        images = torch.randn(batch, 1, 28, 28)
        (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), trained(images), rtol=1e-4, atol=1e-5)


def test_what_bench_model_prints(cli, run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "_ROUNDS", 5)
    run_of(*SHORT, to=tmp_path / "run")
    export(cli, "run", "--format", "dense")
    result = cli("bench-model", "run/sparse.safetensors")
    assert result.exit_code == 0, result.output
    assert "lenet-300-100, one forward on 1 CPU thread," in result.output
    rows = re.findall(r"^ +(\d+) +([\d,]+) µs +([\d,]+) µs .* ([\d.]+) ", result.output, re.M)
    assert [row[0] for row in rows] == ["1", "8", "64"]
    size = (tmp_path / "run" / "sparse.safetensors").stat().st_size
    assert f"on disk: {size:,} bytes" in result.output


def test_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = take_turns(calls)
    assert len(seconds["a"]) == len(seconds["b"]) > 100 and min(seconds["a"]) > 0
    changes = sum(one != next for one, next in itertools.pairwise(order))
    assert changes >= len(seconds["a"]), "both in every round"


def test_bad_input(cli, run_of, tmp_path, monkeypatch):
    run = run_of(*SHORT, to=tmp_path / "run")

    def error_of(*arguments):
        result = cli(*arguments)
        assert result.exit_code == 2, result.output
        return result.stderr

    assert "--format 'cs' is unknown. Did you mean csr?" in error_of(
        "export", "run", "--format", "cs"
    )
    words = "--out 'run/model.safetensors' is there, and no file of dst-kernels export"
    assert words in error_of("export", "run", "--out", "run/model.safetensors")
    assert "run/no/m cannot be written: No such file" in error_of(
        "export", "run", "--out", "run/no/m"
    )
    monkeypatch.setattr("dst_kernels.model.onnx_file.find_spec", lambda name: None)
    words = "--format onnx cannot be written: save_onnx needs onnx and onnxscript: pip install"
    assert words in error_of("export", "run", "--format", "onnx")
    assert "--out 'x.bin' is no name for --format onnx. Accepted: one that ends in" in error_of(
        "export", "run", "--format", "onnx", "--out", "x.bin"
    )
    assert "--threads is '0.5'" in error_of("bench-model", "run", "--threads", "0.5")
    assert "FILE run cannot be read: Is a directory" in error_of("bench-model", "run")
    assert "FILE none cannot be read: No such file" in error_of("bench-model", "none")
    for command in ("evaluate", "bench-model"):
        error = error_of(command, "run/model.safetensors")
        assert "FILE run/model.safetensors: its header has no 'dst_kernels'" in error
        assert error.endswith("Accepted: a file that dst-kernels export wrote.\n")

    export(cli, "run", "--out", "m")
    export(cli, "run", "--out", "m")  # again
    found = read_sparse("m")
    forgeries = {
        "its notes: lacks 'classes'": {"classes": None},
        "its notes: input_shape is [1, 28]": {"input_shape": [1, 28]},
        "it has no configuration of a run": {"config": 3},
        "FILE forged: --model 'gpt-2' is unknown": {
            "config": {**found.notes["config"], "model": "gpt-2"}
        },
        "fc3.bias: it is torch.float32 [10] in the file": {"classes": 11},
    }
    for words, notes in forgeries.items():
        notes = {k: v for k, v in {**found.notes, **notes}.items() if v is not None}
        header = {"weights": {}, "same": {}, "layers": found.layers, "notes": notes}
        write_sparse("forged", found.tensors, header)
        assert words in error_of("evaluate", "forged")

    (run / "metrics.csv").write_text("")
    words = "DIR 'run' has no finished run, or its results have changed since"
    assert words in error_of("export", "run")
    run_of(*SHORT, "--compare", to=tmp_path / "both")
    assert "DIR 'both' has two runs. Accepted: both/dense or both/sparse." in error_of(
        "export", "both"
    )
    assert json.loads((run / "config.json").read_text())

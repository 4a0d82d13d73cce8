"""Importing is lean, works without Triton, and the public names are the agreed ones."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import torch

import dst_kernels
import dst_kernels.functional
import dst_kernels.nn
import dst_kernels.reference

HEAVY = ("triton", "torchvision", "typer", "matplotlib", "transformers", "rich", "sklearn", "timm")


def python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_import_brings_in_torch_only_and_leaves_cuda_alone():
    report = json.loads(
        python(
            "import json, sys, torch\n"
            "before = set(sys.modules)\n"
            "import dst_kernels\n"
            "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
            "print(json.dumps({'new': sorted(new), 'all': sorted(sys.modules),"
            " 'cuda': torch.cuda.is_initialized(),"
            " 'libraries': [path for path in torch.ops.loaded_libraries if 'dst' in path],"
            " 'dynamo': 'torch._dynamo' in set(sys.modules) - before,"
            " 'distributed': 'torch.distributed.tensor' in set(sys.modules) - before}))\n"
        )
    )
    assert not set(HEAVY) & set(report["new"])
    assert not set(HEAVY) & set(report["all"])
    assert "dst_kernels" in report["new"]
    assert not report["libraries"], "they are loaded at first use"
    assert not report["cuda"] and not report["dynamo"] and not report["distributed"]


def test_works_where_triton_cannot_be_imported():
    output = python(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, dst_kernels\n"
        "layer = dst_kernels.nn.MaskedLinear(3, 4)\n"
        "layer(torch.randn(2, 3)).sum().backward()\n"
        "print(layer.threshold.grad.shape[0])\n"
    )
    assert output.strip() == "4"


def test_report_of_the_installation(monkeypatch, capsys):
    monkeypatch.setenv("DST_KERNELS_BACKEND", "reference")
    monkeypatch.setattr("sys.argv", ["dst_kernels"])
    runpy.run_module("dst_kernels", run_name="__main__")
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["dst_kernels"] == dst_kernels.__version__
    assert rows["torch"].startswith(torch.__version__)
    assert rows["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert rows["DST_KERNELS_BACKEND"] == "reference"
    assert rows["triton"] and rows["device"]
    assert rows["backend reference"] == "available"
    for name in ("cpu", "triton", "cuda"):
        row = rows[f"backend {name}"]
        assert row == "available" or (row.startswith("no: ") and len(row) > len("no: ") + 5)
    for name in ("cpu", "cuda"):
        row = rows[f"library {name}"]
        assert row.startswith("no: ") or f"libdst_kernels_{name}" in row


def test_public_names():
    assert sorted(dst_kernels.__all__) == [
        "ConversionPlan",
        "SparseFileError",
        "SparsifyConfig",
        "SparsityReport",
        "TargetRatio",
        "__version__",
        "check_masks",
        "densify_",
        "finalize_",
        "freeze_masks_",
        "functional",
        "group_",
        "load_sparse",
        "mask_parameter_",
        "methods",
        "nn",
        "optim",
        "parameter_groups",
        "plan_sparsify",
        "prune_",
        "remaining_ratio",
        "save_onnx",
        "save_sparse",
        "sparse_regularization",
        "sparsify_",
        "sparsity_report",
        "unfreeze_masks_",
        "ungroup_",
        "weights_unchanged",
    ]
    assert sorted(dst_kernels.functional.__all__) == [
        "effective_threshold",
        "masked_conv1d",
        "masked_conv2d",
        "masked_conv3d",
        "masked_conv_transpose1d",
        "masked_conv_transpose2d",
        "masked_conv_transpose3d",
        "masked_linear",
        "masked_weight",
        "remaining_ratio",
        "sparse_regularization",
        "threshold_mask",
    ]
    assert sorted(dst_kernels.nn.__all__) == [
        "GRANULARITIES",
        "MaskOptions",
        "MaskedConv1d",
        "MaskedConv2d",
        "MaskedConv3d",
        "MaskedConvTranspose1d",
        "MaskedConvTranspose2d",
        "MaskedConvTranspose3d",
        "MaskedGRU",
        "MaskedLSTM",
        "MaskedLayer",
        "MaskedLinear",
        "MaskedModule",
        "MaskedRNN",
        "SparseConv1d",
        "SparseConv2d",
        "SparseLinear",
        "group_",
        "mask_parameter_",
        "ungroup_",
        "weights_unchanged",
    ]


def test_public_names_exist_and_are_documented():
    for module in (dst_kernels, dst_kernels.functional, dst_kernels.nn, dst_kernels.reference):
        assert module.__doc__
        for name in module.__all__:
            value = getattr(module, name)
            assert not callable(value) or value.__doc__, name


def test_convolutions_carry_their_own_names():
    for spatial in (1, 2, 3):
        for kind in ("conv", "conv_transpose"):
            function = getattr(dst_kernels.functional, f"masked_{kind}{spatial}d")
            assert function.__name__ == f"masked_{kind}{spatial}d"
            assert f"{kind}{spatial}d" in function.__doc__


def test_private_modules_are_imported_inside_their_folder_only():
    root = Path(dst_kernels.__file__).parents[1]
    files = [
        file for top in ("dst_kernels", "bench", "tests") for file in (root / top).rglob("*.py")
    ]
    private = {file.stem: file.parent for file in files if re.match(r"_[a-z]", file.name)}
    assert private, "there are some"
    for file in files:
        imports = re.findall(r"^ *(?:from|import) [^(\n]+(?:\([^)]*\))?", file.read_text(), re.M)
        for name in private.keys() & set(re.findall(r"\w+", " ".join(imports))):
            assert private[name] in file.parents, f"{file} imports {name} of {private[name]}"

"""Save a dense, masked or sparse model as an ONNX file that is smaller than the dense one."""

from __future__ import annotations

import copy
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import require_module
from ._example import Example
from ._sparse_layers import become_
from ._transformer_encoder import avoid_fast_path
from .finalize import finalize_
from .rebuild import sparse_layers
from .sparse_file import write_atomically


def save_onnx(
    model: nn.Module, file: str | os.PathLike[str], example_input: object, **options: Any
) -> None:
    """Write a model as an ONNX graph, with weights that are mostly zeros as `sparse_initializer`.

    Smaller, not faster: the graph is that of the dense model, and onnxruntime multiplies by the
    zeros. Only what `finalize_` has compacted is faster there. At 5 % of the weights in float32 the
    file has about 9 % of the size, for each weight its value and three bytes or so.

    The model may be dense, masked, or come from `finalize_`, in evaluation mode; it stays as it is.
    `example_input` is a tensor, a tuple of positional arguments or a dictionary of keyword
    arguments, as for `finalize_`. `options` are those of `torch.onnx.export`, with its new exporter
    (dynamo=True): `dynamic_shapes`, `input_names` and others.

    Needs onnx and onnxscript. Raises ImportError without them, TypeError if `model` is no module,
    RuntimeError for a model in training mode, the exporter's own errors, and OSError if the file
    cannot be written. A file that was there is then as before.
    """
    require_module(model)
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"save_onnx needs {' and '.join(missing)}: pip install 'dst_kernels[onnx]'"
        )
    example = Example(model, example_input)
    dense = finalize_(copy.deepcopy(model))
    avoid_fast_path(dense)  # while there are sparse layers: the exporter knows no fused kernel
    for layer in set(sparse_layers(dense).values()):
        become_(layer, layer.to_dense())
    options = {"verbose": False, **options}
    program: Any = torch.onnx.export(
        dense, example.args, kwargs=example.kwargs, dynamo=True, **options
    )
    proto = program.model_proto
    _store_sparsely_(proto.graph)
    write_atomically(Path(file), lambda out: out.write(proto.SerializeToString()))


def _store_sparsely_(graph: Any) -> None:
    """Turn the initializers that get smaller by it into sparse ones."""
    from onnx import SparseTensorProto, TensorProto, numpy_helper

    real = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
    for index in reversed(range(len(graph.initializer))):
        tensor = graph.initializer[index]
        if tensor.data_type not in real or len(tensor.dims) < 2:
            continue
        values = numpy_helper.to_array(tensor).reshape(-1)
        kept = values.nonzero()[0]
        if len(kept) * (values.itemsize + 1) >= values.nbytes:
            continue
        sparse = SparseTensorProto(
            dims=tensor.dims,
            values=numpy_helper.from_array(values[kept], tensor.name),
            # As a list of integers, not as bytes: there a small integer takes few bytes, not eight.
            indices=TensorProto(data_type=TensorProto.INT64, dims=[len(kept)], int64_data=kept),
        )
        if sparse.ByteSize() < tensor.ByteSize():
            del graph.initializer[index]
            graph.sparse_initializer.append(sparse)

"""Save a dense, masked or sparse model as one small file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import REAL_DTYPES, require_module
from ..nn.find import beside, masked_by_key, names_of_masks
from ..nn.weight import MaskedWeight
from ..ops.dtensor import is_dtensor
from .encoding import PLAIN, encode
from .rebuild import described_layers, sparse_layers
from .sparse_file import write_sparse

_DTYPES = (
    *REAL_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.uint8, torch.uint16,
    torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
_DENSE_FIRST = "Call torch.nn.utils.parametrize.remove_parametrizations or finalize_ first"


def save_sparse(
    model: nn.Module, file: str | os.PathLike[str], notes: Mapping[str, Any] | None = None
) -> None:
    """Write a model to a safetensors file that has only the weights that are kept.

    `load_sparse` gives every tensor back bit for bit, a masked weight as `finalize_` would make it:
    W where the mask is True, 0 elsewhere. Thresholds and fixed masks are in the file, too. The
    model may be dense, masked, or come from `finalize_`; it stays as it is. A weight of mostly
    zeros takes, for each value that is kept, that value and one byte or, above about 12 %, one bit
    for each element, whichever is smaller. `notes` are plain values, as JSON has them, that the
    header shall have, too.

    Needs the package safetensors. Raises TypeError if `model` is no module or `notes` are no JSON,
    ValueError with the name of a tensor that such a file cannot have, OSError if the file cannot be
    written. A file that was there is then as before.
    """
    require_module(model)
    stored: dict[str, Tensor] = {}
    weights: dict[str, Any] = {}
    same: dict[str, str] = {}
    _collect(model, stored, weights, same)
    layers = described_layers(model)
    header = {"weights": weights, "same": same, "layers": layers, "notes": dict(notes or {})}
    write_sparse(file, stored, header)


def _collect(
    model: nn.Module, stored: dict[str, Tensor], weights: dict[str, Any], same: dict[str, str]
) -> None:
    """Add a model's tensors to `stored`, with their entries in the header."""
    state, masked = model.state_dict(keep_vars=True), masked_by_key(model)
    for name, layer in sparse_layers(model).items():
        prefix = f"{name}." if name else ""
        for buffer in layer.state_dict().keys() - {"bias"}:
            del state[prefix + buffer]
        state[prefix + "weight"] = layer.weight()
    of_masks = names_of_masks(masked)
    parts: dict[int, tuple[str, MaskedWeight]] = {}  # by the weight's id
    for key, part in masked.items():
        if key not in state:
            raise ValueError(f"{key} cannot be saved: it is computed at each use. {_DENSE_FIRST}")
        first, other = parts.setdefault(id(state[key]), (key, part))
        if not _same_mask(part, other):
            raise ValueError(f"{key} cannot be saved: it is {first} under another mask")
    known: dict[int, str] = {}

    def add(key: str, tensor: Tensor, kept: Tensor | None = None) -> None:
        encoding, values, positions = encode(tensor, kept)
        names = {key: values, **{f"{key}:{name}": each for name, each in positions.items()}}
        if stored.keys() & names.keys():
            raise ValueError(f"{key} cannot be saved: another tensor has the name of a part of it")
        stored.update(names)
        if encoding != PLAIN:
            weights[key] = {"encoding": encoding, "shape": list(tensor.shape)}

    for key, tensor in state.items():
        if key in of_masks:
            continue
        first = known.setdefault(id(tensor), key)
        if first != key:
            same[key] = first
        elif id(tensor) not in parts:
            add(key, _on_cpu(key, tensor))
        else:
            name, part = parts[id(tensor)]
            _check_savable(key, tensor)
            fixed = part.fixed_mask
            add(key, _on_cpu(key, part.baked()), None if fixed is None else fixed.cpu())
            entry = weights.setdefault(key, {"encoding": PLAIN})
            if fixed is not None:
                entry["fixed"] = True
            threshold = beside(name, part.threshold_name)
            entry["threshold"] = known.setdefault(id(part.threshold), threshold)
            if entry["threshold"] == threshold:
                add(threshold, _on_cpu(threshold, part.threshold))


def _same_mask(part: MaskedWeight, other: MaskedWeight) -> bool:
    one, two = part.fixed_mask, other.fixed_mask
    if one is None or two is None:
        return one is two and part.threshold is other.threshold
    return torch.equal(one, two)


def _on_cpu(key: str, tensor: Any) -> Tensor:
    """Return a copy of a tensor on the CPU, which shares memory with no other."""
    _check_savable(key, tensor)
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _check_savable(key: str, tensor: Any) -> None:
    """Raise ValueError for what a file cannot hold."""
    reason = None
    if not isinstance(tensor, Tensor):
        reason = f"it is a {type(tensor).__name__}, no tensor"
    elif is_dtensor(tensor):
        reason = "it is sharded. Gather the state dict and load it into an unsharded model first"
    elif tensor.is_meta:
        reason = "it has no values (the meta device)"
    elif tensor.layout is not torch.strided or tensor.is_quantized:
        reason = "it is no plain dense tensor"
    elif tensor.dtype not in _DTYPES:
        reason = f"a file has no {tensor.dtype}"
    if reason is not None:
        raise ValueError(f"{key} cannot be saved: {reason}")

"""Load a file of `save_sparse` into a dense, masked or sparse model: first check, then write."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..arguments import require_module
from ..nn import MaskedModule
from ..nn.find import beside, masked_by_key, names_of_masks
from ..ops.dtensor import is_dtensor
from ._sparse_layers import become_
from ._transformer_encoder import avoid_fast_path
from .rebuild import described, rebuilt, sparse_layers
from .sparse_file import SparseFile, read_sparse

logger = logging.getLogger(__name__)

_MASKED = (
    "it was made smaller, but the model's layer is masked. Call dst_kernels.densify_ on the model "
    "first"
)


def load_sparse(
    file: str | os.PathLike[str], model: nn.Module | None = None
) -> nn.Module | dict[str, Tensor]:
    """Load a file of `save_sparse` into `model` and return it; without one, a dense state dict.

    In place, and all or nothing; names, shapes and dtypes must be the model's. Dense weights become
    W * M. Masked ones do, too, with thresholds and fixed masks that keep the same weights: those of
    the file, else thresholds of 0 and no fixed mask. Layers that `finalize_` has made sparse or
    smaller become so in a model that has them dense and whole; they stay the same objects.

    The state dict is on the CPU and has W * M for each weight, and no thresholds.

    Needs the package safetensors. Raises `SparseFileError`, a ValueError that names the file and
    the entry, for a file that is damaged, was not written by `save_sparse`, or does not fit the
    model; OSError if it cannot be read. The model is then as before.
    """
    if model is not None:
        require_module(model)
    found = read_sparse(file)
    return found.tensors if model is None else load_into(model, found)


def load_into(model: nn.Module, found: SparseFile) -> nn.Module:
    """Do what `load_sparse` does, with a file that has been read."""
    layers = _new_layers(model, found)
    masked = masked_by_key(model)
    of_masks = names_of_masks(masked)
    state = model.state_dict(keep_vars=True)
    own = {k: v for k, v in state.items() if k not in of_masks and not _is_of(k, layers)}
    given = {k: v for k, v in found.tensors.items() if not _is_of(k, layers)}
    for key in own:
        if key not in given:
            raise found.error(key, "the model has it, the file has not")
    for key, tensor in given.items():
        if key not in own:
            raise found.error(key, "the file has it, the model has not")
        _check_fits(found, key, tensor, own[key])
    for key, part in masked.items():
        name = beside(key, part.threshold_name)
        if name not in state:
            raise found.error(key, "the model computes its threshold")
        threshold = found.thresholds.get(key)
        given[name] = torch.zeros_like(state[name]) if threshold is None else threshold
        _check_fits(found, name, given[name], state[name])
        in_use = part.fixed_mask is None and hasattr(part.module, part.fixed_mask_name)
        if key in found.masks and in_use:
            raise found.error(key, f"the model has a {part.fixed_mask_name} of its own")

    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        logger.info("load_sparse: %s becomes %r", name or "the model", layer)
        become_(modules[name], layer)
    avoid_fast_path(model)
    for key, part in masked.items():
        if key in found.masks:
            part.set_fixed_mask(found.masks[key].to(part.weight.device))
        else:
            part.drop_fixed_mask()
    model.load_state_dict({**model.state_dict(), **given})
    return model


def _is_of(key: str, layers: Iterable[str]) -> bool:
    return key.rpartition(".")[0] in layers


def _check_fits(found: SparseFile, key: str, tensor: Tensor, own: object) -> None:
    """Raise SparseFileError unless the model's own tensor can take the file's."""
    if not isinstance(own, Tensor) or is_dtensor(own) or own.is_meta:
        raise found.error(key, "it is no tensor in memory in the model, or is sharded there")
    if (tensor.dtype, tensor.shape) != (own.dtype, own.shape):
        raise found.error(
            key,
            f"it is {tensor.dtype} {list(tensor.shape)} in the file and {own.dtype} "
            f"{list(own.shape)} in the model",
        )
    if own.is_inference() and not torch.is_inference_mode_enabled():
        raise found.error(key, "the model's tensor was made in inference mode")


def _new_layers(model: nn.Module, found: SparseFile) -> dict[str, nn.Module]:
    """Return by name the new layers: those that the file describes, and the model's sparse ones."""
    modules = dict(model.named_modules(remove_duplicate=False))
    own = {name: described(layer) for name, layer in sparse_layers(model).items()}
    made: dict[int, nn.Module] = {}
    layers = {}
    for name, description in {**own, **found.layers}.items():
        old = modules.get(name)
        if old is None:
            raise found.error(name, "the model has no such layer")
        tensors = {k.rpartition(".")[2]: v for k, v in found.tensors.items() if _is_of(k, [name])}
        if isinstance(old, MaskedModule):
            if any(
                tensor.shape != getattr(old, key, tensor).shape for key, tensor in tensors.items()
            ):
                raise found.error(name, _MASKED)
            continue
        try:
            if id(old) not in made:
                made[id(old)] = rebuilt(old, description, tensors)
        except ValueError as error:
            raise found.error(name, str(error)) from error
        layers[name] = made[id(old)]
    return layers

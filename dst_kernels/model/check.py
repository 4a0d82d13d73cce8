"""Check at run time that every mask acts and that every threshold trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..arguments import require
from ..nn.find import named_masked_weights
from ..nn.weight import MaskedWeight
from ..ops.dtensor import full_tensor


def check_masks(
    model: nn.Module, *args: Any, optimizers: Iterable[torch.optim.Optimizer] = (), **kwargs: Any
) -> dict[str, str]:
    """Return what is wrong, by the name of the masked weight; an empty dict if nothing is.

    It runs one forward `model(*args, **kwargs)` and one backward, in the model's current mode, with
    the thresholds of every weight set to the median of its magnitudes. Afterwards it restores
    parameters, gradients, buffers and the random numbers of the CPU and the model's devices.

    It finds weights that the forward does not use, weights that it reads unmasked (through a name
    or a method that masking does not know), masks that change no output, and, if `optimizers` are
    given, thresholds that none of them trains. It does not check a weight without gradients
    (frozen). Fixed masks stay; their thresholds need no optimizer.

    Raises ValueError if the model has no masked layers or its output no floating-point tensor that
    depends on a parameter, TypeError for `optimizers` of another type, and what the forward raises.
    """
    accepted = "optimizers in a list"
    require(isinstance(optimizers, Iterable), "optimizers", accepted, optimizers)
    optimizers = list(optimizers)
    for each in optimizers:
        if not isinstance(each, torch.optim.Optimizer):
            kind = type(each).__name__
            raise TypeError(f"optimizers must be {accepted}, but is a list with a {kind}")
    parts = [each for each in named_masked_weights(model) if each[1].weight.requires_grad]
    problems = {}
    with _as_it_was(model, parts), torch.enable_grad():
        for _, part in parts:
            with torch.no_grad():
                part.threshold.copy_(part.weight.abs().median())
        outputs = [
            each
            for each in tree_leaves(model(*args, **kwargs))
            if isinstance(each, Tensor) and each.is_floating_point() and each.requires_grad
        ]
        if not outputs:
            raise ValueError(
                "model: its output has no floating-point tensor that depends on a parameter"
            )
        torch.stack([each.float().square().sum() for each in outputs]).sum().backward()
        for name, part in parts:
            problem = _problem(part)
            if problem is not None:
                problems[name] = problem
    for name in thresholds_without_optimizer(parts, optimizers) if optimizers else ():
        problems.setdefault(
            name, "no given optimizer trains its threshold: build it after conversion"
        )
    return problems


def thresholds_without_optimizer(
    parts: list[tuple[str, MaskedWeight]], optimizers: Iterable[torch.optim.Optimizer]
) -> list[str]:
    """Return the masked weights whose threshold needs a gradient, but is in no optimizer."""
    trained = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    return [
        name
        for name, part in parts
        if part.threshold.requires_grad
        and part.fixed_mask is None
        and id(part.threshold) not in trained
    ]


def _problem(part: MaskedWeight) -> str | None:
    of_weight, of_threshold = part.weight.grad, part.threshold.grad
    if part.fixed_mask is not None:
        return _problem_of_fixed(part)
    if of_threshold is None and of_weight is None and part.name in part.module._parameters:
        return "is not used by this forward"
    if of_threshold is None:
        return "is read past its mask: its threshold has no gradient"
    if not part.threshold.requires_grad or of_threshold.any():
        return None
    return "its mask changes no output: the gradient of its threshold is 0"


def _problem_of_fixed(part: MaskedWeight) -> str | None:
    mask, grad = part.fixed_mask, part.weight.grad
    if mask is None or part.name not in part.module._parameters:
        return None
    if grad is None:
        return "is not used by this forward"
    if not part.module._fixed[part.name].dense_gradient and full_tensor(grad)[~mask].any():
        return "is read past its mask: it has a gradient where the mask is False"
    return None


@contextlib.contextmanager
def _as_it_was(model: nn.Module, parts: list[tuple[str, MaskedWeight]]) -> Iterator[None]:
    """Restore afterwards what the check changes; inside, no optimizer defers gradients."""
    grads = [(p, p.grad, p.grad_dtype) for p in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    thresholds = [(part.threshold, part.threshold.detach().clone()) for _, part in parts]
    optimizers = [
        (m, name, m.__dict__.pop(name))
        for m in model.modules()
        for name in ("_deferral", "_taker")
        if name in vars(m)
    ]
    devices = {p.device for p in model.parameters()}
    try:
        for parameter, _, _ in grads:
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype
        with contextlib.ExitStack() as stack:
            for kind in {"cpu", *(device.type for device in devices)}:
                indices = [d.index for d in devices if d.type == kind and d.index is not None]
                stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
            yield
    finally:
        with torch.no_grad():
            for tensor, value in (*buffers, *thresholds):
                tensor.copy_(value)
        for module, name, value in optimizers:
            module.__dict__[name] = value
        for parameter, grad, dtype in grads:
            parameter.grad = None
            parameter.grad_dtype = dtype
            parameter.grad = grad

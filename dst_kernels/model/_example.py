"""Run a model with an example, and compare what it returns with what it returned before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..arguments import described


class Example:
    """An input of a model, and what the model returned for it when this object was made.

    `positions`: how many each convolution over one or two dimensions then computed of an image.
    """

    def __init__(self, model: nn.Module, example_input: object) -> None:
        self.kwargs: dict[str, Any] = {}
        self.args: tuple = ()
        if isinstance(example_input, Mapping):
            self.kwargs = dict(example_input)
        else:
            self.args = example_input if isinstance(example_input, tuple) else (example_input,)
        training = [name or "the model" for name, m in model.named_modules() if m.training]
        if training:
            raise RuntimeError(
                f"example_input needs a model in evaluation mode, but {training[0]} is in training "
                "mode: call model.eval() first"
            )
        self.positions: dict[nn.Module, int] = {}
        convolutions = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))]
        hooks = [each.register_forward_hook(self._count) for each in convolutions]
        try:
            output = self.run(model)
        finally:
            for hook in hooks:
                hook.remove()
        self._before = _tensors(output)
        if not self._before:
            raise TypeError(
                "for example_input the model must return a tensor, or tensors in tuples, lists, "
                f"dictionaries or what torch's pytrees know, but returned {described(output)}"
            )

    def _count(self, module: Any, args: object, output: Any) -> None:
        if isinstance(output, Tensor):
            self.positions[module] = output.shape[-len(module.kernel_size) :].numel()

    def require_same(self, model: nn.Module, format: str) -> None:
        """Raise RuntimeError unless the model returns the same as before, to rounding."""
        undone = "so nothing but masks was removed"
        try:
            after = _tensors(self.run(model))
        except Exception as error:
            raise RuntimeError(
                f"with format {format!r} the model fails for example_input, {undone}: {error}"
            ) from error
        if [t.shape for t in after] != [t.shape for t in self._before]:
            raise RuntimeError(
                f"with format {format!r} the outputs for example_input have other shapes than "
                f"before, {undone}"
            )
        for old, new in zip(self._before, after, strict=True):
            worst = _worst(old, new)
            if not worst <= 1:
                raise RuntimeError(
                    f"with format {format!r} an output for example_input, of shape "
                    f"{list(old.shape)}, differs from that before by {worst:.3g} times what "
                    f"rounding may explain, {undone}; is the model random?"
                )

    def run(self, model: nn.Module) -> object:
        """Return what the model returns, without gradients and uncompiled."""
        with torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return model(*self.args, **self.kwargs)


def _tensors(output: object) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(output) if isinstance(each, Tensor)]


def _worst(old: Tensor, new: Tensor) -> float:
    """Return the largest difference, in units of what rounding may explain: half of all digits."""
    if not old.is_floating_point():
        return 0.0 if torch.equal(old, new) else torch.inf
    finite = old.isfinite()
    if not torch.equal(finite, new.isfinite()) or not torch.equal(
        old[~finite].nan_to_num(), new[~finite].nan_to_num()
    ):
        return torch.inf
    if not finite.any():
        return 0.0
    before, after = (each[finite].cpu().double() for each in (old, new))
    difference = (before - after).abs().max().item()
    eps = torch.finfo(old.dtype).eps
    return difference / (eps**0.5 * before.abs().max().item() + eps)

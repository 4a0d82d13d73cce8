"""Choose how a model's layers get masked weights: together, or once for several forwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..arguments import require_module, require_number
from .find import masked_layers
from .layer import MaskedLayer
from .sources import reused
from .sources.grouped import Group


def group_(model: nn.Module, bucket_mb: float = 25) -> nn.Module:
    """Mask the layers of `model` together: one launch for many, in forward and in backward.

    Before each forward of `model`, the masked weights of all its layers are made in one launch
    per bucket; in backward one launch makes the gradients of all weights and thresholds of a
    bucket, once the last of its layers is done. All values equal those of layers on their own, bit
    for bit, except that a layer used twice adds up its two gradients before they pass the mask. The
    gradients of biases are those of torch's own layers, which under autocast are sums in the dtype
    of the product. This pays for small and middle-sized layers, where launches cost most.

    Layers with more than `bucket_mb` MB of weights, with path="fused", sharded by FSDP2 or with a
    fixed mask are still masked one by one, as are all in compiled code; a recurrent module is its
    own group. Each bucket's gradients arrive together, so buckets like those of
    DistributedDataParallel (25 MB) keep its overlap.

    In place; return `model`. A second call changes `bucket_mb`; `ungroup_` undoes it. Give the
    module that is called in training: `model(input)` must run the hooks of `model`.

    Raises ValueError for a model without masked layers and for `bucket_mb` that is not positive,
    TypeError for what is no module or no number.
    """
    require_number("bucket_mb", bucket_mb, positive=True)
    layers = masked_layers(model)
    ungroup_(model)
    group = Group(layers, int(bucket_mb * 2**20))
    model.register_forward_pre_hook(group.before)
    model.register_forward_hook(group.after, always_call=True)
    return model


def ungroup_(model: nn.Module) -> nn.Module:
    """Undo `group_`, in place; return `model`. Raises TypeError if it is no module."""
    require_module(model)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(_owner(hook), Group)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    return model


def is_grouped(model: nn.Module) -> bool:
    return any(isinstance(_owner(hook), Group) for hook in model._forward_pre_hooks.values())


def _owner(hook: object) -> object:
    return getattr(hook, "__self__", None)


@contextlib.contextmanager
def weights_unchanged(model: nn.Module) -> Iterator[None]:
    """Promise that weights and thresholds of `model` do not change inside this scope.

    Its masked layers then mask and cast each weight once, not once per forward: for the
    micro-batches of a gradient accumulation, or an evaluation. It costs one copy of each masked
    weight in the compute dtype while the scope is open. Results are the same as without it.

    Optimizer steps, `load_state_dict`, in-place operations and new tensors inside the scope are
    noticed and lead to new copies. Writes through `.data` or from outside PyTorch are not: leave
    the scope before them. Layers sharded by FSDP2, compiled ones and recurrent modules still mask
    at every forward. Raises TypeError if `model` is no module.
    """
    require_module(model)
    opened = reused.open_for(m for m in model.modules() if isinstance(m, MaskedLayer))

    def clear(*_) -> None:
        for copies in opened.values():
            copies.clear()

    hook = register_optimizer_step_post_hook(clear)
    try:
        yield
    finally:
        hook.remove()
        reused.close(opened)

"""Whole training steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import dst_kernels
from dst_kernels.optim import DSTSGD, DSTAdamW
from dst_kernels.training.errors import require_one_of

from .. import networks
from ..cases import Mode, ModelCase, TrainingCase
from ..networks import ADAMW, SGD, image_layout
from . import authors
from .peers import fix_, sparselab, sparseprop
from .work import STEPS, Contender, Data, Prepared, Work, thresholds_for

# For checks: all that a step does shows in a few steps, and no layer collapses. Timed is a step at
# rest, after which the case is still what it says.
_LEARNING = {
    SGD: {"lr": 0.02, "weight_decay": 0.1, "alpha": 0.05},
    ADAMW: {"lr": 0.002, "weight_decay": 5.0, "alpha": 0.5},
}
_AT_REST = {"lr": 0.0, "weight_decay": 1e-4, "alpha": 1e-4}
_CHECKED_STEPS, _BEFORE_CAPTURE = 5, 2  # optimizers make their state in the first
_CHECKED_BATCH, _CHECKED_RATIO = 16, 0.5


class Setup(Data):
    """A model to be trained; with the numbers of its `recipe` nothing moves, unless it is small."""

    def __init__(self, case: ModelCase, device: torch.device) -> None:
        require_one_of("model", case.model, networks.MODELS)
        super().__init__(case, device)
        self.about, self.recipe = networks.MODELS[case.model], _AT_REST

    def small(self, mode: Mode) -> Setup:
        """Return a model of the same kind that learns: what is checked."""
        name = self.about.small or self.case.model
        small = Setup(ModelCase(name, _CHECKED_BATCH, remaining_ratio=_CHECKED_RATIO), self.device)
        small.mode, small.recipe = mode, _LEARNING[self.about.optimizer]
        return small

    def network(self, convert: Callable) -> nn.Module:
        """Return the model with layers as `convert` makes them, in training mode."""
        with torch.random.fork_rng([self.device] * (self.device.type == "cuda")), self.device:
            torch.manual_seed(0)
            model = self.about.network()
        model.to(dtype=self.mode.weight, memory_format=image_layout(self.device))
        model = convert(model).train()
        with torch.no_grad():
            for name, threshold in model.named_parameters():
                if "threshold" in name:
                    weight = model.get_parameter(name.replace("threshold", "weight"))
                    threshold.copy_(thresholds_for(weight, self.case.remaining_ratio))
        return model


class Training(Work):
    """A model, an optimizer and one batch, over and over.

    `convert` makes the layers of the dense model, `fix` then fixes masks. Of that, torch's
    optimizer (`fused` always, or on CUDA) gets `groups`; where they are None, ours takes its place.
    `penalty` is the regulariser, where the loss has it. With `compile`, model, loss and penalty go
    through torch.compile, the optimizer never.
    """

    def __init__(
        self, setup: Setup, convert, groups=None, penalty=None, compile=False, fix=None, fused=False
    ) -> None:
        # Parameters, packed copies and the optimizer's state count: one may be traded for another.
        on_gpu = setup.device.type == "cuda"
        self._before = torch.cuda.memory_allocated(setup.device) if on_gpu else None
        self._setup, self._loss = setup, setup.about.loss
        on = {"generator": torch.Generator(setup.device).manual_seed(0), "device": setup.device}
        self._input, self._target = setup.about.data(setup.case.batch, setup.mode, **on)
        model = setup.network(convert)
        self.model = fix(model, self._input) if fix else model
        self._optimizer = self._make_optimizer(groups, fused or on_gpu)
        objective = _Objective(self.model, self._loss, penalty, setup.recipe["alpha"])
        tune = self._loss is None  # of a single layer only: else it takes minutes
        self._objective = authors.compiled(objective, tune) if compile else objective

    def _make_optimizer(self, groups: Callable | None, fused: bool) -> torch.optim.Optimizer:
        adamw, on_gpu = self._setup.about.optimizer == ADAMW, self._before is not None
        options = self._setup.recipe | ({} if adamw else {"momentum": 0.9})
        if groups is None:  # ours adds the regulariser's gradient itself
            return (DSTAdamW if adamw else DSTSGD)(self.model, **options)
        del options["alpha"]
        options |= {"fused": fused} | ({"capturable": on_gpu} if adamw else {})
        return (torch.optim.AdamW if adamw else torch.optim.SGD)(groups(self.model), **options)

    def prepare(self, name: str) -> Prepared:
        """Return the whole step, or the optimizer's alone, which finds gradients there."""
        if name == "step":
            return Prepared(self.step, memory_before=self._before)
        self.step()
        return Prepared(self._optimizer.step, moved=self._bytes_of_optimizer())

    def _bytes_of_optimizer(self) -> int:
        """Count what an update reads and writes: gradient, parameter, state, next masked weight."""
        passes = 6 if self._setup.about.optimizer == ADAMW else 4
        packs = isinstance(self._optimizer, (DSTSGD, DSTAdamW))
        named, moved = dict(self.model.named_parameters()), 0
        for name, p in named.items():
            moved += p.numel() * p.element_size() * passes
            moved += 0 if p.grad is None else p.numel() * p.grad.element_size()
            if packs and "weight" in name and name.replace("weight", "threshold") in named:
                moved += p.numel() * self._setup.mode.compute.itemsize
        return moved

    def step(self) -> Tensor:
        """Do one step; returns the loss (or output), without the penalty, before the update."""
        self._optimizer.zero_grad(set_to_none=True)
        self._input.grad = None
        with self._setup.mode.autocast(self._setup.device.type):
            result, penalty = self._objective(self._input, self._target)
        if self._loss is not None:
            (result if penalty is None else result + penalty).backward()
        elif penalty is None:
            result.backward(self._target)
        else:
            torch.autograd.backward((result, penalty), (self._target, None))
        self._optimizer.step()
        return result.detach()

    def results(self, replay: Callable | None = None) -> dict[str, Tensor]:
        """Return the losses of five steps, the last replayed if asked, and what these changed."""
        before, steps = self._parameters(), (self.step() for _ in range(_CHECKED_STEPS))
        if replay is not None:
            steps = replay(self.step, _BEFORE_CAPTURE, _CHECKED_STEPS - _BEFORE_CAPTURE)
        if self._loss is None:  # a number also of an output
            steps = ((output.double() * self._target.double()).sum() for output in steps)
        losses = torch.tensor([step.item() for step in steps], dtype=torch.float64)
        moved = {name: p - before[name] for name, p in sorted(self._parameters().items())}
        thresholds = [moved.pop(name) for name in list(moved) if "threshold" in name]
        results = {"losses": losses, "weights": torch.cat(list(moved.values()))}
        return results | ({"thresholds": torch.cat(thresholds)} if thresholds else {})

    def _parameters(self) -> dict[str, Tensor]:
        """Return copies by name; of layers with a fixed mask dense weights, without thresholds."""
        named = dict(self.model.named_parameters())
        for name, layer in self.model.named_modules():
            if hasattr(layer, "dense_weight"):
                for own in {n for n, _ in layer.named_parameters()} - {"bias"}:
                    del named[f"{name}.{own}"]
                named[f"{name}.weight"] = layer.dense_weight()
        return {n: p.detach().double().flatten().clone() for n, p in named.items()}


class _Objective(nn.Module):
    """Returns the loss (or output, where the target is its gradient) and the weighted penalty."""

    def __init__(self, model: nn.Module, loss, penalty, alpha: float) -> None:
        super().__init__()
        self.model, self.loss, self.penalty, self.alpha = model, loss, penalty, alpha

    def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        output = self.model(input)
        result = output if self.loss is None else self.loss(output, target)
        return result, None if self.penalty is None else self.alpha * self.penalty(self.model)


def masked(model: nn.Module, **options: str) -> nn.Module:
    """Mask what the authors' layers can mask too: no parameter of a module with its own forward."""
    config = dst_kernels.SparsifyConfig.paper(parameters=False, **options)
    attention = nn.modules.linear.NonDynamicallyQuantizableLinear
    return dst_kernels.sparsify_(model, config, filter_fn=lambda m, _: type(m) is not attention)


def _model(name: str, *rule, fix=None, fused: bool = False, passes=STEPS, **options) -> Contender:
    how = {"compile": options.get("compiled", False), "fix": fix, "fused": fused}
    return Contender(name, lambda setup: Training(setup, *rule, **how), passes, **options)


_ALL = lambda model: list(model.parameters())  # noqa: E731
_DENSE = (lambda model: model), _ALL
# Torch's optimizer and the regulariser in the loss: ours as the README shows, and the authors'.
_OURS = dst_kernels.parameter_groups, dst_kernels.sparse_regularization
_THEIRS = authors.parameter_groups, authors.authors_regularization

REFERENCE = _model("reference", partial(masked, backend="reference"), *_OURS)

# Compiled ones so that goals can be judged though the time is up before the last.
MODELS = (
    _model("dense", *_DENSE, masked=False),
    _model("deferred", masked),
    _model("grouped", lambda model: dst_kernels.group_(masked(model)), *_OURS),
    _model("masked", masked, *_OURS),
    _model("dst_eager", authors.convert_, *_THEIRS, graphable=False),
    _model("dst_compiled", authors.convert_branch_free_, *_THEIRS, compiled=True),
    _model("deferred_compiled", masked, compiled=True),
    _model("dense_compiled", *_DENSE, masked=False, compiled=True),
    _model("masked_compiled", masked, *_OURS, compiled=True),
)

# On a CPU, where steps may get faster as they get sparser: torch's fused SGD, or ours, and no guard
# that resets 1 %. Peers have fixed masks and leave the last layer dense.
_step = partial(_model, passes=("step",), fused=True)
_every = partial(masked, reset_ratio=TrainingCase.guard)
_but_last = partial(_every, skip_last=True)
_reference = partial(_model, "reference", partial(_but_last, backend="reference"))
_FIXED = _reference(_ALL, fix=fix_)


def _peer(make: Callable) -> Contender:
    fix, right = partial(fix_, peer=make), {"exact": False, "reference": _FIXED}
    return _step(make.__name__, _but_last, _ALL, fix=fix, **right)


TRAININGS = (
    _step("dense", *_DENSE, masked=False),
    _step("deferred", _every),
    _step("deferred_packed", partial(_every, path="packed")),
    _step("deferred_last_dense", _but_last, reference=_reference(*_OURS)),
    _step("fixed_sgd", _but_last, _ALL, fix=fix_, reference=_FIXED),
    _step("fixed_deferred", _but_last, fix=fix_, reference=_FIXED),
    _peer(sparselab),
    _peer(sparseprop),
)

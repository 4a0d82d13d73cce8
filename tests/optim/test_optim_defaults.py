"""Default dtypes and devices that are set around what the package does: all stays as without."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dst_kernels
from dst_kernels.optim import DSTSGD, DSTAdamW


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "with meta": lambda: torch.device("meta"),
}
every_default = pytest.mark.parametrize("default", DEFAULTS.values(), ids=DEFAULTS)
WAYS = {
    "DSTSGD": lambda model: DSTSGD(model, lr=0.1, momentum=0.9, alpha=0.01),
    "DSTAdamW": lambda model: DSTAdamW(model, lr=0.01, alpha=0.01),
    "grouped": lambda model: plain(dst_kernels.group_(model)),
    "layer by layer": lambda model: plain(model),
}


def plain(model):
    return torch.optim.SGD(dst_kernels.parameter_groups(model), lr=0.1)


class Network(nn.Module):
    """Has a layer of each kind, and one that conversion leaves dense."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(3, 6, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm1d(6)
        self.up = nn.ConvTranspose1d(6, 4, 2, stride=2)
        self.lstm = nn.LSTM(4, 5)
        self.embedding = nn.Embedding(7, 5)
        self.middle = nn.Linear(5, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = self.up(self.norm(self.conv(x)).relu()).permute(2, 0, 1)
        x = self.lstm(x)[0][-1] + self.embedding.weight[0]
        return self.last(self.middle(x).relu())


def images(seed=0):
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(seed))


IMAGES = images()


def converted(way="layer by layer"):
    model = dst_kernels.sparsify_(Network())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "threshold" in name:
                parameter.uniform_(0, 0.1)
    return model, WAYS[way](model)


def all_tensors(model, optimizer):
    """Yield (name, tensor) of all that is kept."""
    yield from model.state_dict().items()
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                yield f"{name} of {index}", value


def assert_identical(actual, expected, what):
    assert actual.device == expected.device, what
    assert actual.dtype == expected.dtype, what
    assert torch.equal(actual, expected), what


TRAINING = ("forward", "backward", "grad_norm", "clip", "step", "state")


def train(way, default, around):
    """Return what four steps leave, where `default` holds around the parts named."""

    def within(part):
        return default() if part in around else contextlib.nullcontext()

    model, optimizer = converted(way)
    found = []
    for step in range(4):
        x, target = images(step), torch.arange(4)
        with within("forward"):
            output = model(x)
        loss = F.cross_entropy(output, target)
        found.append(("output", output.detach()))
        with within("backward"):
            loss.backward()
        if hasattr(optimizer, "grad_norm"):
            with within("grad_norm"):
                found.append(("norm", optimizer.grad_norm()))
            with within("clip"):
                found.append(("norm", optimizer.clip_grad_norm_(0.2)))
        if isinstance(optimizer, DSTSGD | DSTAdamW):
            with within("step"):
                optimizer.step()
        else:  # torch's own, which makes its state where the default says
            optimizer.step()
        optimizer.zero_grad()
        with within("state"):
            if isinstance(optimizer, DSTSGD | DSTAdamW):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            model.load_state_dict(copy.deepcopy(model.state_dict()))
    return [*found, *all_tensors(model, optimizer)]


@every_default
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("around", [*TRAINING, TRAINING], ids=[*TRAINING, "all"])
def test_training(default, way, around):
    expected = train(way, default, ())
    actual = train(way, default, around if isinstance(around, tuple) else (around,))
    for (what, ours), (_, theirs) in zip(actual, expected, strict=True):
        assert_identical(ours, theirs, what)


@every_default
@pytest.mark.parametrize("way", ["DSTSGD", "DSTAdamW"])
def test_loading_a_state(default, way):
    model, optimizer = converted(way)
    model(images()).sum().backward()
    optimizer.step()
    before = list(all_tensors(model, optimizer))
    state = copy.deepcopy(optimizer.state_dict())
    with default():
        optimizer.load_state_dict(state)
    for (what, value), (_, its) in zip(all_tensors(model, optimizer), before, strict=True):
        assert_identical(value, its, what)
    optimizer.step()


@every_default
def test_a_first_step_without_any_gradient(default):
    _, optimizer = converted("DSTSGD")
    with default():
        norm = optimizer.grad_norm()
        optimizer.step()
    _, other = converted("DSTSGD")
    assert_identical(norm, other.grad_norm(), "norm")


@every_default
@pytest.mark.parametrize("way", ["DSTSGD", "DSTAdamW"])
def test_making_an_optimizer(default, way):
    model, _ = converted()
    with default():
        optimizer = WAYS[way](model)
    model(images()).sum().backward()
    optimizer.step()
    other, its_optimizer = converted(way)
    other(images()).sum().backward()
    its_optimizer.step()
    pairs = zip(all_tensors(model, optimizer), all_tensors(other, its_optimizer), strict=True)
    for (what, ours), (_, theirs) in pairs:
        assert_identical(ours, theirs, what)


ON_MODELS = {
    "report": lambda model: dst_kernels.sparsity_report(model),
    "ratio": lambda model: dst_kernels.remaining_ratio(model),
    "regulariser": lambda model: dst_kernels.sparse_regularization(model),
    "masks": lambda model: [part.mask() for m in model.modules() for part in weights_of(m)],
    "plan": lambda model: dst_kernels.plan_sparsify(model),
    "finalize_": lambda model: dst_kernels.finalize_(model),
    "densify_": lambda model: dst_kernels.densify_(model),
    "reset": lambda model: [m.reset_threshold(0.05) for m in model.modules() if weights_of(m)],
    "evaluation": lambda model: model.eval()(IMAGES),
    "reused": lambda model: reused(model),
    "copy": lambda model: copy.deepcopy(model)(IMAGES),
}


def weights_of(module):
    return module.masked_weights() if hasattr(module, "masked_weights") else ()


def reused(model):
    with torch.no_grad(), dst_kernels.weights_unchanged(model):
        return [model(IMAGES) for _ in range(2)]


@every_default
@pytest.mark.parametrize("act", ON_MODELS.values(), ids=ON_MODELS)
def test_what_is_done_to_a_masked_model(act, default):
    model, expected = converted()[0], converted()[0]
    result = act(expected)
    with default():
        ours = act(model)
    if not isinstance(ours, nn.Module):
        assert str(ours) == str(result)
    for (name, value), (_, its) in zip(
        model.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        assert_identical(value, its, name)
    assert_identical(model(images()), expected(images()), "output")


@every_default
@pytest.mark.parametrize("granularity", ["row", "layer", "element"])
def test_converting_an_existing_model(granularity, default):
    config = dst_kernels.SparsifyConfig(granularity=granularity)
    model, expected = Network(), dst_kernels.sparsify_(Network(), config)
    with default():
        dst_kernels.sparsify_(model, config)
    assert len(model.state_dict()) > len(Network().state_dict())
    for (name, value), (_, its) in zip(
        model.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        assert_identical(value, its, name)

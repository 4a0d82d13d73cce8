"""Large float32 products on CPUs: by oneDNN where it is the faster library, else by torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import dst_kernels
from dst_kernels.autograd import onednn
from dst_kernels.nn import MaskedLinear
from dst_kernels.optim import DSTSGD

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch is built without oneDNN"
)
ROWS, COLUMNS, TOKENS = 300, 500, 16


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """Take oneDNN on every CPU; return the list of products that it has made."""
    made = []
    original = onednn.linear

    def linear(input, weight, bias=None):
        made.append(input.shape)
        return original(input, weight, bias)

    monkeypatch.setattr(onednn, "_least_on_this_machine", lambda: 1)
    monkeypatch.setattr(onednn, "linear", linear)
    return made


def layer(path: str = "auto", dtype: torch.dtype = torch.float32) -> MaskedLinear:
    torch.manual_seed(0)
    made = MaskedLinear(COLUMNS, ROWS, path=path)
    made.threshold.data = made.weight.detach().abs().quantile(0.1, dim=1)
    return made.to(dtype)


INPUTS = {
    "matrix": lambda x: x,
    "sequences": lambda x: x.view(2, TOKENS // 2, COLUMNS),
    "transposed": lambda x: x.t().contiguous().t(),
    "few": lambda x: x[:3],
}
GRADS = {"dense": torch.sin, "expanded": lambda output: output.sum().expand_as(output) * 0 + 0.5}


@pytest.mark.parametrize("path", ["auto", "packed", "sparse"])
@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("view", INPUTS)
def test_output_and_gradients_are_those_of_float64(view, grad, path, products):
    x = torch.randn(TOKENS, COLUMNS)
    found = []
    for dtype in (torch.float32, torch.float64):
        module = layer(path, dtype)
        input = INPUTS[view](x.to(dtype)).detach().requires_grad_()
        output = module(input)
        if grad == "expanded":
            output.backward(torch.tensor(0.5, dtype=dtype).expand_as(output))
        else:
            output.sin().sum().backward()
        found.append([output, input.grad, *(each.grad for each in module.parameters())])
    for actual, exact in zip(*found, strict=True):
        error = (actual.double() - exact).abs().max()
        assert error <= 2e-6 * exact.abs().max() * TOKENS**0.5
    by_onednn = {"auto": 3, "packed": 3, "sparse": 1}[path] if view != "few" else 0
    assert len(products) == by_onednn


def test_other_uses_are_torchs_own(products):
    module, x = layer(), torch.randn(TOKENS, COLUMNS)
    weights = dict(module.named_parameters())
    torch.func.grad(lambda w: torch.func.functional_call(module, w, (x,)).sum())(weights)
    torch.compile(module, backend="eager")(x).sum().backward()
    with forward_ad.dual_level():
        module(forward_ad.make_dual(x, x))
    with torch.no_grad():
        module(x)
    with torch.backends.mkldnn.flags(enabled=False):
        module(x).sum().backward()
    layer(dtype=torch.bfloat16)(x.bfloat16()).sum().backward()
    assert products == []


def test_second_derivatives(products):
    module, x = layer("packed"), torch.randn(TOKENS, COLUMNS, requires_grad=True)
    found = []
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            (first,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found)
    assert products


@pytest.fixture
def memory_of_large_gradients(monkeypatch):
    monkeypatch.setattr(onednn, "_LARGE", 1)
    monkeypatch.setattr(onednn, "_PIECE", 7 * COLUMNS)  # the last piece has fewer rows


def gradients_of(steps: int, keep: bool, enabled: bool = True) -> tuple[list, nn.Module]:
    """Train; return where the weight's gradient was in each step, and the model."""
    torch.manual_seed(0)
    model = dst_kernels.sparsify_(nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.ReLU()))
    optimizer = DSTSGD(model, lr=0.1, momentum=0.9, alpha=1e-4)
    x, where, kept = torch.randn(TOKENS, COLUMNS), [], []
    with torch.backends.mkldnn.flags(enabled=enabled):
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            where.append(model[0].weight.grad.data_ptr())
            if keep:
                kept.append((model[0].weight.grad, model[0].weight.grad.clone()))
            optimizer.step()
    for grad, copy in kept:
        torch.testing.assert_close(grad, copy, rtol=0, atol=0)
    return where, model


@pytest.mark.usefixtures("memory_of_large_gradients")
def test_the_memory_of_a_large_gradient_is_used_again():
    where, model = gradients_of(5, keep=False)
    assert len(set(where[1:])) == 1  # the first forward has no optimizer's step before it
    _, expected = gradients_of(5, keep=False, enabled=False)
    for actual, exact in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("memory_of_large_gradients")
def test_a_gradient_that_somebody_keeps_stays_as_it_is():
    where, _ = gradients_of(5, keep=True)
    assert len(set(where)) == 5


@pytest.mark.usefixtures("memory_of_large_gradients")
def test_gradients_of_several_backwards_add_up():
    module = dst_kernels.sparsify_(nn.Sequential(nn.Linear(COLUMNS, ROWS)))
    DSTSGD(module, lr=0.1)
    x = torch.randn(TOKENS, COLUMNS)
    module(x).square().sum().backward()
    once = module[0].weight.grad.clone()
    module(x).square().sum().backward()
    torch.testing.assert_close(module[0].weight.grad, 2 * once)

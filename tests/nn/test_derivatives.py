"""Second derivatives through the input, torch.func, batched gradients and forward-mode AD.

Expected are plain torch's layers with a weight that tests/ops/authors.py masks, and loops.
"""

from __future__ import annotations

import pytest
import recurrent_cases
import torch
from layer_cases import CASES, collapsing, every_layer
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)  # fmt: skip

import dst_kernels
import dst_kernels.functional as dst
from dst_kernels.nn import MaskedGRU, MaskedLinear, MaskedLSTM
from tests.ops import authors

REFUSED = "differentiated once only"
close = torch.testing.assert_close


class ReadsItsOwn(nn.Module):
    """Has a matrix, and two in one parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 5))
        self.pair = nn.Parameter(torch.randn(12, 6))

    def forward(self, input):
        return (input @ self.first.t()).tanh() @ self.pair.t()


def built(case, **options):
    torch.manual_seed(0)
    layer = case.masked(*case.args, **options).double()
    nn.init.uniform_(layer.threshold, 0, 0.1)
    return layer


def others():
    torch.manual_seed(0)
    module = ReadsItsOwn().double()
    dst_kernels.mask_parameter_(module, "first")
    dst_kernels.mask_parameter_(module, "pair", matrices=2)
    yield module, torch.randn(3, 5).double()
    yield (
        dst_kernels.group_(
            nn.Sequential(MaskedLinear(5, 6), nn.Tanh(), MaskedLinear(6, 4)).double()
        ),
        torch.randn(3, 5).double(),
    )
    for kind in (MaskedLSTM, MaskedGRU):
        yield recurrent_cases.build(kind), recurrent_cases.sequence()


EVERY = [(built(case), case.input(torch.float64)) for case in CASES] + list(others())
BATCHED = EVERY[:-2]  # torch's recurrent modules know no vmap
ids = lambda value: type(value).__name__ if isinstance(value, nn.Module) else ""  # noqa: E731
every_module = pytest.mark.parametrize(("module", "input"), EVERY, ids=ids)
modules_with_batches = pytest.mark.parametrize(("module", "input"), BATCHED, ids=ids)
training_or_not = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def output_of(module, *args):
    output = module(*args)
    return output[0] if isinstance(output, tuple) else output


def twin(case, layer):
    """A function of (input, weight, threshold, bias): torch's layer, with the authors' mask."""
    dense = case.dense(*case.args).double()

    def run(input, weight, threshold, bias):
        if "Transpose" in case.dense.__name__:
            rows = authors.masked_weight(authors.transposed(weight, layer.groups), threshold)
            masked = authors.transposed(rows, layer.groups)
        else:
            masked = authors.masked_weight(weight, threshold)
        return functional_call(dense, {"weight": masked, "bias": bias}, (input,))

    return run


# -- second derivatives through the input ------------------------------------------------------


@every_layer
@pytest.mark.parametrize("way", ["layer by layer", "grouped"])
def test_a_loss_on_forces_trains_weights_and_thresholds(case, way):
    layer = built(case)
    model = dst_kernels.group_(nn.Sequential(layer)) if way == "grouped" else layer
    names = ("weight", "threshold", "bias")
    leaves = [getattr(layer, name).detach().clone().requires_grad_() for name in names]

    def loss(run):
        input = case.input(torch.float64).requires_grad_()
        energy = run(input).tanh().square().sum()
        (force,) = torch.autograd.grad(energy, input, create_graph=True)
        return energy + (force - 0.3).square().sum()

    loss(model).backward()
    reference = twin(case, layer)
    expected = torch.autograd.grad(loss(lambda input: reference(input, *leaves)), leaves)
    for name, gradient in zip(names, expected, strict=True):
        close(getattr(layer, name).grad, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [MaskedLSTM, MaskedGRU])
def test_a_loss_on_forces_of_a_recurrent_module(kind):
    module = recurrent_cases.build(kind)
    dense = recurrent_cases.dense_twin(module)
    for each in (module, dense):
        input = recurrent_cases.sequence().requires_grad_()
        energy = recurrent_cases.objective(each(input))
        (force,) = torch.autograd.grad(energy, input, create_graph=True)
        (energy + force.square().sum()).backward()
    for name, gradient in recurrent_cases.expected_gradients(module, dense).items():
        close(module.get_parameter(name).grad, gradient, rtol=1e-12, atol=1e-12)


@every_layer
@training_or_not
def test_derivatives_of_the_input(case, training):
    """With what torch.func offers and dual tensors, as of torch's own layer."""
    layer = built(case).train(training)
    reference, x = twin(case, layer), case.input(torch.float64)
    with torch.no_grad():
        masked = dst_kernels.finalize_(nn.Sequential(layer))[0].weight.detach()
    layer = built(case).train(training)
    dense = case.dense(*case.args).double()
    parameters = {"weight": masked, "bias": layer.bias.detach()}
    plain = lambda x: functional_call(dense, parameters, (x,))  # noqa: E731
    close(plain(x), reference(x, layer.weight, layer.threshold, layer.bias))
    scalar = lambda run: lambda x: run(x).tanh().sum()  # noqa: E731
    tangent = x.cos()

    def dual(run):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(run(forward_ad.make_dual(x, tangent))).tangent

    for derive in (
        lambda run: hessian(scalar(run))(x[:1]),
        lambda run: jacrev(jacrev(scalar(run)))(x[:1]),
        lambda run: jacfwd(run)(x[:1]),
        lambda run: jvp(run, (x,), (tangent,)),
        lambda run: linearize(run, x)[1](tangent),
        lambda run: vjp(run, x)[1](plain(x)),
        lambda run: vmap(grad(lambda one: scalar(run)(one[None])))(x),
        dual,
    ):
        close(derive(layer), derive(plain), rtol=1e-10, atol=1e-12)


# -- batches of gradients and of weights -------------------------------------------------------


@modules_with_batches
@training_or_not
def test_gradients_of_each_sample(module, input, training):
    module.train(training)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, sample):
        return functional_call(module, parameters, (sample[None],)).tanh().square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, input)
    one_by_one = [grad(loss)(parameters, sample) for sample in input]
    for name in parameters:
        close(found[name], torch.stack([each[name] for each in one_by_one]))
    if isinstance(module, MaskedLinear):  # torch's convolutions know no empty batch
        assert vmap(grad(loss), in_dims=(None, 0))(parameters, input[:0])["weight"].shape[0] == 0


@every_module
def test_batched_gradients(module, input):
    parameters = list(module.parameters())
    output = output_of(module, input)
    grads = torch.randn(3, *output.shape, dtype=output.dtype)
    found = torch.autograd.grad(output, parameters, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(output, parameters, one, retain_graph=True) for one in grads]
    for i, gradients in enumerate(found):
        close(gradients, torch.stack([one[i] for one in each]))


@every_layer
def test_an_ensemble(case):
    layers = [built(case), built(case), built(case)]
    for i, layer in enumerate(layers):
        nn.init.constant_(layer.threshold, 0.1 * i)
    input, (parameters, _) = case.input(torch.float64), stack_module_state(layers)

    def loss(parameters):
        return functional_call(layers[0], parameters, (input,)).square().sum()

    gradients, losses = torch.func.vmap(torch.func.grad_and_value(loss))(parameters)
    for i, layer in enumerate(layers):
        expected = layer(input).square().sum()
        close(losses[i], expected)
        expected.backward()
        for name, parameter in layer.named_parameters():
            close(gradients[name][i], parameter.grad)


# -- the guard ---------------------------------------------------------------------------------


@every_module
def test_a_reset_is_written_by_the_next_forward_outside(module, input):
    module.train()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    thresholds = {name: p for name, p in module.named_parameters() if "threshold" in name}
    try:
        for threshold in thresholds.values():
            nn.init.constant_(threshold, 10.0)
        scalar = lambda x: output_of(module, x).square().sum()  # noqa: E731
        gradient = grad(scalar)(input)
        assert all((threshold == 10).all() for threshold in thresholds.values())
        x = input.clone().requires_grad_()
        scalar(x).backward()
        close(gradient, x.grad)
        assert not any(threshold.any() for threshold in thresholds.values())
    finally:
        module.zero_grad()
        module.load_state_dict(before)


def test_a_reset_reaches_the_thresholds_that_a_function_is_given():
    layer = collapsing(MaskedLinear(5, 4))
    parameters = {name: p.detach().clone() for name, p in layer.named_parameters()}
    grad(lambda p: functional_call(layer, p, (torch.ones(2, 5),)).sum())(parameters)
    assert not parameters["threshold"].any() and layer.threshold.all()


# -- the fused path ----------------------------------------------------------------------------


def test_the_fused_path_says_where_second_derivatives_are():
    """Its own first derivatives are right under torch.func too."""
    fused, packed = (
        MaskedLinear(5, 4, path=path, backend="reference") for path in ("fused", "packed")
    )
    packed.load_state_dict(fused.state_dict())
    input = torch.randn(3, 5)

    def gradients(layer):
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        loss = lambda p, x: functional_call(layer, p, (x[None],)).square().sum()  # noqa: E731
        return vmap(grad(loss), in_dims=(None, 0))(parameters, input)

    for name, gradient in gradients(packed).items():
        close(gradients(fused)[name], gradient)
    close(jacrev(fused)(input), jacrev(packed)(input))
    for refused in (
        lambda: hessian(lambda x: fused(x).square().sum())(input),
        lambda: jvp(fused, (input,), (input,)),
        lambda: jacrev(jacrev(lambda x: fused(x).square().sum()))(input),
    ):
        with pytest.raises(RuntimeError, match="path='packed'"):
            refused()


# -- what there is not -------------------------------------------------------------------------


@every_module
def test_second_and_forward_derivatives_of_weights_are_refused(module, input):
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    loss = lambda p, x: output_of(functional_call, module, p, (x,)).square().sum()  # noqa: E731
    total = lambda p, x: sum(g.square().sum() for g in grad(loss)(p, x).values())  # noqa: E731
    ones = {name: torch.ones_like(p) for name, p in parameters.items()}
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative .* use reverse mode"):
        jvp(lambda p: loss(p, input), (parameters,), (ones,))
    for refused in (
        lambda: grad(total)(parameters, input),
        lambda: jvp(lambda x: total(parameters, x), (input,), (input,)),
        lambda: jacrev(jacrev(loss))(parameters, input),
    ):
        with pytest.raises(RuntimeError, match=REFUSED):
            refused()
    x = input.clone().requires_grad_()
    output_of(module, x).square().sum().backward(create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        sum(p.grad.square().sum() for p in module.parameters()).backward()
    module.zero_grad()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=REFUSED):
        output_of(module, forward_ad.make_dual(input, input)).square().sum().backward()


@pytest.mark.parametrize("where", ["weight", "threshold"])
def test_second_derivatives_where_the_output_is_linear_in_the_mask(where):
    """No silent omission: G is a constant here, and yet dW depends on W."""
    weight, threshold = torch.randn(4, 3, requires_grad=True), torch.zeros(4, requires_grad=True)
    loss = dst.masked_weight(weight, threshold).sum() + weight.pow(3).sum() + threshold.exp().sum()
    leaf = {"weight": weight, "threshold": threshold}[where]
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(first.sum(), leaf)

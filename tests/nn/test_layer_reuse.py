"""`weights_unchanged`: one pack for many forwards, the same results; and nothing stale, ever."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from layer_cases import GRANULARITIES, every_granularity, every_layer
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.optim.swa_utils import AveragedModel

from dst_kernels import autograd, ops, weights_unchanged
from dst_kernels.nn import MaskedLinear
from dst_kernels.nn.sources import copies_of

# The paths on which a layer has a use for the copy.
PACKING = ("packed", "mixed")
packing = pytest.mark.parametrize("path", PACKING)


@pytest.fixture
def packs(monkeypatch):
    """The dtypes of all packs so far."""
    made = []
    run, run_with_commit = ops.call, ops.commit_masked_weight

    def call(op, *args):
        if op is ops.masked_weight:
            made.append(args[3])
        return run(op, *args)

    def commit(*args):
        made.append(args[3])
        return run_with_commit(*args)

    monkeypatch.setattr(ops, "call", call)
    monkeypatch.setattr(ops, "commit_masked_weight", commit)
    return made


def layer_of(device, path="packed", **options):
    torch.manual_seed(1)
    layer = MaskedLinear(8, 6, path=path, device=device, **options)
    layer.reset_threshold(0.1)
    return layer


@pytest.fixture
def layer(device):
    return layer_of(device)


@pytest.fixture
def input(device):
    return torch.randn(3, 8, device=device)


def fresh(layer):
    """A new layer with the same numbers, which has never packed anything."""
    twin = MaskedLinear(
        8, 6, path="fused", backend=layer.backend, device=layer.weight.device,
        reset_ratio=layer.reset_ratio,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(layer.get_parameter(name).detach().clone())
    return twin.train(layer.training)


def assert_as_fresh(layer, input):
    """Output and gradients are those of a layer that cannot have anything stale."""
    twin, results = fresh(layer), []
    for model in (layer, twin):
        leaf = input.clone().requires_grad_()
        output = model(leaf)
        leaves = leaf, model.weight, model.threshold
        results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    torch.testing.assert_close(results[0], results[1])
    assert torch.equal(layer.threshold, twin.threshold)


# -- one pack --------------------------------------------------------------------------------------


@packing
def test_several_forwards_pack_once(path, packs, input, device):
    for training in (True, False):
        layer = layer_of(device, path).train(training)
        packs.clear()
        with weights_unchanged(layer):
            for _ in range(3):
                layer(input)
        assert len(packs) == 1
        for _ in range(2):
            layer(input)
        assert len(packs) == 3, "outside the scope each forward packs"


@every_layer
def test_every_layer_packs_once(case, packs):
    """A transposed convolution packs with a view of its threshold; the commit's is the tensor's."""
    for granularity, training in itertools.product(GRANULARITIES, (True, False)):
        layer = case.masked(*case.args, granularity=granularity, path="packed").train(training)
        layer.reset_threshold(9.0)
        packs.clear()
        with weights_unchanged(layer):
            for _ in range(3):
                layer(case.input())
            assert len(packs) == 1
            layer.reset_threshold(0.05)
            layer(case.input())
            assert len(packs) == 2


@pytest.fixture
def deterministic_convolutions():
    """On a GPU their gradients need not repeat bit by bit."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield


@every_layer
@every_granularity
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_results_and_gradients_are_those_without_the_scope(
    case, granularity, training, backend, device, deterministic_convolutions
):
    options = {"granularity": granularity, "backend": backend, "device": device}
    layer = case.masked(*case.args, path="packed", **options).train(training)
    layer.reset_threshold(0.05)
    twin = copy.deepcopy(layer)
    inputs = [torch.randn(case.input_shape, device=device) for _ in range(3)]
    outputs = []
    with weights_unchanged(layer):
        for input in inputs:
            outputs.append(layer(input))
            outputs[-1].square().sum().backward()
    for input, output in zip(inputs, outputs, strict=True):
        expected = twin(input)
        assert torch.equal(output, expected)
        expected.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, twin.get_parameter(name).grad), name
        assert torch.equal(parameter, twin.get_parameter(name)), name


@packing
def test_a_committed_reset_does_not_pack_again(path, packs, input, device):
    layer = layer_of(device, path)
    layer.reset_threshold(9.0)
    twin = copy.deepcopy(layer)
    with weights_unchanged(layer):
        outputs = [layer(input) for _ in range(3)]
    assert len(packs) == 1
    assert not layer.threshold.any(), "the first forward committed the reset"
    for output in outputs:
        torch.testing.assert_close(output, twin(input))
    sum(output.sum() for output in outputs).backward()
    assert layer.threshold.grad.isfinite().all() and layer.weight.grad.any()


def test_evaluation_with_a_pending_reset_does_not_write(packs, layer, input):
    layer.eval().reset_threshold(9.0)
    with weights_unchanged(layer):
        for _ in range(2):
            assert torch.equal(layer(input), layer.to_dense()(input))
    assert bool((layer.threshold == 9.0).all())
    assert packs.count(torch.float32) == 3, "one for the layer, two for to_dense"


@packing
def test_gradients_accumulated_over_micro_batches_equal_the_big_batch(path, device):
    model = nn.Sequential(layer_of(device, path), nn.Tanh(), MaskedLinear(6, 3, path=path))
    model.to(device, torch.float64)
    twin = copy.deepcopy(model)
    batch = torch.randn(12, 8, dtype=torch.float64, device=device)
    with weights_unchanged(model):
        for part in batch.split(3):
            model(part).square().sum().backward()
    twin(batch).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad, msg=name)


def test_a_fused_path_takes_no_copy_it_does_not_need(packs, input, device):
    layer = layer_of(device, "fused")
    with weights_unchanged(layer):
        assert_as_fresh(layer, input)
    assert packs == []


# -- what leads to a new pack ----------------------------------------------------------------------


@torch.no_grad()
def one_element(layer):
    layer.weight[0, 0] = 7.0


def load(layer, **options):
    layer.load_state_dict({k: v + 0.3 for k, v in layer.state_dict().items()}, **options)


@torch.no_grad()
def swapped_by_copy(layer):
    average = {name: parameter * 0.5 for name, parameter in layer.named_parameters()}
    for name, parameter in layer.named_parameters():
        parameter.copy_(average[name])


def averaged_through_data(layer):
    for parameter in layer.parameters():
        parameter.data.copy_(0.5 * parameter.data)


CHANGES = {
    "in place": torch.no_grad()(lambda layer: layer.weight.mul_(-1.5)),
    "threshold in place": torch.no_grad()(lambda layer: layer.threshold.fill_(0.25)),
    "one element": one_element,
    "loaded": load,
    "loaded and assigned": lambda layer: load(layer, assign=True),
    "data assigned": lambda layer: setattr(layer.weight, "data", layer.weight.data * -2),
    "threshold data assigned": lambda layer: setattr(
        layer.threshold, "data", layer.threshold.data + 0.2
    ),
    "new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.data * 3)),
    "swapped by copy": swapped_by_copy,
    "initialised": lambda layer: nn.init.normal_(layer.weight),
    "reset": lambda layer: layer.reset_parameters(),
}
# These leave no trace, so only the end of a scope can notice them.
WITHOUT_TRACE = {
    "written through data": lambda layer: layer.weight.data.mul_(-2),
    "threshold written through data": lambda layer: layer.threshold.data.add_(0.2),
    "averaged through data": averaged_through_data,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed(change, packs, input, device):
    for path, training in itertools.product(PACKING, (True, False)):
        layer = layer_of(device, path).train(training)
        packs.clear()
        with weights_unchanged(layer):
            before = layer(input)
            change(layer)
            assert_as_fresh(layer, input)
            assert not torch.equal(layer(input), before)
            assert len(packs) == 2


@packing
def test_outside_a_scope_nothing_is_stale(path, input, device):
    for change in (CHANGES | WITHOUT_TRACE).values():
        layer = layer_of(device, path)
        layer(input)
        change(layer)
        assert_as_fresh(layer, input)
        with weights_unchanged(layer):
            layer(input)
        change(layer)
        assert_as_fresh(layer, input)
        with weights_unchanged(layer):
            assert_as_fresh(layer, input)


def test_changes_before_a_backward_pass_leave_it_alone_or_are_an_error(input):
    """The gradient of the input is that of the weight the forward pass saw, or torch says no."""
    input.requires_grad_()
    for change in CHANGES.values():
        layer = layer_of(input.device)
        with weights_unchanged(layer):
            expected = torch.autograd.grad(layer(input).sum(), input)[0]
            output = layer(input)
            change(layer)
            layer(input)
            try:
                (actual,) = torch.autograd.grad(output.sum(), input)
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
            else:
                torch.testing.assert_close(actual, expected)


OPTIMIZERS = (
    *("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop"),
    *("Rprop", "ASGD", "Adafactor", "LBFGS"),
)


def ways_of(name):
    """The options with which torch takes a step in other ways."""
    yield {}
    if name != "LBFGS":
        yield {"foreach": True}
    if name in ("SGD", "Adam", "AdamW", "Adagrad"):
        yield {"fused": True}


def step(layer, optimizer, input):
    def closure():
        optimizer.zero_grad()
        loss = layer(input).square().sum()
        loss.backward()
        return loss

    closure()
    optimizer.step(closure if isinstance(optimizer, torch.optim.LBFGS) else None)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_s_step_is_noticed(name, input, device):
    """Fused ones do not count the versions of the parameters up."""
    for options in ways_of(name):
        layer = layer_of(device)
        optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.1, **options)
        with weights_unchanged(layer):
            for _ in range(3):
                before = layer.weight.detach().clone()
                step(layer, optimizer, input)
                assert not torch.equal(layer.weight, before)
                assert_as_fresh(layer, input)
        step(layer, optimizer, input)
        assert_as_fresh(layer, input)


def test_averaged_weights(layer, input):
    """torch's own averaging, swapped in between evaluations."""
    average = AveragedModel(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    with weights_unchanged(layer), weights_unchanged(average):
        for _ in range(3):
            step(layer, optimizer, input)
            average.update_parameters(layer)
            assert_as_fresh(layer, input)
            assert_as_fresh(average.module, input)
    assert not torch.equal(average.module.weight, layer.weight)


def test_memory_that_is_used_again_is_not_taken_for_the_old_weight(layer, input):
    """New tensors may come to lie where freed ones were: the second where the first has been."""
    with weights_unchanged(layer):
        for _ in range(20):
            layer(input)
            for _ in range(2):
                layer.weight.data = torch.randn(6, 8).to(input.device)
            assert_as_fresh(layer, input)


# -- dtypes, modes ---------------------------------------------------------------------------------


def test_each_dtype_gets_the_copy_it_needs(packs, layer, input, device):
    def under_autocast(dtype):
        with torch.autocast(device.type, dtype):
            return layer(input)

    dtypes = (torch.float16, torch.bfloat16)
    expected, plain = [under_autocast(dtype) for dtype in dtypes], layer(input)
    packs.clear()
    with weights_unchanged(layer):
        for _ in range(2):
            for dtype, output in zip(dtypes, expected, strict=True):
                assert torch.equal(under_autocast(dtype), output)
            assert torch.equal(layer(input), plain)
    assert packs == [*dtypes, torch.float32]


def test_a_backward_pass_after_a_change_of_dtype(layer, input, device):
    input.requires_grad_()
    with weights_unchanged(layer):
        with torch.autocast(device.type, torch.bfloat16):
            low = layer(input)
        high = layer(input)
        (of_low,) = torch.autograd.grad(low.float().sum(), input)
        (of_high,) = torch.autograd.grad(high.sum(), input)
    (exact,) = torch.autograd.grad(fresh(layer)(input).sum(), input)
    torch.testing.assert_close(of_high, exact)
    torch.testing.assert_close(of_low, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(of_low, of_high)


def test_train_and_eval_alternate(packs, layer, input):
    with weights_unchanged(layer):
        for training in (True, False, True, False):
            assert_as_fresh(layer.train(training), input)
    assert len(packs) == 1


@pytest.mark.parametrize("first", ["no_grad", "inference_mode", "enable_grad"])
def test_gradient_modes_alternate(first, layer, input):
    with weights_unchanged(layer):
        with getattr(torch, first)():
            layer(input)
        assert_as_fresh(layer, input)
        with torch.inference_mode():
            output = layer(input)
        assert torch.equal(output, layer(input).detach())
        assert_as_fresh(layer, input)


def test_options_changed_inside_the_scope(input, device):
    layer = layer_of(device, reset_ratio=None)
    layer.reset_threshold(9.0)
    with weights_unchanged(layer):
        assert torch.equal(layer(input), layer.bias.expand(3, 6))
        layer.reset_ratio = 0.01
        assert_as_fresh(layer, input)


def test_a_layer_moved_to_another_dtype(layer, input):
    with weights_unchanged(layer):
        layer(input)
        layer.double()
        expected = layer.to_dense()(input.double())
        torch.testing.assert_close(layer(input.double()), expected)
        layer.float()
        assert_as_fresh(layer, input)


# -- the scope itself ------------------------------------------------------------------------------


def has_packs(model):
    return [module for module in model.modules() if copies_of(module) is not None]


def test_the_scope_leaves_nothing_behind(layer, input):
    before, keys = set(layer.__dict__), list(layer.state_dict())
    with weights_unchanged(layer):
        layer(input)
        assert has_packs(layer)
        assert list(layer.state_dict()) == keys
        assert layer.to_dense().__dict__.keys() == nn.Linear(8, 6).__dict__.keys()
    assert layer.__dict__.keys() == before and not has_packs(layer)
    assert not _global_optimizer_post_hooks
    with pytest.raises(ZeroDivisionError), weights_unchanged(layer):
        layer(input)
        raise ZeroDivisionError
    assert not has_packs(layer) and not _global_optimizer_post_hooks
    layer.weight.data.mul_(-2)
    assert_as_fresh(layer, input)


def test_a_nested_scope_goes_on_with_the_outer_one_s_copies(packs, layer, input):
    model = nn.Sequential(layer)
    with weights_unchanged(model):
        model(input)
        with weights_unchanged(layer):
            model(input)
        model(input)
        assert len(packs) == 1
    assert not has_packs(model)


def test_an_outer_scope_over_more_layers(packs, layer, input, device):
    """The inner scope closes; what the outer one opened stays open."""
    model = nn.Sequential(layer, MaskedLinear(6, 4, path="packed", device=device))
    with weights_unchanged(layer):
        with weights_unchanged(model):
            model(input), model(input)
            assert len(packs) == 2
        assert has_packs(model) == [layer]
        model(input)
        assert len(packs) == 3
    assert not has_packs(model)


def test_a_step_inside_a_nested_scope_is_noticed_by_both(layer, input):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, fused=True)
    with weights_unchanged(layer):
        layer(input)
        with weights_unchanged(layer):
            step(layer, optimizer, input)
            assert_as_fresh(layer, input)
        step(layer, optimizer, input)
        assert_as_fresh(layer, input)


def test_layers_that_come_and_go_inside(packs, layer, input, device):
    """A late one just packs at every forward; one that is gone is closed all the same."""
    model = nn.Sequential(layer)
    with weights_unchanged(model):
        model(input)
        late = MaskedLinear(6, 4, path="packed", device=device)
        model.append(late)
        model(input), model(input)
        assert len(packs) == 3
        late.weight.data.mul_(2)
        ones = torch.ones(1, 6, device=device)
        torch.testing.assert_close(late(ones), late.to_dense()(ones))
        model[0] = nn.Identity()
    assert not has_packs(model) and not has_packs(layer)


def test_a_layer_used_twice_packs_once(packs, input, device):
    layer = MaskedLinear(8, 8, path="packed", device=device)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    with weights_unchanged(model):
        model(input).sum().backward()
    assert len(packs) == 1
    twin = copy.deepcopy(layer)
    twin.zero_grad()
    nn.Sequential(twin, nn.Tanh(), twin)(input).sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved], ids=lambda f: f.__name__)
@pytest.mark.parametrize("inside", [True, False])
def test_a_copy_of_the_model_stands_on_its_own(duplicate, inside, layer, input):
    with weights_unchanged(layer):
        layer(input)
        twin = duplicate(layer) if inside else None
        layer.weight.data = layer.weight.data + 1
        if inside:
            twin.weight.data.mul_(-3)
            assert_as_fresh(twin, input)
        assert_as_fresh(layer, input)
    if not inside:
        twin = duplicate(layer)
    twin.weight.data.mul_(-2)
    assert_as_fresh(twin, input)
    assert_as_fresh(layer, input)
    assert not has_packs(twin)


def test_a_compiled_layer_is_right_inside_the_scope(layer, input):
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with weights_unchanged(layer):
        for _ in range(2):
            torch.testing.assert_close(compiled(input), fresh(layer)(input))
            layer.weight.data.mul_(-2)
    torch._dynamo.reset()


def test_the_pack_is_the_product_s_dtype_and_the_effective_threshold(layer):
    packed = autograd.pack(layer.weight, layer.threshold, layer.masking, torch.float16)
    assert packed.masked.dtype == torch.float16 and not packed.masked.requires_grad
    assert torch.equal(packed.effective, layer.threshold)


def test_functional_gradients_inside_the_scope(layer, input):
    """What torch.func wraps has no address to be known by, and is packed each time."""
    layer.eval()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, input).square().sum()

    expected = torch.func.grad(loss)(parameters)
    with weights_unchanged(layer):
        layer(input)
        torch.testing.assert_close(torch.func.grad(loss)(parameters), expected)

"""Fixed masks: right is what a dense twin does in float64, whose weights are times the mask."""

import copy
import io
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import dst_kernels
from dst_kernels.nn import MaskedLinear
from dst_kernels.nn.find import named_masked_weights


class OwnForward(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight / 2, self.bias)


KINDS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2), (2, 4, 5, 6)),
    "recurrent": (lambda: nn.LSTM(5, 4, 2, bidirectional=True, proj_size=3), (3, 2, 5)),
    "cell": (lambda: nn.GRUCell(5, 4), (3, 5)),
    "own forward": (lambda: OwnForward(6, 5), (4, 6)),
    "network": (lambda: nn.Sequential(nn.Conv1d(3, 6, 2), nn.Flatten(), nn.GRU(30, 5)), (4, 3, 6)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def _pair(kind):
    """Return a masked layer with half of each weight pruned, its dense twin, and an input."""
    torch.manual_seed(0)
    build, shape = KINDS[kind]
    dense = build().double()
    return _masked(dense), dense, torch.randn(shape, dtype=torch.float64, requires_grad=True)


def _masked(dense):
    config = dst_kernels.SparsifyConfig(reset_ratio=None)
    model = dst_kernels.sparsify_(copy.deepcopy(dense), config)
    return dst_kernels.prune_(model, 0.5, scope="layer")


def _parts(model):
    return [part for _, part in named_masked_weights(model)]


def _fix(model, change=lambda mask: mask, **options):
    for part in _parts(model):
        part.set_fixed_mask(change(part.mask()), **options)


def _masks(model):
    """By the weight's name in the state dict."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(part.weight)]: part.mask() for part in _parts(model)}


def _run(output, x):
    """Return output and gradient of the input; one loss for all."""
    output = output[0] if isinstance(output, tuple) else output
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    gradient, x.grad = x.grad, None
    return output.detach(), gradient


def _close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def _times(dense, masks):
    return {n: p * masks[n] if n in masks else p for n, p in dense.named_parameters()}


@every_kind
def test_outputs_and_gradients_are_those_of_a_masked_dense_twin(kind):
    model, dense, x = _pair(kind)
    masks, parameters = _masks(model), dict(model.named_parameters())
    before, dynamic = _run(model(x), x), {n: p.grad for n, p in parameters.items()}
    assert dst_kernels.freeze_masks_(model) is model
    weights = _times(dense, masks)
    for name in masks:
        weights[name].retain_grad()
    expected = _run(functional_call(dense, weights, (x,)), x)
    _close(before, expected)
    for each in (model.train(), model.eval()):
        model.zero_grad()
        _close(_run(each(x), x), expected)
        for name, p in dense.named_parameters():
            _close(parameters[name].grad, p.grad)
    for name in masks:  # not a product: what is pruned does not count, whatever it is
        parameters[name].data[~masks[name]] = torch.nan
    _fix(model, dense_gradient=True)
    model.zero_grad()
    _close(_run(model(x), x), expected)
    for name in masks:
        _close(parameters[name].grad, weights[name].grad)
    thresholds = [part.threshold for part in _parts(model)]
    assert all(t.grad is None and not t.requires_grad for t in thresholds)
    assert all(torch.equal(mask, masks[name]) for name, mask in _masks(model).items())
    for name in masks:
        parameters[name].data.copy_(dict(dense.named_parameters())[name])
    dst_kernels.unfreeze_masks_(model).zero_grad()  # the dynamic rule again
    _close((_run(model(x), x), {n: p.grad for n, p in parameters.items()}), (expected, dynamic))


OPTIMIZERS = {
    torch.optim.SGD: (torch.optim.SGD, {"momentum": 0.9}),
    torch.optim.Adam: (torch.optim.Adam, {}),
    dst_kernels.optim.DSTSGD: (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    dst_kernels.optim.DSTAdamW: (torch.optim.AdamW, {}),
}


@pytest.mark.parametrize("built_after", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_as_that_of_the_twin(kind, built_after):
    twin_kind, options = OPTIMIZERS[kind]
    options = {**options, "lr": 0.05, "weight_decay": 0.1}
    model, dense, x = _pair("network")
    alpha = {"alpha": 0.01} if kind.__name__.startswith("DST") else {}
    if built_after:
        dst_kernels.freeze_masks_(model)
    owner = model if alpha else dst_kernels.parameter_groups(model)
    optimizer, parameters = kind(owner, **options, **alpha), dict(model.named_parameters())

    def step(optimizer, output):
        optimizer.zero_grad()
        (output[0] - 0.5).square().mean().backward()
        optimizer.step()
        return output[0]

    for _ in range(3):  # momentum, also of what is pruned
        step(optimizer, model(x))
    dst_kernels.freeze_masks_(model).requires_grad_(True)  # as users thaw
    dense.load_state_dict(model.state_dict(), strict=False)
    masks, twin = _masks(model), twin_kind(dense.parameters(), **options)
    thresholds = [part.threshold.clone() for part in _parts(model)]
    for key, p in dense.named_parameters():
        twin.state[p] = copy.deepcopy(optimizer.state[parameters[key]])
    for _ in range(20):
        expected = step(twin, functional_call(dense, _times(dense, masks), (x,)))
        _close(step(optimizer, model(x)), expected)
    for key, p in dense.named_parameters():
        _close(parameters[key], p)
    assert all(torch.equal(mask, masks[key]) for key, mask in _masks(model).items())
    now = [part.threshold for part in _parts(model)]
    assert all(torch.equal(*pair) for pair in zip(now, thresholds, strict=True))
    dst_kernels.unfreeze_masks_(model)
    step(optimizer, model(x))
    moved = [not torch.equal(*pair) for pair in zip(now, thresholds, strict=True)]
    assert all(moved) or built_after  # where they are in no param group


@every_kind
def test_checkpoints_and_copies_have_the_masks(kind, caplog):
    model, dense, x = _pair(kind)
    dynamic = model.state_dict()
    _fix(model, lambda mask: mask.flip(-1))
    expected, state, stream = _run(model(x), x), model.state_dict(), io.BytesIO()
    added = {name.replace("threshold", "fixed_mask") for name in dynamic if "threshold" in name}
    assert state.keys() == dynamic.keys() | added
    torch.save(model, stream)
    stream.seek(0)
    saved, loaded = torch.load(stream, weights_only=False), _masked(dense)
    loaded.load_state_dict(state)
    again = dst_kernels.freeze_masks_(_masked(dense))
    again.load_state_dict(state, assign=True)
    for each in (saved, loaded, again, copy.deepcopy(model)):
        _close(_run(each(x), x), expected)
    for partial in (dynamic, dense.state_dict()):
        with pytest.raises(RuntimeError, match=r"Missing key.*fixed_mask"):
            model.load_state_dict(partial)
        assert "dst_kernels.unfreeze_masks_ first" in caplog.records[-1].getMessage()
        model.load_state_dict(partial, strict=False)
        _close(_run(model(x), x), expected)
    assert all(mask.dtype is torch.bool for mask in _masks(model.type(torch.float32)).values())


@every_kind
def test_reports_and_the_ways_to_dense_layers(kind):
    model, dense, x = _pair(kind)
    _fix(model, lambda mask: mask & (torch.arange(mask.shape[-1]) > 0))
    masks, expected = _masks(model), _run(model(x), x)
    kept = sum(int(mask.sum()) for mask in masks.values())
    report = dst_kernels.sparsity_report(model)
    assert report.kept == kept and 0 < kept < 0.5 * report.total
    own = getattr(model, "remaining_ratio", lambda: report.remaining_ratio)()
    assert dst_kernels.remaining_ratio(model) == pytest.approx(kept / report.total) == own
    assert dst_kernels.sparse_regularization(model) == 0
    assert "fixed=weight" in repr(model) or kind == "cell"  # whose repr is torch's own
    assert [g["name"] for g in dst_kernels.parameter_groups(model)] == ["weights"]
    model.requires_grad_(True)
    assert dst_kernels.check_masks(model, x.detach(), optimizers=[torch.optim.SGD([x])]) == {}
    assert all(torch.equal(mask, masks[name]) for name, mask in _masks(model).items())
    finalized, raw = dst_kernels.finalize_(copy.deepcopy(model)), dst_kernels.densify_(model)
    _close(_run(finalized(x), x), expected)
    for each in (finalized, raw):
        assert type(each) is type(dense) and each.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(value, raw.state_dict()[n]) for n, value in dense.state_dict().items())


@pytest.mark.parametrize("prepare", [lambda m: m, dst_kernels.group_, dst_kernels.optim.DSTSGD])
def test_nothing_stale_is_used(prepare):
    """Grouped or deferred, and within `weights_unchanged`; for weights that do not train, too."""
    model, _, x = _pair("network")
    kept = prepare(model)
    for trains, change in ((True, torch.clone), (True, torch.logical_not), (False, torch.flipud)):
        model[0].requires_grad_(trains)
        for scope in (nullcontext, dst_kernels.weights_unchanged):
            with scope(model):
                model(x)
                _fix(model, change)
                expected = dst_kernels.finalize_(copy.deepcopy(model))(x)[0]
                _close(model(x)[0], expected)
                dst_kernels.unfreeze_masks_(model)
                dynamic = dst_kernels.finalize_(copy.deepcopy(model))(x)[0]
                _close(model(x)[0], dynamic)
    assert kept is not None and not torch.allclose(expected, dynamic)


def test_one_of_two_layers_that_share_a_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    model[1].weight = model[0].weight
    model = dst_kernels.prune_(dst_kernels.sparsify_(model), 0.7)
    twin, x = copy.deepcopy(model), torch.randn(3, 5, dtype=torch.float64)
    sgd = torch.optim.SGD(dst_kernels.parameter_groups(twin), lr=0.1)
    for each, optimizer in ((model, dst_kernels.optim.DSTSGD(model, lr=0.1)), (twin, sgd)):
        for step in range(3):
            if step == 1:
                each[0].masked_weights()[0].set_fixed_mask(torch.eye(5) > 0)
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    _close(dict(model.named_parameters()), dict(twin.named_parameters()))


def test_the_run_time_check_finds_what_passes_a_fixed_mask():
    model, x = dst_kernels.freeze_masks_(_pair("linear")[0]), torch.ones(2, 6).double()
    past = lambda x: x @ model.weight.T  # noqa: E731
    for forward, words in ((past, "read past its mask"), (lambda x: x * model.bias[0], "not used")):
        model.forward = forward
        assert words in dst_kernels.check_masks(model, x)[""]


def test_further_parameters_are_masked_beside_a_fixed_one():
    module = dst_kernels.mask_parameter_(nn.LSTMCell(4, 3), "weight_ih", matrices=4)
    mask = dst_kernels.freeze_masks_(module).fixed_mask_weight_ih
    dst_kernels.mask_parameter_(module, "weight_hh", matrices=4)
    first, second = module.masked_weights()
    first.mask().zero_()  # a copy
    assert first.fixed_mask is mask and mask.all() and second.fixed_mask is None
    assert not first.threshold.requires_grad and second.threshold.requires_grad


@pytest.mark.parametrize("dense_gradient", [False, True])
def test_compiler_and_transforms(dense_gradient):
    layer = dst_kernels.prune_(MaskedLinear(6, 5, dtype=torch.float64, path="mixed"), 0.5)
    mask, x = layer.mask(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    _fix(layer, dense_gradient=dense_gradient)
    _run(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), x)
    compiled, layer.weight.grad = layer.weight.grad, None
    _run(layer(x), x)
    _close(compiled, layer.weight.grad)
    assert compiled[~mask].any().item() is dense_gradient

    def loss(weight, x):
        return functional_call(layer, {"weight": weight}, (x,)).square().sum()

    each = vmap(grad(loss), (None, 0))(layer.weight.detach(), x.detach())
    outer = 2 * layer(x).detach()[:, :, None] * x.detach()[:, None, :]
    _close(each, outer if dense_gradient else outer * mask)
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    slope.sum().backward()
    masked = layer.weight * mask
    _close(x.grad, 2 * (masked.T @ masked).sum(0).expand_as(x))


def test_the_example_of_the_docs_runs():
    page = Path(__file__).parents[2].joinpath("docs/weight-sources.md").read_text()
    scope = {}
    exec(page.split("```python\n")[1].split("```")[0], scope)
    assert 0 < dst_kernels.remaining_ratio(scope["model"]) < 0.2


def test_what_cannot_be_fixed_is_said_and_changes_nothing(monkeypatch):
    layer, mask = MaskedLinear(4, 3), torch.ones(3, 4, dtype=torch.bool)
    for error, words, *arguments in (
        (TypeError, "mask must be a torch.Tensor, but is None", None),
        (TypeError, r"mask must be a boolean tensor, but is torch\.float32", mask.float()),
        (ValueError, r"shape of weight, \[3, 4\], but has \[4, 3\]", mask.T),
        (ValueError, "weight is, on cpu, but is on meta", mask.to("meta")),
        (TypeError, "dense_gradient must be True or False, but is 1", mask, 1),
    ):
        with pytest.raises(error, match=words):
            layer.masked_weights()[0].set_fixed_mask(*arguments)
    model = nn.Sequential(MaskedLinear(4, 4), layer)
    layer.fixed_mask = "the user's own"
    with pytest.raises(ValueError, match="has an attribute 'fixed_mask' of its own"):
        dst_kernels.freeze_masks_(model)
    assert not any(part.fixed_mask is not None or part.frozen for part in _parts(model))
    del layer.fixed_mask
    with pytest.raises(ValueError, match=r"mask of 0 \(2 such\) is fixed.*unfreeze_masks_"):
        dst_kernels.prune_(dst_kernels.freeze_masks_(model), 0.5)
    for function in (dst_kernels.freeze_masks_, dst_kernels.unfreeze_masks_):
        with pytest.raises(ValueError, match="has no masked layers"):
            function(nn.Linear(2, 2))
        with monkeypatch.context() as patch:
            patch.setattr(nn.parallel, "DistributedDataParallel", nn.Sequential)
            with pytest.raises(ValueError, match="model holds a DistributedDataParallel"):
                function(model)

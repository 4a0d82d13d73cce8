"""`finalize_(model, "compact", x)`: smaller layers, where a run with x proves it, else the same."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dst_kernels import finalize_, sparsify_

DEAD = [0, 2]


class Net(nn.Module):
    """Layers by name, and a function of them as the forward."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


@torch.no_grad()
def prepared(model, dead, bias=0.7):
    """Masked, in float64, with some rows pruned whose biases are `bias`, and other statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                tensor.uniform_(0.5, 1.5)
    for name in dead:
        layer = model.get_submodule(name)
        layer.weight[DEAD] = 0
        if layer.bias is not None:
            layer.bias[DEAD] = bias
    return sparsify_(model.double().eval())


def shapes(model):
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return {n: tuple(m.weight.shape[:2]) for n, m in model.named_modules() if type(m) in layers}


def lin(*sizes, **options):
    return nn.Linear(*sizes, **options)


def conv(*sizes, **options):
    return nn.Conv2d(*sizes, **options)


def test_constants_move_into_the_next_bias_by_hand():
    model = Net(lambda m, x: m.b(F.relu(m.a(x))), a=lin(3, 4), b=lin(4, 2))
    with torch.no_grad():
        model.a.weight[[1, 3]] = 0
        model.a.bias.copy_(torch.tensor([1.0, 2.0, 3.0, -4.0]))
        model.b.weight.copy_(torch.tensor([[1.0, 10.0, 2.0, 5.0], [3.0, -1.0, 4.0, 6.0]]))
        model.b.bias.copy_(torch.tensor([0.5, 0.25]))
        kept = model.a.weight[[0, 2]].clone()
    a, b = model.a, model.b
    sparsify_(model.eval())
    assert finalize_(model, "compact", torch.randn(5, 3)) is model
    assert model.a is a and model.b is b and type(a) is nn.Linear
    assert (a.in_features, a.out_features, b.in_features, b.out_features) == (3, 2, 2, 2)
    assert torch.equal(a.weight, kept) and a.bias.tolist() == [1.0, 3.0]
    assert b.weight.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert b.bias.tolist() == [0.5 + 10 * 2, 0.25 - 1 * 2]
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())


def chain(between, first=None, last=None, **others):
    first, last = first or lin(5, 6), last or lin(6, 4)
    return Net(lambda m, x: m.b(between(m, m.a(x))), a=first, b=last, **others)


def images(between, padding=0, **others):
    return chain(between, conv(3, 6, 3), conv(6, 4, 3, padding=padding), **others)


def doubled(m, h):
    alias = h.transpose(1, 2)
    alias.mul_(2)
    return h * alias.transpose(1, 2)


def kept_aside(m, h):
    m.aside = h
    return h


def both(m, x):
    hidden = m.a(x)
    return m.b(hidden) + m.c(hidden)


def with_hidden(m, x):
    hidden = m.a(x)
    return {"hidden": hidden, "out": m.b(hidden)}


def flattened_in_two_ways():
    run = lambda m, h: h.flatten(1) + h.permute(0, 2, 3, 1).flatten(1)  # noqa: E731
    model = chain(run, conv(3, 6, 3), lin(600, 4))
    with torch.no_grad():
        model.b.weight[:, :100] = 0  # channel 0 in the first way
    return model


def hooked():
    model = chain(lambda m, h: m.act(h), act=nn.ReLU())
    model.act.register_forward_hook(lambda module, args, output: None)
    return model


# The layers whose dead rows go, and a model.
SMALLER = {
    "gelu": ("a", chain(lambda m, h: F.gelu(h))),
    "no bias": ("a", chain(lambda m, h: h.sigmoid(), lin(5, 6, bias=False), lin(6, 4, bias=False))),
    "tanh approximation": ("a", chain(lambda m, h: 0.5 * h * (1 + (h + 0.04 * h**3).tanh()))),
    "quick gelu": ("a", chain(lambda m, h: h * torch.sigmoid(1.702 * h))),
    "in place": ("a", chain(lambda m, h: F.dropout(F.relu(h, inplace=True), 0.5, False, True))),
    "numbers": ("a", chain(lambda m, h: (1 - h) / 2 - 3)),
    "two readers": ("a", Net(both, a=lin(5, 6), b=lin(6, 4), c=lin(6, 4))),
    "pools": ("a", images(lambda m, h: F.avg_pool2d(F.max_pool2d(h.relu(), 2, 2, 1), 2, 1))),
    "batch norm": ("a", images(lambda m, h: m.n(h).relu(), n=nn.BatchNorm2d(6))),
    "0 in padding": ("a", images(lambda m, h: F.relu(h - 0.7), padding=1)),
    "flatten": ("a", chain(lambda m, h: torch.flatten(h, 1), conv(3, 6, 3), lin(600, 4))),
    "view": ("a", chain(lambda m, h: h.view(h.size(0), -1), conv(3, 6, 3), lin(600, 4))),
    "permuted": ("a", chain(lambda m, h: h.permute(0, 2, 3, 1).mean((1, 2)), conv(3, 6, 3))),
    "depthwise": ("a d", images(lambda m, h: m.d(F.relu(h)), d=conv(6, 6, 3, groups=6))),
    "sum of two": ("a c", chain(lambda m, h: h + m.c(F.relu(h)), c=lin(6, 6))),
    "gate is 0": ("a", Net(lambda m, x: m.b(F.relu(m.a(x) - 0.7) * m.c(x)),
                           a=lin(5, 6), b=lin(6, 4), c=lin(5, 6))),
    "squeeze": ("a e", images(lambda m, h: h * m.e(F.relu(m.s(h.mean((2, 3), True)))).sigmoid(),
                              s=conv(6, 2, 1), e=conv(2, 6, 1))),
}  # fmt: skip
SAME = {
    "padding": images(lambda m, h: h.relu(), padding=1),
    "padded pool": images(lambda m, h: F.avg_pool2d(h, 3, 1, 1)),
    "layer norm": chain(lambda m, h: m.n(h), n=nn.LayerNorm(6)),
    "softmax": chain(lambda m, h: h.softmax(-1)),
    "dropout that is on": chain(lambda m, h: F.dropout(h, 0.0, True)),
    "one of a sum": chain(lambda m, h: h + m.c(h), c=lin(6, 6)),
    "added to the input": Net(lambda m, x: m.b(x + m.a(x)), a=lin(5, 5), b=lin(5, 4)),
    "concatenated": chain(lambda m, h: torch.cat([h, h], -1), last=lin(12, 4)),
    "mixed": chain(lambda m, h: h.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)),
    "flattened in two ways": flattened_in_two_ways(),
    "padded depthwise": images(lambda m, h: m.d(h), d=conv(6, 6, 3, groups=6, padding=1)),
    "written size": chain(lambda m, h: h.view(-1, 600), conv(3, 6, 3), lin(600, 4)),
    "returned": Net(with_hidden, a=lin(5, 6), b=lin(6, 4)),
    "kept aside": chain(kept_aside),
    "alias changed": chain(doubled),
    "hook": hooked(),
    "called twice": Net(lambda m, x: m.a(F.relu(m.a(x))), a=lin(5, 5)),
    "weight read": chain(lambda m, h: h + m.a.weight.sum()),
    "subclass": chain(lambda m, h: h.relu(), type("Own", (nn.Linear,), {})(5, 6)),
    "forward called": Net(lambda m, x: m.b(m.a.forward(x).relu()), a=lin(5, 6), b=lin(6, 4)),
    "read as a number": chain(lambda m, h: h * float(h[0, 0, 0] > 9) + h),
    "groups": images(lambda m, h: m.d(h), d=conv(6, 6, 3, groups=2)),
}  # fmt: skip


def an_input(model, batch):
    sizes = (3, 12, 12) if isinstance(model.a, nn.Conv2d) else (7, 5)
    return torch.randn(batch, *sizes, dtype=torch.float64)


def compacted(model, dead):
    """The compacted model, after a comparison with the dense one for an input of another batch."""
    model = prepared(model, dead)
    dense = finalize_(copy.deepcopy(model))
    finalize_(model, "compact", an_input(model, 2))
    input = an_input(model, 3)
    torch.testing.assert_close(model(input), dense(input), rtol=1e-12, atol=1e-12)
    return dense, model


@pytest.mark.parametrize("name", SMALLER)
def test_dead_rows_go(name):
    dead, model = SMALLER[name]
    dense, small = compacted(copy.deepcopy(model), dead.split())
    for layer, (rows, _) in shapes(dense).items():
        less = len(DEAD) if layer in dead.split() or (name, layer) == ("gate is 0", "c") else 0
        assert shapes(small)[layer][0] == rows - less
    assert small.b.weight[0].numel() == dense.b.weight[0].numel() * 4 // 6
    finalize_(sparsify_(small), "compact", an_input(small, 2))  # nothing is left to remove
    assert shapes(small)["a"][0] == 4


@pytest.mark.parametrize("name", SAME)
def test_layers_that_must_stay(name):
    dense, small = compacted(copy.deepcopy(SAME[name]), ["a"])
    assert shapes(small) == shapes(dense)
    state = dense.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in small.state_dict().items())


def test_unread_outputs_go_all_the_way_up_and_one_always_stays():
    layers = {name: lin(6, 6) for name in "abcd"}
    run = lambda m, x: m.d(m.c(m.b(m.a(x).relu()).tanh()))  # noqa: E731
    model = Net(run, **layers)
    with torch.no_grad():
        model.d.weight[:, 1:] = 0
        model.c.weight[0, 2:] = 0
        model.b.weight[:2, :3] = 0
    x = torch.randn(4, 6)
    expected = model(x)
    finalize_(sparsify_(model.eval()), "compact", x)
    assert shapes(model) == {"a": (3, 6), "b": (2, 3), "c": (1, 2), "d": (6, 1)}
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        for name in "abcd":
            getattr(model, name).weight.zero_()
    expected = model(x)
    finalize_(model, "compact", x)
    assert shapes(model) == {"a": (1, 6), "b": (1, 1), "c": (1, 1), "d": (6, 1)}
    torch.testing.assert_close(model(x), expected)


def a_random_net(draw):
    """A convolutional start, a linear end, and anything between."""
    acts = [F.relu, F.gelu, torch.sigmoid, lambda h: h.clamp(-0.5, 0.5), lambda h: 2 - h, F.silu]
    width = draw.randint(2, 6)
    steps, layers = [], {"a": conv(3, width, 3)}
    for i in range(draw.randint(1, 5)):
        act, name = draw.choice(acts), f"c{i}"
        kind = draw.choice(["conv", "padded", "residual", "norm", "depthwise", "pool", "gate"])
        if kind == "norm":
            layers[name] = nn.BatchNorm2d(width)
        elif kind == "depthwise":
            layers[name] = conv(width, width, 3, padding=draw.randint(0, 1), groups=width)
        elif kind != "pool":
            new = draw.randint(2, 6) if kind in ("conv", "padded") else width
            layers[name] = conv(width, new, 3, padding=0 if kind == "conv" else 1)
            width = new
        steps.append((kind, name, act))

    def run(m, x):
        h = m.a(x)
        for kind, name, act in steps:
            if kind == "pool":
                h = F.avg_pool2d(act(h), 3, 1, 1)
            elif kind in ("residual", "gate"):
                more = getattr(m, name)(act(h))
                h = h + more if kind == "residual" else h * more.sigmoid()
            else:
                h = act(getattr(m, name)(h))
        return m.z(m.y(h.mean((2, 3))).relu())

    return Net(run, **layers, y=lin(width, 5), z=lin(5, 2))


def test_random_networks_stay_the_same():
    smaller = 0
    for seed in range(60):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        model = a_random_net(draw)
        with torch.no_grad():
            for module in model.children():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    dead = torch.rand(len(module.weight)) < draw.choice([0, 0.4, 0.8])
                    module.weight[dead] = 0
                    module.weight[torch.rand(module.weight.shape) < draw.choice([0, 0.5])] = 0
                    module.bias[torch.rand(module.bias.shape) < 0.5] = 0
        dense, small = compacted(model, [])
        smaller += shapes(small) != shapes(dense)
    assert smaller >= 40


def reads_its_size(m, h):
    return h * h.shape[-1]


def expects_its_size(m, h):
    return h if h.shape[-1] == 6 else h[..., 6]


@pytest.mark.parametrize(
    "between, error",
    [
        (reads_its_size, "of shape [2, 7, 4], differs from that before by"),
        (expects_its_size, "the model fails for example_input, so nothing but masks was removed: "),
    ],
)
def test_what_the_run_does_not_show_is_undone(between, error):
    model = prepared(chain(between), ["a"])
    x = an_input(model, 2)
    dense = finalize_(copy.deepcopy(model))
    with pytest.raises(RuntimeError) as raised:
        finalize_(model, "compact", x)
    assert error in str(raised.value) and "with format 'compact'" in str(raised.value)
    assert repr(model) == repr(dense) and torch.equal(model(x), dense(x))
    state = model.state_dict()
    assert all(torch.equal(state[name], t) for name, t in dense.state_dict().items())


def test_bad_arguments_change_nothing():
    model = prepared(SMALLER["gelu"][1], ["a"])
    before = repr(model)
    with pytest.raises(ValueError, match="'compact' needs example_input"):
        finalize_(model, "compact")
    model.b.train()
    with pytest.raises(RuntimeError, match="evaluation mode, but b is in training mode"):
        finalize_(model, "compact", an_input(model, 2))
    text = Net(lambda m, x: "text", a=sparsify_(nn.Linear(5, 5))).eval()
    with pytest.raises(TypeError, match=r"must return a tensor, .* but returned 'text'"):
        finalize_(text, "compact", torch.ones(1))
    assert repr(model) == before and "Masked" in repr(text)

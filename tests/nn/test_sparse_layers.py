"""Sparse layers compute what the dense ones do, and go wherever a module goes."""

from __future__ import annotations

import copy
import io
import pickle
import re
import statistics
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dst_kernels.backends import unavailable
from dst_kernels.nn import SparseConv1d, SparseConv2d, SparseLinear
from dst_kernels.nn.sparse import wins

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
LINEAR = [(70, 33), (1, 5), (65536, 3), (65537, 3), (4, 0)]
# in, out, kernel, stride, padding, dilation, groups
CONV = [
    (8, 12, 3), (8, 12, 3, 2, 1), (8, 12, 1), (8, 12, 1, 2), (8, 12, 3, 1, "same"),
    (8, 12, 2, 1, "same", 2, 4), (8, 16, 3, 2, 2, 2, 2), (8, 8, 3, 1, 1, 1, 8), (8, 5, 4, 3, 1),
]  # fmt: skip
IMAGES = {
    "1d": (SparseConv1d, nn.Conv1d, (3, 8, 37)),
    "2d": (SparseConv2d, nn.Conv2d, (2, 8, 9, 11)),
    "2d without a batch": (SparseConv2d, nn.Conv2d, (8, 12, 9)),
    "2d of no images": (SparseConv2d, nn.Conv2d, (0, 8, 9, 11)),
}


def prune(module, kept=0.3, seed=0):
    """Most weights become 0, those of the first row all."""
    mask = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(seed)) < kept
    with torch.no_grad():
        module.weight.mul_(mask)
        module.weight[:1] = 0
    return module


def check(sparse, dense, input):
    """Up to twice the error that torch makes in the same dtype, for sums in another order."""
    output, expected = sparse(input), dense(input)
    exact = copy.deepcopy(dense).double()(input.double())
    assert output.dtype == input.dtype and output.shape == expected.shape
    wide = torch.promote_types(input.dtype, torch.float32)
    rounding = torch.finfo(wide).eps * 32 + (
        torch.finfo(input.dtype).eps if wide != input.dtype else 0
    )
    errors = [(each.double() - exact).abs() for each in (output, expected)]
    most = 2 * max(errors[1].flatten().tolist(), default=0)
    assert (errors[0] <= most + rounding * (1 + exact.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype):
    for (columns, rows), kept in zip(LINEAR * 2, [0.3] * 5 + [0, 1, 0.01, 0.01, 0], strict=True):
        dense = prune(nn.Linear(columns, rows, bias=rows != 3), kept).to(dtype)
        sparse = SparseLinear.from_dense(dense)
        assert sparse.columns.dtype == (torch.uint16 if columns <= 65536 else torch.int32)
        assert torch.equal(sparse.weight(), dense.weight)
        for batch in ((), (0,), (1,), (2, 3), (2,), (75,), (130,))[: 4 if columns > 99 else None]:
            check(sparse, dense, torch.randn(*batch, columns).to(dtype))
        check(sparse, dense, torch.randn(columns, 5).to(dtype).t())


@pytest.mark.parametrize(
    "kind, mode",
    [
        *((kind, "zeros") for kind in IMAGES),
        *(("2d", mode) for mode in ("reflect", "circular", "replicate")),
        ("2d without a batch", "circular"),
        ("1d", "reflect"),
    ],
)
def test_convolutions(kind, mode):
    cls, torchs, shape = IMAGES[kind]
    for arguments in CONV if mode == "zeros" else CONV[1:5]:
        dense = prune(torchs(*arguments, bias=arguments[1] != 5, padding_mode=mode))
        sparse = cls.from_dense(dense)
        assert torch.equal(sparse.weight(), dense.weight)
        input = torch.randn(shape)
        check(sparse, dense, input)
        if input.dim() == 4:
            output = sparse(input.contiguous(memory_format=torch.channels_last))
            assert torch.equal(output, sparse(input))
            if mode == "zeros" and len(input):
                assert output.is_contiguous(memory_format=torch.channels_last)
    check(copy.deepcopy(sparse).bfloat16(), copy.deepcopy(dense).bfloat16(), input.bfloat16())


def test_pruned_weights_have_no_part_in_the_output():
    dense = nn.Linear(3, 2)
    with torch.no_grad():
        dense.weight.copy_(torch.tensor([[0.0, 2, 0], [torch.nan, 0, 3]]))
        dense.bias.zero_()
    sparse = SparseLinear.from_dense(dense)
    for batch in (1, 2, 70):
        output = sparse(torch.tensor([[torch.inf, 1, torch.nan]]).expand(batch, 3))
        assert output[:, 0].eq(2).all() and output[:, 1].isnan().all()
    filters = prune(nn.Conv2d(2, 4, 3, padding=1, bias=False))
    images = torch.randn(1, 2, 9, 40)
    images[0, 0, 4, 20] = torch.inf
    reached = nn.functional.conv2d(
        images.isinf().float(), (filters.weight != 0).float(), None, 1, 1
    )
    assert torch.equal(SparseConv2d.from_dense(filters)(images).isfinite(), reached == 0)


LAYERS = [
    (nn.Linear(40, 8), SparseLinear, (5, 40)),
    (nn.Conv1d(4, 6, 3, 2, 1, bias=False), SparseConv1d, (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, 1, 1, 1, 2, padding_mode="reflect"), SparseConv2d, (2, 4, 6, 6)),
]
every_layer = pytest.mark.parametrize("dense, cls, shape", LAYERS, ids=["linear", "1d", "2d"])


@every_layer
def test_what_people_do_with_a_module(dense, cls, shape, tmp_path):
    input, sparse = torch.randn(shape), cls.from_dense(prune(dense).eval())
    expected = sparse(input)
    assert not sparse.training and not list(sparse.parameters())
    back = sparse.to_dense()
    assert type(back) is type(dense) and repr(back) == repr(dense) and not back.training
    for name, parameter in dense.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter)

    names = cls.arguments
    arguments = {name: getattr(sparse, name) for name in names}
    made = cls(**arguments, bias=sparse.bias is not None)
    on_meta = cls(**arguments, bias=sparse.bias is not None, device="meta")
    assert on_meta(input.to("meta")).shape == expected.shape
    save_file(sparse.state_dict(), tmp_path / "file.safetensors")
    state = load_file(tmp_path / "file.safetensors")
    on_meta.load_state_dict(state, assign=True)
    made.load_state_dict(state)  # which has another number of weights
    written = io.BytesIO()
    torch.save(sparse, written)
    written.seek(0)
    for other in (
        made, on_meta, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)),
        torch.load(written, weights_only=False), sparse.to("meta").to_empty(device="cpu"),
    ):  # fmt: skip
        other.load_state_dict(state)
        assert torch.equal(other(input), expected)

    half = copy.deepcopy(sparse).bfloat16()
    assert half.values.dtype == torch.bfloat16 and half.columns.dtype == sparse.columns.dtype
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sparse(input), half(input.bfloat16()), rtol=0.02, atol=0.02)


@every_layer
def test_the_input_has_a_gradient(dense, cls, shape):
    sparse, input = cls.from_dense(prune(dense)), torch.randn(shape, requires_grad=True)
    grads = [torch.autograd.grad(f(input).square().sum(), input)[0] for f in (sparse, dense)]
    torch.testing.assert_close(*grads)


def test_compile_and_export():
    layers = [prune(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Flatten(), prune(nn.Linear(8 * 16, 10))]
    layers[0], layers[3] = SparseConv2d.from_dense(layers[0]), SparseLinear.from_dense(layers[3])
    model, input = nn.Sequential(*layers).eval(), torch.randn(4, 3, 6, 6)
    assert torch.equal(torch.compile(model, fullgraph=True)(input), model(input))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (input,), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(input[:3]), model(input[:3]))


def test_the_environment_names_the_backend_at_any_time(monkeypatch):
    linear, input = SparseLinear.from_dense(prune(nn.Linear(6, 4))), torch.randn(1, 6)
    expected = linear(input)
    monkeypatch.setenv("DST_KERNELS_BACKEND", "nothing")
    with pytest.raises(ValueError, match="DST_KERNELS_BACKEND must be one of"):
        linear(input)
    monkeypatch.setenv("DST_KERNELS_BACKEND", "reference")
    torch.testing.assert_close(linear(input), expected)
    with torch.profiler.profile() as profile:
        linear(input)
    assert not any("dst_kernels_compiled" in event.name for event in profile.events())


class Subclass(nn.Linear):
    pass


def test_errors():
    def refuses(error, *parts):
        return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))

    for module in (Subclass(3, 4), nn.Conv2d(3, 4, 1), None):
        with refuses(TypeError, "module must be a torch.nn.Linear (and no subclass), but is"):
            SparseLinear.from_dense(module)
    with refuses(ValueError, "must have its weights in memory, but they are on 'meta'"):
        SparseLinear.from_dense(nn.Linear(3, 4, device="meta"))
    with refuses(TypeError, "dtype must be float16, bfloat16, float32 or float64"):
        SparseLinear(3, 4, dtype=torch.complex64)
    linear = SparseLinear.from_dense(prune(nn.Linear(6, 4), 0.9))
    with refuses(ValueError, "input must have shape [..., 6], but its shape is [2, 5]"):
        linear(torch.ones(2, 5))
    with refuses(TypeError, "input must have the weight's dtype torch.float32", "torch.float64"):
        linear(torch.ones(2, 6).double())
    with refuses(ValueError, "input must have 2 channels", "but its shape is [1, 3, 4, 4]"):
        SparseConv2d(2, 4, 3)(torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize(
    "name, spoil, said",
    [
        ("columns", lambda t: (t.int() + 9).to(t.dtype), "columns must be from 0 to 5"),
        ("columns", lambda t: t.int().flip(0).to(t.dtype), "columns must ascend within each row"),
        ("columns", lambda t: t.int(), "columns must be torch.uint16, but are torch.int32"),
        ("columns", lambda t: t[1:], "values and columns must be as long as each other"),
        ("row_starts", lambda t: t[1:], "row_starts must be torch.int32 of shape [5]"),
        ("row_starts", lambda t: t.long(), "row_starts must be torch.int32 of shape [5]"),
        ("row_starts", lambda t: t.flip(0), "row_starts must ascend from 0"),
        ("row_starts", lambda t: t * 2, "row_starts must ascend from 0"),
    ],
)
def test_a_state_dict_that_is_no_weight_is_refused(name, spoil, said):
    linear = SparseLinear.from_dense(prune(nn.Linear(6, 4), 0.9))
    state = linear.state_dict()
    state[name] = spoil(state[name])
    before = copy.deepcopy(linear.state_dict())
    with pytest.raises(RuntimeError, match=re.escape(said)):
        linear.load_state_dict(state)
    assert all(torch.equal(linear.get_buffer(key), value) for key, value in before.items())


@pytest.mark.skipif(unavailable("cpu") is not None, reason="the CPU library was not built")
def test_where_sparse_wins():
    def said(
        kept, rows=1024, columns=1024, device="cpu", dtype=torch.float32, kind="linear", **more
    ):
        return wins(rows, columns, int(kept * rows * columns), device, dtype, kind, **more)

    assert said(0.19) and not said(0.22)
    assert said(0.09, dtype=torch.bfloat16) and not said(0.11, dtype=torch.bfloat16)
    assert said(0.07, kind="conv2d") and not said(0.09, kind="conv1d")
    assert said(0.07, kind="conv2d", positions=49) and not said(0.07, kind="conv2d", positions=48)
    assert said(0.31, rows=27, columns=784), "the digits' first layer, compacted"
    assert not said(0.33, rows=27, columns=784) and not said(0.31, rows=100, columns=300)
    assert not said(0.01, rows=8, columns=4096), "three inputs are transposed for too few rows"
    assert not said(0.01, rows=8192, columns=32), "rows cost time without weights"
    assert not said(0.01, rows=100, columns=900, dtype=torch.bfloat16)
    assert not said(0.01, device="cuda") and not said(0.01, dtype=torch.float64)
    with pytest.raises(ValueError, match="kind must be 'linear', 'conv1d' or 'conv2d', but is 'x'"):
        said(0.1, kind="x")


# Times faster than the dense layer with 5 % of the weights and one thread: input and goal.
GOALS = {
    "1024 x 1024, one input": (lambda: nn.Linear(1024, 1024), (1, 1024), 3.5),
    "1024 x 1024, two": (lambda: nn.Linear(1024, 1024), (2, 1024), 4.5),
    "1024 x 1024, 64": (lambda: nn.Linear(1024, 1024), (64, 1024), 5),
    "1024 x 1024, 512": (lambda: nn.Linear(1024, 1024), (512, 1024), 4.5),
    "4096 x 4096, one input": (lambda: nn.Linear(4096, 4096), (1, 4096), 6),
    "BERT, 768 to 3072, 128": (lambda: nn.Linear(768, 3072), (128, 768), 6),
    "BERT, 3072 to 768, 128": (lambda: nn.Linear(3072, 768), (128, 3072), 6),
}
RESNET50 = [  # arguments, size of the image
    ((64, 64, 1), 56), ((64, 64, 3, 1, 1), 56), ((256, 64, 1), 56), ((128, 512, 1), 28),
    ((128, 128, 3, 1, 1), 28), ((512, 128, 1), 28), ((256, 256, 3, 2, 1), 28),
    ((256, 1024, 1), 14), ((1024, 256, 1), 14), ((256, 256, 3, 1, 1), 14),
    ((512, 2048, 1), 7), ((2048, 512, 1), 7), ((512, 512, 3, 1, 1), 7),
]  # fmt: skip


def times_faster(dense, shape, seconds=1.5):
    """The median over turns of a few calls each, in the time of this thread alone."""
    cls = SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d
    runs, input = (dense, cls.from_dense(dense)), torch.randn(shape)
    ratios, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(ratios) < 9:
        took = []
        for run in runs:
            start = time.thread_time()
            for _ in range(5):
                run(input)
            took.append(time.thread_time() - start)
        ratios.append(took[0] / took[1])
    return statistics.median(ratios[2:])


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def timing(test):
    """Mark a test that compares times, with one thread."""
    no_library = unavailable("cpu") is not None
    test = pytest.mark.skipif(no_library, reason="the CPU library was not built")(test)
    return pytest.mark.usefixtures("one_thread")(pytest.mark.timing(pytest.mark.slow(test)))


@timing
@pytest.mark.parametrize("name", GOALS)
def test_linear_layers_are_faster(name):
    make, shape, goal = GOALS[name]
    found = max(times_faster(prune(make(), 0.05), shape) for _ in range(2))
    print(f"{name}: {found:.2f} (goal {goal})")
    assert found >= goal


@timing
@pytest.mark.parametrize(
    "rows, columns",
    [(27, 784), (100, 300), (300, 784), (1024, 1024), (4096, 1024), (4096, 4096)],
)
def test_layers_that_win_are_nowhere_slower(rows, columns):
    size = rows * columns
    most = max(k for k in range(100) if wins(rows, columns, k * size // 100, "cpu", torch.float32))
    dense, found = prune(nn.Linear(columns, rows), most / 100), {}
    for inputs in (1, 2, 3, 8, 33, 64, 512):
        shape = (inputs, columns)
        found[inputs] = max(times_faster(dense, shape, seconds=0.3) for _ in range(2))
    print(f"{most} %: {found}")
    assert min(found.values()) >= 0.95


@timing
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_are_faster(kernel):
    layers = [each for each in RESNET50 if each[0][2] == kernel]
    found = [
        times_faster(prune(nn.Conv2d(*arguments, bias=False), 0.05), (1, arguments[0], size, size))
        for arguments, size in layers
    ]
    print(dict(zip(map(str, layers), found, strict=True)))
    assert statistics.mean(found) >= 3.5

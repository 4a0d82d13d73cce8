"""Masked LSTM, GRU and RNN against plain ones with weights masked gate by gate."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

from dst_kernels.nn import MaskedGRU, MaskedLSTM, MaskedRNN, cudnn_buffer, recurrent
from tests.nn.layer_cases import every_granularity
from tests.nn.recurrent_cases import (
    BATCH,
    INPUTS,
    UNITS,
    build,
    dense_twin,
    every_module,
    expected_gradients,
    expected_masks,
    objective,
    sequence,
    stacks,
)
from tests.ops.backends import BACKENDS

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def check_step(module, options, input, call=None):
    """Output, state and all gradients of one training step, and what they should be."""
    twin = dense_twin(module, options)
    wanted = twin(input)
    objective(wanted).backward()
    gradients = expected_gradients(module, twin)
    outputs = (call or module)(input)
    objective(outputs).backward()
    torch.testing.assert_close(outputs, wanted, **CLOSE)
    assert gradients.keys() == dict(module.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **CLOSE, msg=name)


@every_backend
@every_module
def test_a_step_is_that_of_gates_masked_by_themselves(kind, options, backend):
    check_step(build(kind, options, backend=backend), options, sequence())


@every_granularity
def test_granularities_surrogates_and_the_structure_gradient(granularity):
    shapes = {"row": (4 * UNITS,), "layer": (4,), "element": (4 * UNITS, INPUTS)}
    for surrogate, structure_gradient in (("long_tailed", False), ("triangular", True)):
        module = build(
            MaskedLSTM, granularity=granularity, surrogate=surrogate,
            structure_gradient=structure_gradient,
        )  # fmt: skip
        assert module.threshold_ih_l0.shape == shapes[granularity]
        check_step(module, {}, sequence())


@every_module
def test_thresholds_at_zero_change_nothing(kind, options):
    dense = kind.dense_type(INPUTS, UNITS, **options)
    module = kind.from_dense(copy.deepcopy(dense))
    input = sequence(torch.float32)
    torch.testing.assert_close(module(input), dense(input), rtol=0, atol=0)
    assert module.remaining_ratio() == 1


@pytest.mark.parametrize("kind", [MaskedLSTM, MaskedGRU])
def test_packed_unbatched_and_stateful_input(kind):
    module = build(kind)
    twin = dense_twin(module)
    generator = torch.Generator().manual_seed(2)
    lengths = [4, 2, 3]
    packed = pack_sequence(
        [torch.randn(n, INPUTS, generator=generator, dtype=torch.float64) for n in lengths],
        enforce_sorted=False,
    )
    torch.testing.assert_close(module(packed)[0].data, twin(packed)[0].data, **CLOSE)
    unbatched = torch.randn(3, INPUTS, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(module(unbatched), twin(unbatched), **CLOSE)
    state = torch.randn(1, BATCH, UNITS, generator=generator, dtype=torch.float64)
    state = (state, state.cos()) if kind is MaskedLSTM else state
    torch.testing.assert_close(module(sequence(), state), twin(sequence(), state), **CLOSE)


def test_dropout_between_layers_is_the_parents():
    options = {"num_layers": 2, "dropout": 0.5}
    module = build(MaskedLSTM, options)
    twin = dense_twin(module, options)
    outputs = []
    for each in (module, twin):
        torch.manual_seed(4)
        outputs.append(each(sequence()))
    torch.testing.assert_close(*outputs, **CLOSE)
    assert not torch.equal(outputs[0][0], module.eval()(sequence())[0])


# -- the guard ---------------------------------------------------------------------------------


def one_collapsed_gate(kind=MaskedLSTM, **masking) -> nn.Module:
    """The second gate of weight_hh_l0 is above its weights; all others stay."""
    module = build(kind, **masking)
    with torch.no_grad():
        stacks(module)["weight_hh_l0"][1][1].fill_(7.0)
    return module


@every_backend
@every_granularity
def test_the_guard_looks_at_each_gate(granularity, backend):
    module = one_collapsed_gate(granularity=granularity, backend=backend)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    check_step(module, {}, sequence())
    for name, pairs in stacks(module).items():
        was = before[name.replace("weight", "threshold")].chunk(4)
        for gate, (_, threshold) in enumerate(pairs):
            reset = name == "weight_hh_l0" and gate == 1
            assert torch.equal(threshold, torch.zeros_like(threshold) if reset else was[gate])


def test_evaluation_and_no_guard_commit_nothing():
    module = one_collapsed_gate().eval()
    module(sequence())
    assert module.threshold_hh_l0.max() == 7
    torch.testing.assert_close(module(sequence()), dense_twin(module)(sequence()), **CLOSE)
    module = one_collapsed_gate(reset_ratio=None)
    module(sequence())
    assert module.threshold_hh_l0.max() == 7
    assert not module.mask()["weight_hh_l0"].chunk(4)[1].any()
    module.reset_threshold(7.0)
    assert module.remaining_ratio() == 0
    torch.testing.assert_close(module(sequence()), dense_twin(module)(sequence()), **CLOSE)


# -- other ways to call it ---------------------------------------------------------------------


def test_one_launch_masks_all_and_one_makes_all_gradients(monkeypatch):
    from dst_kernels.autograd import weights

    calls = []
    original = weights.implementation
    monkeypatch.setattr(
        weights,
        "implementation",
        lambda backend, device, op, **more: (
            calls.append(op) or original(backend, device, op, **more)
        ),
    )
    module = build(MaskedLSTM, {"num_layers": 3, "bidirectional": True})
    objective(module(sequence())).backward()
    assert calls == ["masked_weights", "masked_weights_backward"]


@pytest.mark.parametrize("kind", [MaskedLSTM, MaskedGRU, MaskedRNN])
def test_under_a_dispatch_mode(kind):
    module = one_collapsed_gate(kind) if kind is not MaskedRNN else build(kind)

    def counted(input):
        with FlopCounterMode(display=False):
            return module(input)

    check_step(module, {}, sequence(), counted)
    assert max(t.max() for pairs in stacks(module).values() for _, t in pairs) < 1


def test_with_fake_tensors():
    with FakeTensorMode():
        module = MaskedLSTM(INPUTS, UNITS, 2)
        output, (hidden, _) = module(torch.randn(4, 3, INPUTS))
    assert output.shape == (4, 3, UNITS) and hidden.shape == (2, 3, UNITS)


def test_with_swapped_parameters_and_torch_func():
    module = build(MaskedLSTM).eval()
    other = {name: (p * 0.9).detach() for name, p in module.named_parameters()}

    def loss(parameters):
        return objective(torch.func.functional_call(module, parameters, (sequence(),)))

    swapped = copy.deepcopy(module)
    swapped.load_state_dict(other)
    wanted = objective(swapped(sequence()))
    wanted.backward()
    torch.testing.assert_close(loss(other), wanted, **CLOSE)
    gradients = torch.func.grad(loss)(other)
    for name, parameter in swapped.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, **CLOSE, msg=name)
    torch.testing.assert_close(objective(module(sequence())), loss(dict(module.named_parameters())))


def test_inside_a_compiled_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = build(MaskedLSTM, dtype=torch.float32)
            self.head = nn.Linear(UNITS, 2)

        def forward(self, input):
            return self.head(self.lstm(input.cos())[0])

    model = Model()
    input = sequence(torch.float32)
    torch.testing.assert_close(torch.compile(model)(input), model(input))


def test_two_forwards_before_their_backwards():
    module = build(MaskedLSTM)
    twin = dense_twin(module)
    for each in (module, twin):
        first, second = each(sequence()), each(sequence().flip(0))
        objective(second).backward()
        objective(first).backward()
    for name, wanted in expected_gradients(module, twin).items():
        torch.testing.assert_close(module.get_parameter(name).grad, wanted, **CLOSE, msg=name)


def test_frozen_weights_thresholds_and_biases():
    module = build(MaskedLSTM)
    full = build(MaskedLSTM)
    objective(full(sequence())).backward()
    frozen = ("weight_ih_l0", "threshold_hh_l0", "bias_hh_l0")
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    objective(module(sequence())).backward()
    for name, parameter in module.named_parameters():
        if name in (*frozen, "threshold_ih_l0"):  # that of a frozen weight does not move
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, full.get_parameter(name).grad, **CLOSE)


# -- where cuDNN wants the weights -------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bias": False}])
def test_masked_weights_go_straight_into_one_buffer(monkeypatch, options):
    """With a layout that reorders parameters and leaves gaps, as cuDNN's may."""
    seen = []

    def layout(kind, shapes, dtype, device):
        offsets, end = [], 0
        for shape in reversed(shapes):
            end += 3
            offsets.insert(0, end)
            end += shape.numel()
        return end + 8, offsets

    def tensors_in(buffer, offsets, shapes):
        seen.append((buffer, made(buffer, offsets, shapes)))
        return seen[-1][1]

    made = cudnn_buffer._tensors_in
    monkeypatch.setattr(torch, "_use_cudnn_rnn_flatten_weight", lambda: True)
    monkeypatch.setattr(cudnn_buffer, "cudnn_takes", lambda dtype, device: True)
    monkeypatch.setattr(cudnn_buffer, "_cudnn_layout", layout)
    monkeypatch.setattr(cudnn_buffer, "_tensors_in", tensors_in)
    module = build(MaskedLSTM, options)
    check_step(module, options, sequence())
    (buffer, tensors), masks = seen[0], expected_masks(module)
    filled = torch.zeros_like(buffer, dtype=torch.bool)
    for name, tensor in zip(module._flat_weights_names, tensors, strict=True):
        own = module.get_parameter(name)
        assert tensor.untyped_storage().data_ptr() == buffer.data_ptr()
        assert torch.equal(tensor, own * masks[name] if name in masks else own)
        filled[tensor.storage_offset() :][: tensor.numel()] = True
    assert not buffer[~filled].any()
    assert filled.sum() == sum(tensor.numel() for tensor in tensors)


# -- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.bfloat16) for kind in (MaskedLSTM, MaskedGRU, MaskedRNN)]
    + [(MaskedGRU, torch.float16)],  # torch has no LSTM in float16 on every CPU
)
def test_autocast_gives_what_the_parent_gives(kind, dtype):
    module = build(kind, dtype=torch.float32)
    twin = dense_twin(module)
    input = sequence(torch.float32)
    results = []
    for each in (twin, module):
        with torch.autocast("cpu", dtype=dtype):
            try:
                output = each(input)[0]
            except RuntimeError as error:
                if each is module:
                    raise
                pytest.skip(f"torch's own {kind.dense_type.__name__} fails here: {error}")
        objective(output.float()).backward()
        results.append(output)
    assert results[0].dtype == results[1].dtype
    torch.testing.assert_close(*results, rtol=0, atol=0)
    for name, wanted in expected_gradients(module, twin).items():
        grad = module.get_parameter(name).grad
        assert grad.dtype == torch.float32
        # The twin rounds its gradient once more, to the dtype of the product, where ours does too.
        torch.testing.assert_close(grad.double(), wanted.double(), rtol=1e-5, atol=1e-5, msg=name)


def test_masks_are_decided_on_the_stored_weights():
    """A weight just above its threshold rounds to it in bfloat16, and is kept all the same."""
    module = MaskedRNN(1, 1, bias=False)
    with torch.no_grad():
        module.weight_ih_l0.fill_(0.5 + 2**-12)
        module.threshold_ih_l0.fill_(0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = module.eval()(torch.ones(1, 1, 1))
    assert output.item() != 0


def test_thresholds_keep_their_precision():
    module = build(MaskedLSTM, dtype=torch.float32).bfloat16()
    assert module.weight_ih_l0.dtype == torch.bfloat16
    assert module.threshold_ih_l0.dtype == torch.float32
    output, _ = module(sequence(torch.bfloat16))
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert module.threshold_hh_l0.grad.dtype == torch.float32
    assert module.double().threshold_hh_l0.dtype == torch.float64


def test_what_the_parent_refuses_is_refused():
    module = build(MaskedLSTM, dtype=torch.float32)
    with pytest.raises(ValueError, match="does not match weight dtype"):
        module(sequence(torch.float64))
    with pytest.raises(RuntimeError, match="input_size"):
        module(torch.randn(2, 3, INPUTS + 1))
    torch.testing.assert_close(module(sequence(torch.float32)), module(sequence(torch.float32)))


# -- as a module -------------------------------------------------------------------------------


@every_module
def test_state_dicts_copies_and_pickles(kind, options):
    module = build(kind, options)
    input = sequence()
    wanted = module(input)
    fresh = kind(INPUTS, UNITS, dtype=torch.float64, **options)
    fresh.load_state_dict(module.state_dict())
    again = pickle.loads(pickle.dumps(module))
    for each in (fresh, copy.deepcopy(module), again):
        torch.testing.assert_close(each(input), wanted, rtol=0, atol=0)


def test_a_dense_checkpoint_loads_strictly(caplog):
    dense = nn.LSTM(INPUTS, UNITS, 2)
    module = build(MaskedLSTM, {"num_layers": 2}, torch.float32)
    module.load_state_dict(dense.state_dict())
    assert caplog.text.count("no thresholds") == 1
    assert module.remaining_ratio() == 1
    input = sequence(torch.float32)
    torch.testing.assert_close(module(input), dense(input), rtol=0, atol=0)


@every_module
def test_dense_again(kind, options):
    module = build(kind, options).eval()
    dense = module.to_dense()
    assert type(dense) is kind.dense_type
    assert not any("threshold" in name for name in dense.state_dict())
    torch.testing.assert_close(dense(sequence()), module(sequence()), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert not dense(sequence())[0].any()  # it computes with what it has
    assert any(p.any() for p in module.parameters() if p.dim() == 2)  # and shares only biases


def test_new_weights_reset_parameters_and_repr():
    module = build(MaskedGRU)
    module.weight_hh_l0 = nn.Parameter(torch.zeros_like(module.weight_hh_l0))
    torch.testing.assert_close(module(sequence()), dense_twin(module)(sequence()), **CLOSE)
    module.reset_parameters()
    assert module.weight_hh_l0.any()
    assert not any(t.any() for pairs in stacks(module).values() for _, t in pairs)
    assert "granularity=row" in repr(module) and repr(module).startswith("MaskedGRU(5, 6")


def test_masks_and_remaining_ratio():
    module = one_collapsed_gate()
    masks, wanted = module.mask(), expected_masks(module)
    assert masks.keys() == wanted.keys()
    assert all(torch.equal(masks[name], wanted[name]) for name in masks)
    kept = sum(mask.sum().item() for mask in wanted.values())
    total = sum(mask.numel() for mask in wanted.values())
    assert module.remaining_ratio().item() == pytest.approx(kept / total, rel=1e-6)


@pytest.mark.parametrize(
    ("masking", "message"),
    [
        ({"granularity": "gate"}, "granularity must be one of"),
        ({"path": "fused"}, "path must be one of auto, packed"),
        ({"surrogate": "step"}, "surrogate"),
        ({"reset_ratio": 2.0}, "reset_ratio"),
        ({"backend": "metal"}, "backend must be one of"),
    ],
)
def test_bad_options(masking, message):
    with pytest.raises(ValueError, match=message):
        MaskedLSTM(INPUTS, UNITS, **masking)


def test_only_a_parent_can_be_converted():
    with pytest.raises(TypeError, match="must be a LSTM"):
        MaskedLSTM.from_dense(nn.GRU(2, 2))
    with pytest.raises(TypeError, match="must be a GRU"):
        MaskedGRU.from_dense(MaskedGRU(2, 2))


# -- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:RNN module weights")  # that they are not flat
@every_module
def test_on_a_gpu_weights_are_flat_and_results_the_parents(kind, options):
    for autocast in (None, torch.float16, torch.bfloat16):
        module = build(kind, options, torch.float32).cuda()
        twin = dense_twin(module.cpu(), options).cuda()
        module, input = module.cuda(), sequence(torch.float32).cuda()
        results = []
        for each in (module, twin):
            with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
                output = each(input)[0]
            output.double().square().sum().backward()
            results.append(output)
        assert results[0].dtype == results[1].dtype
        torch.testing.assert_close(*results, rtol=0, atol=0)
        twin = twin.cpu()
        for parameter in twin.parameters():
            parameter.grad = parameter.grad.cpu()
        gradients = expected_gradients(module.cpu(), twin)
        for name, parameter in module.named_parameters():
            tolerance = 1e-4 if autocast is None else 5e-3
            torch.testing.assert_close(
                parameter.grad.cpu().double(), gradients[name].double(), rtol=tolerance,
                atol=tolerance, msg=name,
            )  # fmt: skip


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph():
    module = build(MaskedLSTM, dtype=torch.float32).cuda()
    input = sequence(torch.float32).cuda()

    def step():
        for parameter in module.parameters():
            parameter.grad = None
        objective(module(input)[0]).backward()
        return [p.grad for p in module.parameters()]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            wanted = [grad.clone() for grad in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.testing.assert_close(captured, wanted)


def test_the_dtype_of_products_on_a_gpu(monkeypatch):
    """torch casts to float16 for cuDNN, whatever autocast says; ours must not cast again."""
    monkeypatch.setattr(recurrent, "autocast_enabled", lambda kind: True)
    monkeypatch.setattr(recurrent, "cudnn_takes", lambda dtype, device: True)
    assert recurrent._product_dtype(torch.zeros(1)) == torch.float16
    assert recurrent._product_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64

"""The planner: a pure function whose choices follow its costs, measured where there are any."""

from __future__ import annotations

import itertools

import pytest
import torch

from dst_kernels.plan import PACKED, PATHS, PLANS, Plan, estimate, most_kept, plan_linear
from dst_kernels.plan import table as plan_table
from dst_kernels.plan.table import measured_costs

from .plan_tables import GPU, PACKED_WINS, PRODUCTS, case

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TOKENS = (0, 1, 2, 16, 64, 128, 512, 1024, 4096, 8192, 65536, 2**20)
WEIGHTS = ((1, 1), (1024, 1024), (4096, 4096), (4096, 14336), (8192, 1024))
# input, weight, tf32
DTYPES = ((BF16, F32, False), (BF16, BF16, False), (F16, F32, False), (F32, F32, True))
pytestmark = pytest.mark.usefixtures("fresh_costs")

VALID = {Plan(*parts) for parts in itertools.product(("fused", "packed"), repeat=3)}


def test_names():
    assert PATHS == ("auto", "fused", "packed", "mixed", "sparse")
    assert PLANS["fused"] == Plan("fused", "fused", "fused")
    assert PLANS["packed"] == Plan("packed", "packed", "packed")
    assert PLANS["mixed"] == Plan("packed", "packed", "fused")
    assert PLANS["sparse"] == Plan("sparse", "sparse", "packed")


def every_case():
    for M, (N, K), (of_input, of_weight, tf32) in itertools.product(TOKENS, WEIGHTS, DTYPES):
        for needs_grad_input, packed_available in itertools.product((True, False), repeat=2):
            yield (
                (M, N, K, of_input, of_weight),
                {
                    "tf32": tf32,
                    "needs_grad_input": needs_grad_input,
                    "packed_available": packed_available,
                },
            )


def test_every_choice_is_a_plan_and_the_same_each_time():
    for arguments, options in every_case():
        plan = plan_linear(*arguments, **options)
        assert plan in VALID
        plan_linear.cache_clear()
        assert plan_linear(*arguments, **options) == plan


def test_a_plan_cannot_be_changed():
    with pytest.raises(AttributeError):
        PLANS["fused"].forward = "packed"


def test_few_tokens_are_fused():
    """Where reading the weight is all the work, packing would read and write it once more."""
    for M, weight in itertools.product((1, 16, 64), WEIGHTS[1:]):
        plan = plan_linear(M, *weight, BF16, F32)
        assert (plan.forward, plan.grad_input) == ("fused", "fused")


def test_many_tokens_are_packed():
    for M, weight in itertools.product((8192, 65536), WEIGHTS[1:]):
        plan = plan_linear(M, *weight, BF16, F32)
        assert (plan.forward, plan.grad_input) == ("packed", "packed")


def test_an_existing_copy_is_used():
    for arguments, options in every_case():
        if options["packed_available"]:
            plan = plan_linear(*arguments, **options)
            assert (plan.forward, plan.grad_input) == ("packed", "packed")


def test_an_existing_copy_does_not_change_how_the_weight_s_gradient_runs():
    for arguments, options in every_case():
        plans = {
            plan_linear(*arguments, **{**options, "packed_available": available}).grad_weight
            for available in (True, False)
        }
        assert len(plans) == 1


def test_float64_is_packed():
    for M, weight, gpu in itertools.product(TOKENS, WEIGHTS, (None, "NVIDIA H200")):
        for dtypes in ((F64, F64), (F32, F64), (F64, F32)):
            assert plan_linear(M, *weight, *dtypes, gpu=gpu) == PLANS["packed"]


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_one_crossover_from_fused_to_packed(weight):
    """With more tokens a product never goes back to the fused kernel."""
    for (*dtypes, tf32), needs_grad_input in itertools.product(DTYPES, (True, False)):
        plans = [
            plan_linear(M, *weight, *dtypes, tf32=tf32, needs_grad_input=needs_grad_input)
            for M in sorted({*TOKENS, *(2**i for i in range(21)), *(3 * 2**i for i in range(19))})
        ]
        for product in ("forward", "grad_input"):
            choices = [getattr(plan, product) == "packed" for plan in plans]
            assert choices == sorted(choices), product


@pytest.mark.parametrize(
    "tokens, fused, packed",
    [(16, 51, 64), (256, 55, 67), (384, 74, 74), (512, 96, 85), (768, 143, 106)],
)
def test_estimated_forward_and_input_s_gradient(tokens, fused, packed):
    """Microseconds on an H100 from counts of instructions, bytes and launches; not measured."""
    costs = estimate._costs(tokens, 4096, 4096, BF16, F32, None, False)
    of_fused = costs.fused_forward + costs.fused_grad_input
    assert 1e6 * of_fused == pytest.approx(fused, rel=0.1)
    assert 1e6 * (costs.packed_forward + costs.packed_grad_input) == pytest.approx(packed, rel=0.1)


@pytest.mark.parametrize("size, near", [(4096, 400), (1024, 450), (512, 700)])
def test_estimated_crossover_from_fused_to_packed(size, near):
    """Where launches weigh more, extra arithmetic pays up to more tokens than the pass it saves."""
    crossover = next(
        M for M in itertools.count(1) if plan_linear(M, size, size, BF16, F32).forward == PACKED
    )
    assert crossover == pytest.approx(near, rel=0.1)


def test_what_the_input_s_gradient_saves_counts():
    """A copy that the backward pass uses too pays at fewer tokens."""
    plans = {
        (M, needs): plan_linear(M, 4096, 4096, BF16, F32, needs_grad_input=needs)
        for M in range(16, 4096, 16)
        for needs in (True, False)
    }
    crossover = {
        needs: min(M for (M, n), plan in plans.items() if n == needs and plan.forward == "packed")
        for needs in (True, False)
    }
    assert crossover[True] <= crossover[False]


def test_without_the_input_s_gradient_only_the_forward_pass_decides(table):
    """A forward pass that is cheaper packed stays packed, whatever dX would have cost."""
    table([case(forward=(3.0, 2.0), grad_input=(1.0, 5.0))])
    assert plan(needs_grad_input=False).forward == "packed"
    assert plan(needs_grad_input=True).forward == "packed"
    table([case(forward=(2.0, 3.0), grad_input=(5.0, 1.0))])
    assert plan(needs_grad_input=False).forward == "fused"
    assert plan(needs_grad_input=True).forward == "packed"


# -- measurements ----------------------------------------------------------------------------------


def plan(M=1024, N=4096, K=4096, of_input=BF16, of_weight=F32, gpu=GPU, **options):
    return plan_linear(M, N, K, of_input, of_weight, gpu=gpu, **options)


def test_measurements_decide(table):
    table([case()])
    assert plan() == PLANS["fused"]
    table([case(**PACKED_WINS)])
    assert plan() == PLANS["packed"]
    table([case(**{**PACKED_WINS, "grad_weight": (1.0, 2.0)})])
    assert plan() == PLANS["mixed"]
    table([case(forward=(2.0, 1.0), grad_input=(1.0, 2.0))])
    assert plan() == Plan("packed", "fused", "fused")


def test_all_costs_of_a_case_are_found(table):
    table([case(forward=(1.0, 2.0), grad_input=(3.0, 4.0), grad_weight=(5.0, 6.0))])
    assert measured_costs(GPU, 1024, 4096, 4096, BF16, F32) == {
        "fused_forward": 1.0,
        "packed_forward": 2.0,
        "fused_grad_input": 3.0,
        "packed_grad_input": 4.0,
        "fused_grad_weight": 5.0,
        "packed_grad_weight": 6.0,
    }


def test_the_nearest_case_counts(table):
    table([case(M=16), case(M=1024, **PACKED_WINS)])
    assert plan(M=16) == plan(M=64) == PLANS["fused"]
    assert plan(M=512) == plan(M=1024) == plan(M=4096) == PLANS["packed"]
    table([case(N=1024), case(N=8192, **PACKED_WINS)])
    assert plan(N=2048) == PLANS["fused"]
    assert plan(N=4096) == PLANS["packed"]


def test_far_cases_and_other_gpus_and_dtypes_do_not_count(table):
    """Then the estimate decides."""
    table([case(forward=(1.0, 9.0), grad_input=(1.0, 9.0))])
    assert plan(M=8 * 1024).forward == "fused", "the farthest that counts"
    for other in (
        {"M": 8 * 1024 + 1},
        {"M": 2048, "N": 8192, "K": 16384},
        {"M": 8192, "gpu": "another"},
        {"M": 8192, "gpu": None},
        {"M": 8192, "of_input": F16},
        {"M": 8192, "of_weight": BF16},
    ):
        gpu = other.get("gpu", GPU)
        expected = plan(**{**other, "gpu": "none such"})
        assert plan(**other) == expected, other
        sizes = other.get("M", 1024), other.get("N", 4096), other.get("K", 4096)
        dtypes = other.get("of_input", BF16), other.get("of_weight", F32)
        assert measured_costs(gpu, *sizes, *dtypes) is None


def test_exact_float32_is_not_judged_by_tf32_measurements(table):
    table([case(input_dtype="float32", weight_dtype="float32", **PACKED_WINS)])
    assert plan(of_input=F32, tf32=True) == PLANS["packed"]
    without = plan(of_input=F32, tf32=False)
    table([case(input_dtype="float32", weight_dtype="float32")])
    assert plan(of_input=F32, tf32=True) == PLANS["fused"]
    assert plan(of_input=F32, tf32=False) == without


def test_tf32_is_not_judged_by_measurements_of_exact_float32(table):
    exact = case(input_dtype="float32", weight_dtype="float32", **PACKED_WINS) | {"tf32": False}
    table([])
    without = plan(of_input=F32, tf32=True)
    assert without != PLANS["packed"]
    table([exact])
    assert plan(of_input=F32, tf32=True) == without
    table([exact | {"tf32": True}])
    assert plan(of_input=F32, tf32=True) == PLANS["packed"]


def test_an_empty_batch_finds_a_plan(table):
    table([case(M=1)])
    assert plan(M=0) == PLANS["fused"]


def test_the_nearest_measured_share_says_how_many_weights_may_be_kept(monkeypatch):
    cases = [
        {"kind": "linear", "dtype": "float32", "M": 64, "N": 300, "K": 784, "share": 0.3,
         "share_if_made": 0.4},
        {"kind": "linear", "dtype": "float32", "M": 1, "N": 300, "K": 784, "share": 0.0},
        {"kind": "linear", "dtype": "bfloat16", "M": 64, "N": 300, "K": 784, "share": 0.1},
    ]  # fmt: skip
    monkeypatch.setattr(plan_table, "_tables", lambda: {"cpu": {"kept": cases}})
    found = most_kept.__wrapped__
    assert found(100, 200, 1000, "linear", F32) == 60_000
    assert found(100, 200, 1000, "linear", F32, True) == 80_000
    assert found(100, 200, 1000, "linear", torch.bfloat16, True) == 20_000
    assert found(100, 200, 1000, "linear", torch.bfloat16) == 20_000
    assert found(2, 200, 1000, "linear", F32) == 0
    assert found(100, 200, 1000, "conv", F32) == 0
    assert found(100, 200, 1000, "linear", torch.float64) == 0


def test_the_shipped_tables_have_the_format():
    for gpu, table in plan_table._tables().items():
        assert table["kept" if gpu == "cpu" else "cases"]
        for one in table.get("kept", ()):
            assert all(one[size] >= 1 for size in "MNK") and 0 <= one["share"] < 1
            assert isinstance(getattr(torch, one["dtype"]), torch.dtype)
        for name, sizes in (("cases", "MNK"), ("convs", "MNC")):
            for one in table.get(name, ()):
                assert all(one[size] >= 1 for size in sizes)
                assert isinstance(getattr(torch, one["input_dtype"]), torch.dtype)
                assert isinstance(getattr(torch, one["weight_dtype"]), torch.dtype)
                for product in PRODUCTS:
                    assert all(0 < one[product][path] < 10 for path in ("fused", "packed"))
        for one in table.get("convs", ()):
            assert len(one["kernel"]) == len(one["stride"]) <= 2
            assert one["groups"] >= 1

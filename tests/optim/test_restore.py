"""RestoreCollapsed: which layers go back, and to which thresholds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dst_kernels
from dst_kernels.nn import MaskedLinear
from dst_kernels.optim import RestoreCollapsed


@torch.no_grad()
def layer(*thresholds):
    """1,000 weights of a layer are 1 to 1000, of which the guard wants more than 10."""
    model = nn.Sequential(MaskedLinear(100, 10, reset_ratio=0.01))
    model[0].weight.copy_(torch.arange(1.0, 1001).view(10, 100))
    model[0].threshold.fill_(*thresholds)
    return model


def look_after(restore, threshold):
    with torch.no_grad():
        restore.model[0].threshold.fill_(threshold)
    restore.step()
    return restore.model[0].threshold


def test_a_collapsed_layer_gets_its_last_healthy_thresholds():
    restore = RestoreCollapsed(layer(0.0), every=1)
    assert (look_after(restore, 960.0) == 960).all(), "4 % are healthy"
    assert (look_after(restore, 985.0) == 985).all(), "1.5 % are not, nor are they a collapse"
    # The guard has set the thresholds to 0, and training has raised them a little since.
    torch.testing.assert_close(look_after(restore, 300.0), torch.full((10,), 0.9 * 960))
    assert (look_after(restore, 970.0) == 970).all(), "which is the healthy state from now on"
    look_after(restore, 989.0)
    torch.testing.assert_close(look_after(restore, 0.0), torch.full((10,), 0.9 * 970))


def test_what_grows_back_by_itself_is_left_alone():
    restore = RestoreCollapsed(layer(0.0), every=2)
    look_after(restore, 960.0), look_after(restore, 960.0)
    look_after(restore, 850.0)
    assert (look_after(restore, 850.0) == 850).all(), "4 to 15 % is no jump"
    assert (look_after(restore, 0.0) == 0).all(), "no look in this step"
    assert (look_after(restore, 0.0) == 0).all(), "15 to 100 % is no collapse"


def test_each_gate_of_a_recurrent_module_is_judged_by_itself():
    model = dst_kernels.sparsify_(nn.Sequential(nn.GRU(20, 20)))
    gru = model[0]
    restore = RestoreCollapsed(model, every=1)
    quantiles = [gru.weight_ih_l0[20 * i : 20 * i + 20].abs().quantile(0.97) for i in range(3)]
    with torch.no_grad():
        for i, quantile in enumerate(quantiles):
            gru.threshold_ih_l0[20 * i : 20 * i + 20] = quantile
    restore.step()
    with torch.no_grad():
        gru.threshold_ih_l0[20:40] = 0
    restore.step()
    for i, (quantile, factor) in enumerate(zip(quantiles, (1.0, 0.9, 1.0), strict=True)):
        expected = (factor * quantile).expand(20)
        torch.testing.assert_close(gru.threshold_ih_l0[20 * i : 20 * i + 20], expected)


def test_a_stop_changes_nothing():
    restore = RestoreCollapsed(layer(0.0), every=1)
    look_after(restore, 960.0)
    other = RestoreCollapsed(layer(0.0), every=1)
    other.load_state_dict(copy.deepcopy(restore.state_dict()))
    assert torch.equal(look_after(restore, 0.0), look_after(other, 0.0))
    assert restore.model[0].threshold[0] > 800


def test_nothing_is_read_by_the_host():
    with FakeTensorMode():
        restore = RestoreCollapsed(layer(0.0), every=1)
        restore.step()
    assert restore.steps_done == 1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="every must be at least 1"):
        RestoreCollapsed(layer(0.0), every=0)
    with pytest.raises(ValueError, match="no masked"):
        RestoreCollapsed(nn.Linear(2, 2))

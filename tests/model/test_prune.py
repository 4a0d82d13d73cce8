"""Pruning by quantile: the share that was asked for remains, and these are the largest."""

import pytest
import torch
from torch import nn

import dst_kernels
from dst_kernels.nn.find import named_masked_weights
from dst_kernels.optim import DSTSGD


def _model(dtype=torch.float32, reset_ratio=None, **options):
    torch.manual_seed(0)
    layers = (
        nn.Conv1d(3, 40, 2),
        nn.LSTM(10, 20),
        nn.ConvTranspose1d(40, 9, 3),
        nn.Bilinear(9, 8, 7),
    )
    config = dst_kernels.SparsifyConfig(reset_ratio=reset_ratio, **options)
    return dst_kernels.sparsify_(nn.ModuleList(layers).to(dtype), config)


def _sizes(model):
    return [part.weight.detach().abs().flatten() for _, part in named_masked_weights(model)]


def _masks(model):
    return [part.mask().flatten() for _, part in named_masked_weights(model)]


@pytest.mark.parametrize("granularity", ["row", "layer", "element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_weights_of_the_model_remain(granularity, dtype):
    model = _model(dtype, granularity=granularity)
    sizes = torch.cat(_sizes(model))
    for ratio in (1.0, 0.5, 0.1):
        assert dst_kernels.prune_(model, ratio) is model
        kept = torch.cat(_masks(model))
        assert kept.sum() == round(ratio * len(kept))
        assert kept.all() or sizes[kept].min() > sizes[~kept].max()


def test_the_largest_weights_of_each_layer_remain():
    model = dst_kernels.prune_(_model(), 0.03, scope="layer")
    for sizes, kept in zip(_sizes(model), _masks(model), strict=True):
        assert kept.sum() == round(0.03 * len(kept)) and sizes[kept].min() > sizes[~kept].max()


def test_ties_zeros_nans_and_mixed_dtypes():
    layers = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False).double())
    for layer, start in zip(layers, (0, 1), strict=True):
        rows = [[0, 0, 1, 2], [2, 2, 3, float("nan")]]
        layer.weight.data = torch.tensor(rows, dtype=layer.weight.dtype) + start * 1e-12
    dst_kernels.sparsify_(layers)
    for ratio, kept in ((1.0, 14), (0.75, 12), (0.6, 10), (0.3, 4), (0.25, 4)):
        dst_kernels.prune_(layers, ratio)
        assert sum(int(mask.sum()) for mask in _masks(layers)) == kept, ratio


def test_a_deferred_optimizer_goes_on_with_the_new_thresholds():
    model = dst_kernels.sparsify_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    optimizer, x = DSTSGD(model, lr=0.0), torch.randn(3, 8)
    model(x).sum().backward()
    optimizer.step()
    dst_kernels.prune_(model, 0.5)
    masked = [part.weight * part.mask() for _, part in named_masked_weights(model)]
    expected = x @ masked[0].T + model[0].bias
    torch.testing.assert_close(model(x), expected @ masked[1].T + model[1].bias)


def test_what_cannot_be_done_is_said_and_changes_nothing():
    model = _model(reset_ratio=0.2)
    for ratio, words in ((0.1, "reset_ratio"), (0.0, "positive"), (1.5, "at most 1")):
        with pytest.raises(ValueError, match=words):
            dst_kernels.prune_(model, ratio)
    with pytest.raises(TypeError, match="ratio must be a number"):
        dst_kernels.prune_(model, "5%")
    with pytest.raises(ValueError, match="scope must be one of global, layer"):
        dst_kernels.prune_(model, 0.5, scope="row")
    assert all(mask.all() for mask in _masks(model))

"""Masked recurrent modules: LSTM, GRU and plain RNN."""

from __future__ import annotations

from torch import nn

from ._recurrent import MaskedRecurrent

__all__ = ["MaskedGRU", "MaskedLSTM", "MaskedRNN"]


class MaskedLSTM(MaskedRecurrent, nn.LSTM):
    __doc__ = MaskedRecurrent.__doc__.format(parent="LSTM")
    dense_type = nn.LSTM


class MaskedGRU(MaskedRecurrent, nn.GRU):
    __doc__ = MaskedRecurrent.__doc__.format(parent="GRU")
    dense_type = nn.GRU


class MaskedRNN(MaskedRecurrent, nn.RNN):
    __doc__ = MaskedRecurrent.__doc__.format(parent="RNN")
    dense_type = nn.RNN

"""Offer the methods that DST is compared with, on the same masked layers: one rule per module."""

from .deepr import DeepR
from .dns import DynamicNetworkSurgery
from .dsr import DynamicSparseReparameterization
from .magnitude import MagnitudePruning
from .rigl import RigL
from .set import SET
from .sparse_momentum import SparseMomentum
from .str import STR

__all__ = [
    "SET",
    "STR",
    "DeepR",
    "DynamicNetworkSurgery",
    "DynamicSparseReparameterization",
    "MagnitudePruning",
    "RigL",
    "SparseMomentum",
]

"""Offer the methods that DST is compared with, on the same masked layers: one rule per module."""

from .dsr import DynamicSparseReparameterization
from .rigl import RigL
from .set import SET
from .sparse_momentum import SparseMomentum

__all__ = ["SET", "DynamicSparseReparameterization", "RigL", "SparseMomentum"]

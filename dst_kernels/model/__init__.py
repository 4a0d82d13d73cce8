"""Handle whole models: conversion, regulariser, parameter groups, reports, and back to dense."""

from .check import check_masks
from .config import SparsifyConfig
from .convert import plan_sparsify, sparsify_
from .finalize import densify_, finalize_
from .freeze import freeze_masks_, unfreeze_masks_
from .load import load_sparse
from .onnx_file import save_onnx
from .parameters import parameter_groups, sparse_regularization
from .planning import ConversionPlan
from .prune import prune_
from .report import SparsityReport, remaining_ratio, sparsity_report
from .save import save_sparse
from .sparse_file import SparseFileError

__all__ = [
    "ConversionPlan",
    "SparseFileError",
    "SparsifyConfig",
    "SparsityReport",
    "check_masks",
    "densify_",
    "finalize_",
    "freeze_masks_",
    "load_sparse",
    "parameter_groups",
    "plan_sparsify",
    "prune_",
    "remaining_ratio",
    "save_onnx",
    "save_sparse",
    "sparse_regularization",
    "sparsify_",
    "sparsity_report",
    "unfreeze_masks_",
]

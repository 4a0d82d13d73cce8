"""Train sparse PyTorch models with trainable pruning thresholds in drop-in layers.

`functional` has the stateless operations, `nn` the layers, `optim` the optimizers, `methods` other
methods on the same layers, and this module what acts on a whole model. Method: Liu et al.,
"Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable Masked Layers",
ICLR 2020.
"""

from importlib.metadata import version as _version

from . import functional, methods, nn, optim
from .model import (
    ConversionPlan,
    SparseFileError,
    SparsifyConfig,
    SparsityReport,
    check_masks,
    densify_,
    finalize_,
    freeze_masks_,
    load_sparse,
    parameter_groups,
    plan_sparsify,
    prune_,
    remaining_ratio,
    save_onnx,
    save_sparse,
    sparse_regularization,
    sparsify_,
    sparsity_report,
    unfreeze_masks_,
)
from .nn import group_, mask_parameter_, ungroup_, weights_unchanged
from .optim import TargetRatio

__version__ = _version("dst_kernels")

__all__ = [
    "ConversionPlan",
    "SparseFileError",
    "SparsifyConfig",
    "SparsityReport",
    "TargetRatio",
    "__version__",
    "check_masks",
    "densify_",
    "finalize_",
    "freeze_masks_",
    "functional",
    "group_",
    "load_sparse",
    "mask_parameter_",
    "methods",
    "nn",
    "optim",
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
    "ungroup_",
    "weights_unchanged",
]

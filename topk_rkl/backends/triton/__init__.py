"""Triton kernels for NVIDIA and AMD GPUs: one file an op, the kernel first, then its launcher."""

from topk_rkl.backends.triton.mass import mass_loss, rest, spread
from topk_rkl.backends.triton.scatter import scatter
from topk_rkl.backends.triton.select import select, select_loss
from topk_rkl.backends.triton.sparse_head import sparse_head, sparse_head_weight_grad
from topk_rkl.backends.triton.support_loss import support_loss

SLABS = True  # see topk_rkl/rows.py

__all__ = [
    "mass_loss",
    "rest",
    "scatter",
    "select",
    "select_loss",
    "sparse_head",
    "sparse_head_weight_grad",
    "spread",
    "support_loss",
]

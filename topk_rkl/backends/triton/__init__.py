"""Triton kernels for NVIDIA and AMD GPUs: one file an op, the kernel first, then its launcher."""

from topk_rkl.backends.triton.scatter import scatter
from topk_rkl.backends.triton.select import select, select_loss
from topk_rkl.backends.triton.support_loss import support_loss

__all__ = ["scatter", "select", "select_loss", "support_loss"]

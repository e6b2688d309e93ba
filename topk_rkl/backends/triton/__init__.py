"""Triton kernels for NVIDIA and AMD GPUs: one file per op, the kernel first, then its launcher."""

from torch import Tensor

from topk_rkl.backends.triton.launch import MAX_K, MAX_VOCAB
from topk_rkl.backends.triton.linear_logits import linear_hidden_grad, linear_logits
from topk_rkl.backends.triton.linear_loss import linear_loss
from topk_rkl.backends.triton.linear_weight_grad import linear_weight_grad
from topk_rkl.backends.triton.mass_loss import mass_grad, mass_loss, tail_logit
from topk_rkl.backends.triton.memory import INTERPRETED
from topk_rkl.backends.triton.scale_rows import scale_rows
from topk_rkl.backends.triton.scatter import scatter
from topk_rkl.backends.triton.select import select, select_loss
from topk_rkl.backends.triton.support_loss import support_loss
from topk_rkl.divergence import Code

SLABS = True  # see topk_rkl/rows.py

__all__ = [
    "linear_hidden_grad",
    "linear_logits",
    "linear_loss",
    "linear_weight_grad",
    "mass_grad",
    "mass_loss",
    "scale_rows",
    "scatter",
    "select",
    "select_loss",
    "support_loss",
    "tail_logit",
]


def refusal(
    k: int,
    logits: Tensor,  # (..., V)
) -> str | None:
    """Why it cannot take the logits, or None."""
    if not logits.is_cuda and not (logits.is_cpu and INTERPRETED):
        return (
            f"the logits are on {logits.device}; move them to a GPU, set TRITON_INTERPRET=1 before topk_rkl is "
            "imported to interpret the kernels on a CPU, or use 'reference'"
        )
    if k > MAX_K or logits.shape[-1] > MAX_VOCAB:
        return (
            f"K = {k} and V = {logits.shape[-1]}; it takes K up to {MAX_K} and V up to {MAX_VOCAB}, "
            "the 'reference' backend any"
        )
    return None


def objective_refusal(divergence: Code, _mass: str) -> str | None:
    """Why it has no kernel for the divergence and the mass, or None."""
    if tiny := [x for x in divergence[1:] if 0 < abs(x) < 1e-30]:
        return f"its kernels take the numbers of a divergence as float32, and {tiny[0]} is too small; use 'reference'"
    return None

"""The compiled extension on CPU tensors of any K. float64 goes to the reference: `choose` sees to it."""

from typing import Any

import torch
from torch import Tensor

import topk_rkl._native as _native
from topk_rkl.backends.compiled import Compiled
from topk_rkl.divergence import Code

SLABS = True  # see topk_rkl/rows.py


def refusal(_k: int, logits: Tensor) -> str | None:
    if not logits.is_cpu:
        return f"the logits are on {logits.device}; move them to the CPU, or use 'triton' or 'reference'"
    return None


def objective_refusal(_divergence: Code, _mass: str) -> str | None:
    return None


def _call(op: str, _like: Tensor, *arguments: Any) -> None:
    getattr(_native, op)(arguments, torch.get_num_threads())


_ops = Compiled("native", _call, device=torch.device("cpu"), max_slots=2**32)
select, support_loss, select_loss, scatter = _ops.select, _ops.support_loss, _ops.select_loss, _ops.scatter
tail_logit, mass_loss, mass_grad = _ops.tail_logit, _ops.mass_loss, _ops.mass_grad
linear_loss, linear_weight_grad = _ops.linear_loss, _ops.linear_weight_grad
linear_logits, linear_hidden_grad = _ops.linear_logits, _ops.linear_hidden_grad

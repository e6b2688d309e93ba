"""The torch.library ops, each in front of its backends: see `op.py` for what an op is."""

from topk_rkl.ops.linear import (
    linear_hidden_grad,
    linear_logits,
    linear_loss,
    linear_mass_grad,
    linear_mass_loss,
    linear_select,
    linear_tail_logit,
    linear_weight_grad,
    scale_rows,
)
from topk_rkl.ops.logits import kept, mass_grad, mass_loss, scatter, select, select_loss, support_loss, tail_logit

__all__ = [
    "kept",
    "linear_hidden_grad",
    "linear_logits",
    "linear_loss",
    "linear_mass_grad",
    "linear_mass_loss",
    "linear_select",
    "linear_tail_logit",
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

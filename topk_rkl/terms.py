"""A divergence that is a function of the user: its terms by a call, their derivative by autograd."""

from collections.abc import Callable

import torch
from torch import Tensor

from topk_rkl import checks


def of_function(
    function: Callable[[Tensor, Tensor], Tensor],  # of log p and log q
    log_p: Tensor,  # (..., K)
    log_q: Tensor,  # (..., K)
    reachable: Tensor,  # (..., K) bool; anything finite elsewhere
) -> tuple[Tensor, Tensor]:
    """The terms that a user's function gives, 0 where p = 0, and h = d terms / d log p by autograd."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = log_p.clone().requires_grad_()
        terms = function(leaf, log_q.clone())
        _require_terms(terms, function(leaf.detach(), log_q.clone()), leaf)
        terms = torch.where(reachable.clone(), terms, 0)
        (h,) = torch.autograd.grad(terms.sum(), leaf)
    return terms.detach(), torch.where(reachable, h, 0)  # elsewhere the function may have no derivative


def _require_terms(
    x: object,
    of_constants: Tensor,  # (..., K) what the function gives of log_p without grad
    log_p: Tensor,  # (..., K)
) -> None:
    checks.require_tensor("divergence's result", x, checks.FLOATS)
    assert isinstance(x, Tensor)
    if x.shape != log_p.shape:
        shapes = checks.shape_of(x), checks.shape_of(log_p)
        raise ValueError(f"divergence gave {shapes[0]}; it must give a term per slot, {shapes[1]}")
    checks.require_same_device("divergence's result", x, "log_p", log_p)
    if not x.requires_grad:
        raise ValueError(
            "divergence gave terms that do not depend on log_p, so that nothing is trained; compute them from log_p, "
            "not from log_p.detach() or under torch.no_grad()"
        )
    if of_constants.requires_grad:
        raise ValueError(
            "divergence depends on another tensor that requires grad, to which a loss gives none; detach that tensor, "
            "or write a loss that trains it in plain PyTorch"
        )

"""A backend called without its op: what allocates the outputs that a backend is given."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from topk_rkl import backends
from topk_rkl.divergence import REVERSE_CODE, Code
from topk_rkl.objective import Objective
from topk_rkl.rows import result_dtype


class Direct:
    """The functions of a backend module, each with its outputs as results. Other names are the module's."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def select(self, logits: Tensor, k: int, normalize: bool = False) -> tuple[Tensor, Tensor]:
        ids, log_probs = _new(logits, k, dtype=torch.int32), _new(logits, k)
        self.module.select(logits, normalize, ids, log_probs)
        return ids, log_probs

    def support_loss(
        self,
        student: Tensor,  # (N, V), or slabs of rows
        ids: Tensor,  # (N, K)
        log_probs: Tensor,  # (N, K)
        weights: Tensor | None,  # (N,)
        temperature: float,
        divergence: Code = REVERSE_CODE,
    ) -> tuple[Tensor, Tensor]:  # (N,), (N, K)
        loss, g = _new(student), _new(student, ids.shape[1])
        self.module.support_loss(student, ids, log_probs, weights, Objective(temperature, divergence), loss, g)
        return loss, g

    def select_loss(
        self,
        student: Tensor,  # (N, V_student)
        teacher: Tensor,  # (N, V)
        k: int,
        weights: Tensor | None,  # (N,)
        temperature: float,
        divergence: Code = REVERSE_CODE,
    ) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K), (N, K)
        loss, ids, g = _new(student), _new(student, k, dtype=torch.int32), _new(student, k)
        self.module.select_loss(student, teacher, weights, Objective(temperature, divergence), loss, ids, g)
        return loss, ids, g

    def tail_logit(self, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        out = _new(logits, dtype=torch.float64)
        self.module.tail_logit(logits, ids, temperature, out)
        return out

    def mass_loss(
        self,
        student: Tensor,  # (N, V)
        ids: Tensor,  # (N, K)
        log_probs: Tensor,  # (N, K)
        tail: Tensor,  # (N,)
        weights: Tensor | None,  # (N,)
        temperature: float,
        divergence: Code,
        mass: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K), (N, 2)
        loss, g, outside = _new(student), _new(student, ids.shape[1]), _new(student, 2, dtype=torch.float64)
        objective = Objective(temperature, divergence, mass)
        self.module.mass_loss(student, ids, log_probs, tail, weights, objective, loss, g, outside)
        return loss, g, outside

    def linear_loss(
        self,
        hidden: Tensor,  # (N, H)
        head: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        ids: Tensor,  # (N, K)
        log_probs: Tensor,  # (N, K)
        weights: Tensor | None,  # (N,)
        temperature: float,
        logit_scale: float,
        softcap: float | None,
        want_dhidden: bool,
        divergence: Code = REVERSE_CODE,
    ) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K), (N, H) or (0, H)
        loss, g, dhidden = _new(hidden), _new(hidden, ids.shape[1]), _new(hidden, hidden.shape[-1])
        objective = Objective(temperature, divergence, logit_scale=logit_scale, softcap=softcap)
        self.module.linear_loss(
            hidden, head, bias, ids, log_probs, weights, objective, loss, g, dhidden if want_dhidden else None
        )
        return loss, g, dhidden if want_dhidden else dhidden[:0]

    def linear_logits(
        self,
        hidden: Tensor,  # (N, H)
        head: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        ids: Tensor,  # (N, K)
    ) -> Tensor:  # (N, K)
        out = _new(hidden, ids.shape[1])
        self.module.linear_logits(hidden, head, bias, ids, out)
        return out

    def linear_hidden_grad(self, g: Tensor, ids: Tensor, head: Tensor) -> Tensor:  # (N, H)
        out = _new(g, head.shape[1])
        self.module.linear_hidden_grad(g, ids, head, out)
        return out


def _new(
    like: Tensor,  # (N, X), or slabs of rows (S, R, X) with S R = N
    *columns: int,
    dtype: torch.dtype | None = None,
) -> Tensor:  # (N, columns)
    return like.new_empty((like.shape[:-1].numel(), *columns), dtype=dtype or result_dtype(like))


reference = Direct(backends._load("reference"))

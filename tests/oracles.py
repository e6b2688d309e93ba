"""The selection and the loss as anyone would write them, and what ours is asked for."""

import torch
from torch import Tensor

from topk_rkl import Support, topk_reverse_kl

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def stable_sort(
    logits: Tensor,  # (N, V)
    k: int,
) -> tuple[Tensor, Tensor]:  # (N, K) int32, (N, K)
    """The definition: (value descending, id ascending), NaN first, -inf never taken."""
    logits = logits.masked_fill(logits.isnan(), torch.nan)
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, :k].to(torch.promote_types(logits.dtype, torch.float32)), ids[:, :k].int()
    return ids.masked_fill(values == -torch.inf, -1), values


def assert_selects(module, logits: Tensor, k: int) -> None:
    ids, values = module.select(logits, k)
    want_ids, want_values = stable_sort(logits, k)
    assert ids.dtype == torch.int32 and values.dtype == want_values.dtype
    wrong = (ids != want_ids).any(1).nonzero().flatten().tolist()
    assert not wrong, f"of the rows {wrong}"
    torch.testing.assert_close(values, want_values, rtol=0, atol=0, equal_nan=True)


def plain(
    student: Tensor,  # (..., V)
    teacher: Tensor,  # (..., V)
    k: int,
    temperature: float = 1.0,
) -> Tensor:  # (...)
    """The loss as anyone would write it, in float64."""
    ids = teacher.topk(k).indices
    log_p = (student.double().gather(-1, ids) / temperature).log_softmax(-1)
    log_q = (teacher.double().gather(-1, ids) / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def run(
    student: Tensor,  # (..., V)
    teacher: Tensor | Support,
    **options,
) -> tuple[Tensor, Tensor]:
    """The loss and the student's gradient of its sum."""
    student = student.detach().requires_grad_()
    loss = topk_reverse_kl(student, teacher, **{"reduction": "sum", **options})
    loss.sum().backward()
    return loss.detach(), student.grad

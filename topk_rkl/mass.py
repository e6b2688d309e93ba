"""What is compared where S is not renormalised: its tokens, ascending, and the rest of the vocabulary as one class."""

import torch
from torch import Tensor

from topk_rkl.objective import pack
from topk_rkl.parallel.agreement import Shards
from topk_rkl.parallel.logits import select, teacher_logit, teacher_tail
from topk_rkl.rows import finite_max, live_slots, repeats
from topk_rkl.support import Support, true_log_probs
from topk_rkl.temperature import Temperatures

LAST = torch.iinfo(torch.int32).max


@torch.no_grad()
def classes(
    teacher: Tensor | Support,  # (..., V_teacher) logits, or a Support of (..., K)
    k: int | None,
    student_vocab: int | Tensor,
    at: Temperatures,
    sampled_ids: Tensor | None,  # (...), which get a slot of their own behind the others, empty where S has them
    backend: str,
    shards: Shards | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # ids (..., K), log_probs (..., K), tail (...) float64
    """Of an id that is given twice the first slot counts; empty slots come last. The loss divides both by `at.loss`.

    The tail is the teacher's temperature times the logsumexp of its logits / that outside S. A Support has no such
    logits: there it is log(1 - sum of probabilities), and at least what its dtype can tell from 0.
    """
    if isinstance(teacher, Support):
        ids, log_probs = _distinct(teacher.ids, teacher.log_probs, student_vocab)
        log_probs = true_log_probs(log_probs, log_probs)
        bad = (teacher.ids >= 0) & ~(teacher.log_probs < torch.inf)  # dropped ones too
        return _divided(ids, log_probs, _log_tail(log_probs).masked_fill(bad.any(-1), torch.nan), at)
    assert k is not None
    teacher_vocab = teacher.shape[-1] if shards is None else shards.teacher()[-1]
    ids, log_probs = _distinct(*select(teacher, k, False, backend, shards), student_vocab)
    if sampled_ids is not None:
        y = sampled_ids[..., None]
        named = (ids == y).any(-1, keepdim=True) | (y < 0) | (y >= student_vocab) | (y >= teacher_vocab)
        y = y.masked_fill(named, -1).to(ids.dtype)
        value = teacher_logit(teacher, y, shards).masked_fill(named, -torch.inf)
        ids, log_probs = torch.cat((ids, y), -1), torch.cat((log_probs, value.to(log_probs.dtype)), -1)
    return _divided(ids, log_probs, teacher_tail(teacher, ids, pack(at.of_teacher or 1.0), backend, shards), at)


def _divided(
    ids: Tensor,  # (..., K)
    log_probs: Tensor,  # (..., K)
    tail: Tensor,  # (...) float64
    at: Temperatures,
) -> tuple[Tensor, Tensor, Tensor]:  # the same
    if at.teacher is None:
        return ids, log_probs, tail
    best = finite_max(torch.where(log_probs < torch.inf, log_probs, -torch.inf))  # (..., 1)
    tail = (tail - best.squeeze(-1).double()) / at.teacher.double()
    return ids, (log_probs - best) / at.teacher, tail


def _distinct(
    ids: Tensor,  # (..., K)
    log_probs: Tensor,  # (..., K)
    vocab: int | Tensor,
) -> tuple[Tensor, Tensor]:
    live = live_slots(ids, log_probs, vocab)
    ids, slots = torch.where(live, ids, LAST).int().sort(dim=-1, stable=True)
    empty = ids == LAST
    empty |= repeats(ids)
    ids.masked_fill_(empty, LAST)
    log_probs = log_probs.gather(-1, slots).masked_fill_(empty, -torch.inf)
    del live, slots, empty  # N K numbers each
    ids, slots = ids.sort(dim=-1, stable=True)  # the emptied ones to the end
    return ids.masked_fill_(ids == LAST, -1), log_probs.gather(-1, slots)


def _log_tail(
    log_probs: Tensor,  # (..., K)
) -> Tensor:  # (...) float64
    total = log_probs.to(torch.float64, copy=True).exp_().sum(-1)
    return (-total.clamp(max=1 - torch.finfo(log_probs.dtype).eps / 2)).log1p()

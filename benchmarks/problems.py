"""The tensors of a case, and what float64 says of them: no contestant is timed before it was found right."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Case
from tests.cases import ROWS
from topk_rkl import Support, linear_teacher_topk, teacher_topk

# A share of the largest value. A rival's bfloat16 logits, and the gradients, carry 8 bits.
TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}
CHUNK_NUMBERS = 1 << 26  # of float64 at a time


@dataclass
class Problem:
    """Random logits on both sides, no two of which tie for the last place in a support."""

    case: Case
    device: str

    def __post_init__(self) -> None:
        c, dtype = self.case, DTYPES[self.case.dtype]
        torch.manual_seed(0)
        if c.rows == "random":
            self.teacher = torch.randn(c.n, c.v, device=self.device).to(dtype)  # (N, V)
        else:
            self.teacher = ROWS[c.rows](c.v, c.k).to(self.device, dtype).expand(c.n, c.v).contiguous()
        if c.work == "select":
            return
        untie(self.teacher, c.k)
        self.support = teacher_topk(self.teacher, c.k, normalize=True)
        self.ids = self.support.ids.long()  # (N, K), as those who call torch.gather need them
        if c.work == "linear":
            del self.teacher
            self.hidden = torch.randn(c.n, c.h, device=self.device, dtype=dtype).requires_grad_()  # (N, H)
            head = torch.randn(c.v, c.h, device=self.device, dtype=dtype).mul_(c.h**-0.5)  # (V, H)
            self.head = head.requires_grad_(c.gradients != "hidden alone")
        else:
            self.student = torch.randn(c.n, c.v, device=self.device).to(dtype).requires_grad_()  # (N, V)

    @property
    def leaves(self) -> list[Tensor]:
        if self.case.work == "select":
            return []
        if self.case.work != "linear":
            return [self.student]
        return [self.hidden, self.head] if self.head.requires_grad else [self.hidden]

    @property
    def touched(self) -> int:
        """Rows of the head that some position names."""
        return len(self.ids.unique()) if self.case.work == "linear" else 0

    @cached_property
    def other_teacher(self) -> tuple[Tensor, Tensor]:  # (N, H), (V, H)
        """Hidden states and head of a teacher, for those that compare the whole vocabulary."""
        return torch.randn_like(self.hidden), torch.randn_like(self.head).mul_(self.case.h**-0.5)

    @cached_property
    def other_support(self) -> Support:
        """The tokens that this teacher ranks highest."""
        return linear_teacher_topk(*self.other_teacher, self.case.k)

    def slots(self, objective: str, rows: slice) -> tuple[Tensor, Tensor]:  # (n, K) int64, (n, K) float64
        ids, log_probs = (self.other_support if objective == OF_STATES else self.support).tensors
        return ids[rows].long(), log_probs[rows].double()


def untie(
    teacher: Tensor,  # (N, V), changed
    k: int,
) -> None:
    """Lowers what equals the last of the top k and is not in it: torch.topk takes any of equals."""
    ids, values = teacher_topk(teacher, k).tensors
    ids = ids.long()
    kept = teacher.gather(-1, ids)
    for rows, last in zip(teacher.split(256), values[:, -1:].to(teacher.dtype).split(256), strict=True):
        rows.masked_fill_(rows == last, rows.min().item())
    teacher.scatter_(-1, ids, kept)


def on_slots(
    z: Tensor,  # (N, K), the student's logits
    w: Tensor,  # (N, K), the teacher's
) -> Tensor:  # (N,)
    """Reverse KL, both renormalised on the slots."""
    log_p = z.log_softmax(-1)
    return (log_p.exp() * (log_p - w.log_softmax(-1))).sum(-1)


TOP_K, FORWARD, WHOLE = "top-K reverse KL", "top-K forward KL, not renormalised", "reverse KL of the whole vocabulary"
OF_STATES = "top-K reverse KL, selected from the teacher's hidden states"
RENORMALIZED = (TOP_K, OF_STATES)


def per_position(
    objective: str,
    z: Tensor,  # (n, V) float64: the student's logits
    ids: Tensor,  # (n, K)
    log_probs: Tensor,  # (n, K) float64
    w: Tensor | None,  # (n, V) float64: the teacher's logits
) -> Tensor:  # (n,)
    if objective in RENORMALIZED:
        return on_slots(z.gather(-1, ids), log_probs)
    log_p = z.log_softmax(-1)
    if objective == FORWARD:
        return (log_probs.exp() * (log_probs - log_p.gather(-1, ids))).sum(-1)
    return (log_p.exp() * (log_p - w.log_softmax(-1))).sum(-1)


@dataclass
class Difference:
    """The difference between a contestant's tensor and float64, over the parts of the tensor."""

    largest: float = 0.0
    value: float = 0.0

    def add(self, got: Tensor, want: Tensor) -> None:
        self.largest = max(self.largest, (got.double() - want).abs().max().nan_to_num(torch.inf).item())
        self.value = max(self.value, want.abs().max().item())


def error(
    p: Problem,
    objective: str,
    loss: Tensor,  # () the mean
    gradients: list[Tensor],  # of p.leaves
) -> float:
    """The largest difference from float64, as a share of the largest value of the same tensor."""
    total, differences = torch.zeros((), dtype=torch.float64, device=p.device), [Difference() for _ in gradients]
    dhead = torch.zeros_like(p.head, dtype=torch.float64) if len(gradients) == 2 else None
    for rows in chunks(p.case):
        truth = truth_from_hidden if p.case.work == "linear" else truth_from_logits
        part, want = truth(p, objective, rows, dhead)
        total += part
        differences[0].add(gradients[0][rows], want)
    if dhead is not None:
        differences[1].add(gradients[1].to_dense(), dhead)
    of_loss = Difference()
    of_loss.add(loss, total)
    return max(d.largest / d.value for d in (of_loss, *differences))


def chunks(case: Case) -> Iterator[slice]:
    """Rows of which float64 has some hundred MB."""
    size = max(1, CHUNK_NUMBERS // max(case.v, case.k * case.h))
    return (slice(start, min(start + size, case.n)) for start in range(0, case.n, size))


def truth_from_logits(p: Problem, objective: str, rows: slice, _: None) -> tuple[Tensor, Tensor]:  # (), (n, V)
    z = p.student[rows].detach().double().requires_grad_()
    w = p.teacher[rows].double() if objective == WHOLE else None
    loss = per_position(objective, z, *p.slots(objective, rows), w).sum() / p.case.n
    (dz,) = torch.autograd.grad(loss, z)
    return loss.detach(), dz


def truth_from_hidden(
    p: Problem,
    objective: str,
    rows: slice,
    dhead: Tensor | None,  # (V, H), added to
) -> tuple[Tensor, Tensor]:  # (), (n, H)
    hidden, (named, log_probs) = p.hidden[rows].detach().double(), p.slots(objective, rows)
    ids, w = named, None
    if objective in RENORMALIZED:  # only the slots' rows of the head, as if they were the vocabulary
        head = p.head.detach()[named].double()  # (n, K, H)
        z = torch.einsum("nkh,nh->nk", head, hidden).requires_grad_()
        ids = torch.arange(p.case.k, device=p.device).expand_as(named)
    else:
        head = p.head.detach().double()  # (V, H)
        z = (hidden @ head.T).requires_grad_()
        if objective == WHOLE:
            teacher, teacher_head = p.other_teacher
            w = teacher[rows].double() @ teacher_head.double().T
    loss = per_position(objective, z, ids, log_probs, w).sum() / p.case.n
    (dz,) = torch.autograd.grad(loss, z)
    if objective in RENORMALIZED:
        if dhead is not None:
            dhead.index_add_(0, named.flatten(), (dz[..., None] * hidden[:, None]).flatten(0, 1))
        return loss.detach(), torch.einsum("nk,nkh->nh", dz, head)
    if dhead is not None:
        dhead.addmm_(dz.T, hidden)
    return loss.detach(), dz @ head


def selects_the_largest(p: Problem, values: Tensor, ids: Tensor) -> bool:
    """Whether (N, K) values and ids are the largest of each row, in any order and with any of equals."""
    want = torch.cat([rows.float().topk(p.case.k).values for rows in p.teacher.split(1024)])
    distinct = (ids.long().sort().values.diff() > 0).all()
    there = p.teacher.gather(-1, ids.long()).float().sort(descending=True).values
    return bool(
        distinct and torch.equal(there, want) and torch.equal(values.float().sort(descending=True).values, want)
    )

"""What to watch while training, a number per position, detached. In plain PyTorch, some rows at a time.

torch.compile gets all rows at once, since a loop over parts would be compiled anew for another number of them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from topk_rkl import ops
from topk_rkl.backends import reference, requested
from topk_rkl.rows import row_views
from topk_rkl.support import Support, true_log_probs

CHUNK_BYTES = 64 << 20  # of logits as they are computed with


class _once:
    """functools.cached_property without a lock, which torch.compile cannot trace."""

    def __init__(self, function: Callable[[Any], Tensor]) -> None:
        self.function = function

    def __get__(self, block: Any, _: type) -> Tensor:
        value = self.function(block)
        setattr(block, self.function.__name__, value)
        return value


class Block:
    """Some rows: each diagnostic is the method of its name. p and q are probabilities among all tokens, at the
    temperature of the loss; S is the set that the loss compares, in which an id that is given twice counts once."""

    def __init__(
        self,
        student: Tensor,  # (n, V)
        teacher: Tensor | None,  # (n, V_teacher), None where only a Support is known
        ids: Tensor,  # (n, K)
        values: Tensor,  # (n, K)
        sampled_ids: Tensor | None,  # (n,)
        temperature: float,
    ) -> None:
        dtype = reference.result_dtype(student)
        self.student, self.temperature = student.to(dtype), temperature
        self.teacher = None if teacher is None else teacher.to(dtype)
        live = reference.live_slots(ids, values, student.shape[1])  # (n, K)
        ids, values = Support(ids.masked_fill(~live, -1), values.to(dtype)).unique()
        self.live = ids >= 0  # (n, K)
        self.ids, self.values = ids.clamp(min=0).long(), values.masked_fill(~self.live, -torch.inf)
        self.y = None if sampled_ids is None else sampled_ids.long()

    @_once
    def log_p(self) -> Tensor:  # (n, V)
        return _log_softmax(self.student, self.temperature)

    @_once
    def log_q(self) -> Tensor:  # (n, V_teacher)
        assert self.teacher is not None
        return _log_softmax(self.teacher, self.temperature)

    @_once
    def log_p_slots(self) -> Tensor:  # (n, K)
        return self.log_p.gather(1, self.ids)

    @_once
    def log_q_slots(self) -> Tensor:  # (n, K)
        if self.teacher is None:
            return true_log_probs(self.values, self.values)
        return self.log_q.gather(1, self.ids)

    def student_mass(self) -> Tensor:
        """The sum of p over S. Reads the student's rows."""
        return torch.where(self.live, self.log_p_slots.exp(), 0).sum(1)

    def teacher_mass(self) -> Tensor:
        """The sum of q over S. Reads the teacher's rows; a Support must hold true log-probs, at temperature 1."""
        return torch.where(self.live, self.log_q_slots.exp(), 0).sum(1)

    @_once
    def overlap(self) -> Tensor:  # (n, K) bool
        vocab, size = self.student.shape[1], self.live.sum(1, keepdim=True)  # (n, 1)
        best = self._best(min(self.ids.shape[1], vocab)).long()
        best = best.masked_fill((best < 0) | (torch.arange(best.shape[1], device=best.device) >= size), vocab)
        among = best.new_zeros((len(best), vocab + 1), dtype=torch.bool).scatter_(1, best, True)
        return self.live & among.gather(1, self.ids)

    def _best(self, k: int) -> Tensor:  # (n, k), of the student
        ids: Tensor
        ids, _ = ops.select(self.student, k, False, requested())
        return ids

    def overlap_count(self) -> Tensor:
        """How many tokens of S are among the student's own |S| best (arXiv 2604.13016). Reads the student's rows."""
        return self.overlap.sum(1)

    def overlap_token_advantage(self) -> Tensor:
        """The mean over those of -q (log q - log p), 0 for none. Reads both sides' rows; takes the same Supports."""
        terms = -self.log_q_slots.exp() * (self.log_q_slots - self.log_p_slots)
        return torch.where(self.overlap, terms, 0).sum(1) / self.overlap.sum(1).clamp(min=1)

    def top1_agreement(self) -> Tensor:
        """Whether the student's best token is the best of S by the teacher. Reads the student's rows."""
        slot = self.values.argmax(1, keepdim=True)
        return (self.ids.gather(1, slot) == self._best(1)).squeeze(1) & self.live.any(1)

    def student_entropy(self) -> Tensor:
        """Of p. Reads the student's rows."""
        return -torch.where(self.log_p == -torch.inf, 0, self.log_p.exp() * self.log_p).sum(1)

    def teacher_entropy(self) -> Tensor:
        """Of q. Reads the teacher's rows; needs teacher logits."""
        return -torch.where(self.log_q == -torch.inf, 0, self.log_q.exp() * self.log_q).sum(1)

    def sampled_log_prob(self) -> Tensor:
        """log p of the sampled token. Reads the student's rows."""
        return self._of_sampled(self.log_p)

    def teacher_sampled_log_prob(self) -> Tensor:
        """log q of the sampled token. Reads the teacher's rows; needs teacher logits."""
        return self._of_sampled(self.log_q)

    def _of_sampled(self, log_probs: Tensor) -> Tensor:
        """-inf for an id outside the vocabulary, such as what fills up a batch."""
        assert self.y is not None
        known = (self.y >= 0) & (self.y < log_probs.shape[1])
        found = log_probs.gather(1, torch.where(known, self.y, 0)[:, None]).squeeze(1)
        return torch.where(known, found, -torch.inf)

    def sampled_in_support(self) -> Tensor:
        """Whether S has the sampled token. Reads K slots."""
        assert self.y is not None
        return ((self.ids == self.y[:, None]) & self.live).any(1)

    def max_log_ratio(self) -> Tensor:
        """The largest |log p - log q| on S with both renormalised there, 0 where S is empty. Reads K slots."""
        both = (self.student.gather(1, self.ids), self.values)
        log_p, log_q = (_log_softmax(x.masked_fill(~self.live, -torch.inf), self.temperature) for x in both)
        return torch.where(self.live, (log_p - log_q).abs(), 0).amax(1)


def _log_softmax(
    x: Tensor,  # (n, X)
    temperature: float,
) -> Tensor:  # (n, X)
    """Of x / temperature; the difference from the largest comes first, since quotients of large logits lose it."""
    return ((x - x.amax(1, keepdim=True)) / temperature).log_softmax(1)


NAMES = tuple(name for name, value in vars(Block).items() if callable(value) and not name.startswith("_"))
OF_SAMPLED = ("sampled_log_prob", "teacher_sampled_log_prob", "sampled_in_support")
OF_TRUE_LOG_PROBS = ("teacher_mass", "overlap_token_advantage")
OF_TEACHER_LOGITS = ("teacher_entropy", "teacher_sampled_log_prob")


@torch.no_grad()
def measure(
    names: Sequence[str],
    student: Tensor,  # (..., V) logits, or (..., H) hidden states
    logits_of: Callable[[Tensor], Tensor] | None,  # of hidden states
    vocab: int,
    teacher: Tensor | None,  # (..., V_teacher)
    support: Support,  # (..., K)
    sampled_ids: Tensor | None,  # (...)
    temperature: float,
) -> dict[str, Tensor]:  # (...) each
    ids, values = (x.contiguous() for x in support)
    sampled_ids = None if sampled_ids is None else sampled_ids.contiguous()
    step = max(1, CHUNK_BYTES // (8 * vocab))
    parts: list[list[Tensor]] = []
    for z, w, row_ids, row_values, y in row_views(student, teacher, ids, values, sampled_ids):
        for some in _parts(len(z), step):
            block = Block(
                z[some] if logits_of is None else logits_of(z[some]), None if w is None else w[some],
                row_ids[some], row_values[some], None if y is None else y[some], temperature,
            )  # fmt: skip
            parts.append([getattr(block, name)() for name in names])
    lead = student.shape[:-1]
    return {name: torch.cat(column).view(lead) for name, column in zip(names, zip(*parts))}


def _parts(n: int, step: int) -> Iterable[slice]:
    """At least one, and one alone under torch.compile."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    return (slice(start, start + step) for start in range(0, max(1, n), step))

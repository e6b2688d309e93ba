"""What to watch while training, a number per position, detached. In plain PyTorch, some rows at a time.

from topk_rkl.diagnostics import topk_diagnostics

watch = topk_diagnostics(student_logits, teacher_logits, ["student_mass", "overlap_count"], k=32)

torch.compile gets all rows at once, since a loop over parts would be compiled anew for another number of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from topk_rkl import checks, ops
from topk_rkl.backends import requested
from topk_rkl.backends.products import all_logits
from topk_rkl.objective import Objective
from topk_rkl.parallel.heads import whole_head
from topk_rkl.rows import chunks, live_slots, result_dtype, row_views
from topk_rkl.support import Support, require_teacher, require_true_log_probs, true_log_probs
from topk_rkl.temperature import Temperature, of_teacher, per_position, require_temperatures


class _once:
    """functools.cached_property without a lock, which torch.compile cannot trace."""

    def __init__(self, function: Callable[[Any], Tensor]) -> None:
        self.function = function

    def __get__(self, block: Any, _: type) -> Tensor:
        value = self.function(block)
        setattr(block, self.function.__name__, value)
        return value


class Block:
    """Some rows: each diagnostic is the method of its name.

    p and q are probabilities among all tokens, at the temperature of the loss. S is the set that the loss compares.
    """

    def __init__(
        self,
        student: Tensor,  # (n, V)
        teacher: Tensor | None,  # (n, V_teacher), None where only a Support is known
        ids: Tensor,  # (n, K)
        log_probs: Tensor,  # (n, K)
        sampled_ids: Tensor | None,  # (n,)
        temperature: Temperature,  # (n,), or a number
        teacher_temperature: Temperature,  # the same
    ) -> None:
        dtype = result_dtype(student)
        self.student, self.temperature, self.teacher_temperature = student.to(dtype), temperature, teacher_temperature
        self.teacher = None if teacher is None else teacher.to(dtype)
        live = live_slots(ids, log_probs, student.shape[1])  # (n, K)
        support = Support(ids, log_probs.to(dtype)).without(~live).unique()
        self.live = support.ids >= 0  # (n, K)
        self.ids, self.log_probs = support.ids.clamp(min=0).long(), support.log_probs
        self.y = None if sampled_ids is None else sampled_ids.long()

    @_once
    def log_p(self) -> Tensor:  # (n, V)
        return _log_softmax(self.student, self.temperature)

    @_once
    def log_q(self) -> Tensor:  # (n, V_teacher)
        assert self.teacher is not None
        return _log_softmax(self.teacher, self.teacher_temperature)

    @_once
    def log_p_slots(self) -> Tensor:  # (n, K)
        return self.log_p.gather(1, self.ids)

    @_once
    def log_q_slots(self) -> Tensor:  # (n, K)
        if self.teacher is None:
            return true_log_probs(self.log_probs, self.log_probs)
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
        """How many tokens of S are among the student's |S| best tokens (arXiv 2604.13016). Reads the student's rows."""
        return self.overlap.sum(1)

    def overlap_token_advantage(self) -> Tensor:
        """The mean of -q (log q - log p) over the tokens of `overlap_count`, 0 for none. Reads both sides' rows; a
        Support must hold true log-probs, at temperature 1."""
        terms = -self.log_q_slots.exp() * (self.log_q_slots - self.log_p_slots)
        return torch.where(self.overlap, terms, 0).sum(1) / self.overlap.sum(1).clamp(min=1)

    def top1_agreement(self) -> Tensor:
        """Whether the student's best token is the teacher's best of S. Reads the student's rows."""
        slot = self.log_probs.argmax(1, keepdim=True)
        return (self.ids.gather(1, slot) == self._best(1)).squeeze(1) & self.live.any(1)

    def student_entropy(self) -> Tensor:
        """The entropy of p, in nats. Reads the student's rows."""
        return -torch.where(self.log_p == -torch.inf, 0, self.log_p.exp() * self.log_p).sum(1)

    def teacher_entropy(self) -> Tensor:
        """The entropy of q, in nats. Reads the teacher's rows; needs teacher logits."""
        return -torch.where(self.log_q == -torch.inf, 0, self.log_q.exp() * self.log_q).sum(1)

    def sampled_log_prob(self) -> Tensor:
        """log p of the sampled token. Reads the student's rows."""
        return self._of_sampled(self.log_p)

    def teacher_sampled_log_prob(self) -> Tensor:
        """log q of the sampled token. Reads the teacher's rows; needs teacher logits."""
        return self._of_sampled(self.log_q)

    def _of_sampled(self, log_probs: Tensor) -> Tensor:
        """log_probs at the sampled token, -inf for an id outside the vocabulary."""
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
        z = self.student.gather(1, self.ids).masked_fill(~self.live, -torch.inf)  # (n, K)
        log_p, log_q = _log_softmax(z, self.temperature), _log_softmax(self.log_probs, self.teacher_temperature)
        return torch.where(self.live, (log_p - log_q).abs(), 0).amax(1)


def _log_softmax(
    x: Tensor,  # (n, X)
    temperature: Temperature,  # (n,), or a number
) -> Tensor:  # (n, X)
    """Of x / temperature. The difference from the largest comes first, since quotients of large logits lose it."""
    by = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    return ((x - x.amax(1, keepdim=True)) / by).log_softmax(1)


NAMES = tuple(name for name, value in vars(Block).items() if callable(value) and not name.startswith("_"))
OF_SAMPLED = ("sampled_log_prob", "teacher_sampled_log_prob", "sampled_in_support")
OF_TRUE_LOG_PROBS = ("teacher_mass", "overlap_token_advantage")
OF_TEACHER_LOGITS = ("teacher_entropy", "teacher_sampled_log_prob")


def topk_diagnostics(
    student_logits: Tensor,  # (..., V)
    teacher: Tensor | Support,  # (..., V_teacher) logits, or a Support of (..., K)
    names: Sequence[str],
    *,
    k: int | None = None,
    temperature: float | Tensor = 1.0,  # a tensor broadcasts to (...)
    teacher_temperature: float | Tensor | None = None,
    sampled_ids: Tensor | None = None,  # (...)
) -> dict[str, Tensor]:  # (...) each
    """The named diagnostics of each position, detached. Names that are asked together share the passes over the rows.

    A selection made once serves the loss and these:

        teacher = teacher_topk(teacher_logits, 32)
        loss = topk_reverse_kl(student_logits, teacher)
        watch = topk_diagnostics(student_logits, teacher, ["student_mass", "student_entropy"])

    Args:
        student_logits: (..., V) bfloat16, float16, float32 or float64, of any strides; detached here.
        teacher: (..., V_teacher) logits, of which the first K are S; or a Support. "teacher_entropy" and
            "teacher_sampled_log_prob" need logits. "teacher_mass" and "overlap_token_advantage" also take a Support of
            true log-probs, such as of teacher_topk(..., normalize=True), if the teacher's temperature is 1.
        names: some of `NAMES`, which are the methods of `Block`.
        k: 1 <= k <= V_teacher, with teacher logits alone.
        temperature, teacher_temperature: those of the loss.
        sampled_ids: (...) int32 or int64, the tokens that the student sampled, for the names in `OF_SAMPLED`.

    Returns:
        {name: (...)}, float32 (float64 from float64 student logits), int64 for "overlap_count", and bool for
        "top1_agreement" and "sampled_in_support". An id that is given twice counts once; an id outside a vocabulary,
        such as what fills up a batch, has log-prob -inf.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    checks.require_logits("student_logits", student_logits)
    checks.require_plain(student_logits=student_logits, teacher=teacher)
    both = temperature, teacher_temperature
    names, k = _require_asked(names, teacher, k, both, sampled_ids, student_logits, "student_logits")
    return _measured(names, student_logits, None, student_logits.shape[-1], teacher, k, sampled_ids, both)


def linear_topk_diagnostics(
    student_hidden: Tensor,  # (..., H)
    student_weight: Tensor,  # (V, H)
    teacher: Tensor | Support,  # (..., V_teacher) logits, or a Support of (..., K)
    names: Sequence[str],
    *,
    student_bias: Tensor | None = None,  # (V,)
    k: int | None = None,
    temperature: float | Tensor = 1.0,  # a tensor broadcasts to (...)
    teacher_temperature: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sampled_ids: Tensor | None = None,  # (...)
) -> dict[str, Tensor]:  # (...) each
    """`topk_diagnostics` of the logits that `linear_topk_reverse_kl` compares, made some positions at a time.

    Args:
        student_hidden, student_weight, student_bias, logit_scale, softcap: see `linear_topk_reverse_kl`.
        teacher, names, k, temperature, teacher_temperature, sampled_ids: see `topk_diagnostics`.

    Returns, Raises: see `topk_diagnostics`.
    """
    head = student_weight, student_bias
    checks.require_head("student_hidden", student_hidden, "student_weight", head[0], "student_bias", head[1])
    checks.require_plain(student_hidden=student_hidden, student_weight=head[0], student_bias=head[1], teacher=teacher)
    both = temperature, teacher_temperature
    names, k = _require_asked(names, teacher, k, both, sampled_ids, student_hidden, "student_hidden")
    logit_scale, softcap = checks.require_logit_options(logit_scale, softcap)
    objective, head = Objective(logit_scale=logit_scale, softcap=softcap), whole_head(*head)[:2]

    def logits_of(hidden: Tensor) -> Tensor:  # (n, H) -> (n, V)
        return all_logits(hidden, *head, objective)

    vocab = len(student_weight)
    return _measured(names, student_hidden, logits_of, vocab, teacher, k, sampled_ids, both)


@torch.no_grad()
def _measured(
    names: Sequence[str],
    student: Tensor,  # (..., V) logits, or (..., H) hidden states
    logits_of: Callable[[Tensor], Tensor] | None,  # of hidden states
    vocab: int,
    teacher: Tensor | Support,  # (..., V_teacher), or (..., K)
    k: int | None,
    sampled_ids: Tensor | None,  # (...)
    both: tuple[Temperature, Temperature | None],
) -> dict[str, Tensor]:  # (...) each
    slots = teacher.tensors if isinstance(teacher, Support) else ops.select(teacher, k, False, requested())
    ids, log_probs = (x.contiguous() for x in slots)
    logits = None if isinstance(teacher, Support) else teacher
    y = None if sampled_ids is None else sampled_ids.contiguous()
    numbers = both[0], of_teacher(*both)
    varying = [per_position(x, student).contiguous() if isinstance(x, Tensor) else None for x in numbers]
    parts: list[list[Tensor]] = []
    for z, w, slot_ids, slot_log_probs, tokens, *by in row_views(student, logits, ids, log_probs, y, *varying):
        for rows in chunks(len(z), bytes_per_row=4 * vocab, whole=torch.compiler.is_compiling()):
            block = Block(
                z[rows] if logits_of is None else logits_of(z[rows]), None if w is None else w[rows],
                slot_ids[rows], slot_log_probs[rows], None if tokens is None else tokens[rows],
                *(float(x) if t is None else t[rows] for x, t in zip(numbers, by)),
            )  # fmt: skip
            parts.append([getattr(block, name)() for name in names])
    return {name: torch.cat(column).view(student.shape[:-1]) for name, column in zip(names, zip(*parts))}


def _require_asked(
    names: Sequence[str],
    teacher: Tensor | Support,  # (..., V_teacher), or (..., K)
    k: int | None,
    both: tuple[Temperature, Temperature | None],
    sampled_ids: Tensor | None,  # (...)
    student: Tensor,  # (..., V) or (..., H)
    student_name: str,
) -> tuple[tuple[str, ...], int | None]:
    """The names, and K of teacher logits as an int."""
    require_temperatures(*both, "renormalized", student, student_name)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names is {names!r}; it must be a sequence of names, such as ('student_mass',)")
    for name in names:
        if name not in NAMES:
            raise ValueError(f"names has {name!r}; use some of {', '.join(NAMES)}")
        if name in OF_TEACHER_LOGITS and isinstance(teacher, Support):
            raise ValueError(f"names has {name!r}, but teacher is a Support; pass teacher logits, and k")
        if name in OF_TRUE_LOG_PROBS and isinstance(teacher, Support):
            require_true_log_probs(f"{name!r}", teacher, of_teacher(*both))
    takers = [name for name in names if name in OF_SAMPLED]
    if takers and sampled_ids is None:
        raise ValueError(f"sampled_ids is None, but {takers[0]!r} needs the sampled tokens; pass them, (...)")
    if sampled_ids is not None:
        if not takers:
            raise ValueError(
                "sampled_ids is given, but names has none that uses it; leave it out, or ask for one of "
                f"{', '.join(OF_SAMPLED)}"
            )
        checks.require_sampled_ids(sampled_ids, student, "sampled_ids", student_name)
    return tuple(names), require_teacher(teacher, k, None, of_teacher(*both), student, student_name)

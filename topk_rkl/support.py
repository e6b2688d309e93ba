"""Which tokens are compared: the support S of each position, and what is refused as one."""

from typing import NamedTuple

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.rows import repeats

LARGEST_LOG_SUM = 1 / 16  # of true log-probs, 0 but for rounding: in bfloat16, 1/32 where they are from -8 to -16


class Support(NamedTuple):
    """The tokens on which student and teacher are compared, and what the teacher gives them.

    A slot is empty, and outside S, when its id is negative or not in the student's vocabulary, or its log-prob is -inf.
    Ids may come in any order. An id given twice is two classes, each with its own share of probability; see `unique`.
    """

    ids: Tensor
    """(..., K) int32 or int64, vocabulary ids; negative where the slot is empty."""
    log_probs: Tensor
    """(..., K) float: the teacher's log-probs or logits there, since a constant per row cancels; -inf where empty.

    Where true log-probs are needed, a position whose probabilities add up to more than 1 gives NaN: it holds logits.
    """

    def unique(self) -> "Support":
        """Keeps the first slot of each id of a row and empties the others."""
        require_support("support", self)
        ids, slots = self.ids.sort(dim=-1, stable=True)
        repeated = torch.zeros_like(ids, dtype=torch.bool).scatter(-1, slots, repeats(ids))
        return Support(self.ids.masked_fill(repeated, -1), self.log_probs.masked_fill(repeated, -torch.inf))


def true_log_probs(
    log_probs: Tensor,  # (..., K), -inf where empty
    distinct: Tensor,  # (..., K) the same without the later slots of an id
) -> Tensor:  # (..., K)
    """The log-probs, and NaN for a position where they are logits, since their probabilities add up to more than 1."""
    return log_probs.masked_fill(distinct.double().logsumexp(-1, keepdim=True) > LARGEST_LOG_SUM, torch.nan)


def require_support(name: str, x: Support) -> None:
    if not isinstance(x, Support):
        raise TypeError(f"{name} is {checks.kind_of(x)}; it must be a Support(ids, log_probs)")
    ids, log_probs = x
    checks.require_tensor(f"{name}.ids", ids, checks.INTEGERS)
    checks.require_tensor(f"{name}.log_probs", log_probs, checks.FLOATS)
    checks.require_constant(f"{name}.log_probs", log_probs)
    if ids.shape != log_probs.shape or ids.dim() == 0 or ids.shape[-1] == 0:
        raise ValueError(
            f"{name}.ids has shape {checks.shape_of(ids)} and {name}.log_probs {checks.shape_of(log_probs)}; "
            "both must be (..., K) with K of at least 1"
        )
    checks.require_same_device(f"{name}.log_probs", log_probs, f"{name}.ids", ids)


def require_teacher(
    teacher: object,  # (..., V_teacher) logits, or a Support of (..., K)
    k: int | None,
    mass: str | None,  # None where no loss is taken
    temperature: float | Tensor,  # of the teacher
    student: Tensor,  # (..., V) or (..., H)
    student_name: str,
    sharded: bool = False,
) -> int | None:
    """K of teacher logits, as an int, and None of a Support."""
    if isinstance(teacher, Support):
        if k is not None:
            raise ValueError(f"k is {k}, but teacher is a Support, whose last dimension is K; leave k out")
        require_support("teacher", teacher)
        checks.require_same_positions("teacher.ids", teacher.ids, student, student_name=student_name)
        if mass == "renormalized":
            checks.warn_of_single_slot(teacher.ids.shape[-1])
        elif mass is not None:
            require_temperature_1(f"mass={mass!r}", temperature)
            if mass.startswith("ema_pg"):
                raise ValueError(
                    f"teacher is a Support with mass={mass!r}, which needs the teacher's log-prob of every sampled "
                    "token; pass teacher logits"
                )
        return None
    if isinstance(teacher, (tuple, list)):
        raise TypeError("teacher is a plain tuple or list; wrap it: Support(ids, log_probs)")
    if not isinstance(teacher, Tensor):
        raise TypeError(f"teacher is {checks.kind_of(teacher)}; it must be a (..., V) tensor of logits or a Support")
    k = checks.require_teacher_logits("teacher", teacher, k, mass == "renormalized", sharded)
    checks.require_same_positions("teacher", teacher, student, student_name=student_name)
    return k


def require_temperature_1(asked: str, temperature: float | Tensor) -> None:
    """Refuses a Support at another temperature where `asked` needs the teacher's probabilities among all tokens."""
    if isinstance(temperature, Tensor) or temperature != 1:
        raise ValueError(
            f"temperature is {checks.seen(temperature)} with {asked} and a Support, whose log-probs do not tell the "
            "teacher's normaliser at that temperature; pass teacher logits, or take log-probs at that temperature, as "
            "of teacher_topk(teacher_logits / temperature, k, normalize=True), and teacher_temperature=1.0"
        )


torch.serialization.add_safe_globals([Support])  # torch.load(weights_only=True) then takes a saved one

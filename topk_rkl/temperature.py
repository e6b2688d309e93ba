"""Temperatures that differ from position to position, or between the two sides: divided out before the loss."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.rows import finite_max, live_slots, result_dtype
from topk_rkl.traced import traced

Temperature = float | Tensor


class Temperatures(NamedTuple):
    """What divides the logits of each side. A loss divides both sides by one number for all positions."""

    loss: float
    """The number of the loss."""
    student: Tensor | None
    """(..., 1): what the student's K logits are divided by before; None for nothing."""
    teacher: Tensor | None
    """(..., 1) or (): the same of the teacher's."""
    of_teacher: float | None
    """The teacher's own temperature, None where positions differ."""

    @property
    def apart(self) -> bool:
        """Whether the loss cannot divide both sides as they are."""
        return self.student is not None or self.teacher is not None

    def divided_teacher(
        self,
        ids: Tensor,  # (..., K)
        log_probs: Tensor,  # (..., K)
        vocab: int | Tensor,
    ) -> tuple[Tensor, Tensor]:  # (..., K), (..., K)
        if self.teacher is None:
            return ids, log_probs
        live = live_slots(ids, log_probs, vocab)
        return ids, divided(log_probs.to(result_dtype(log_probs)), live, self.teacher)


def of_teacher(
    temperature: Temperature,
    teacher_temperature: Temperature | None,
) -> Temperature:
    return temperature if teacher_temperature is None else teacher_temperature


def temperatures(
    temperature: Temperature,  # () or what broadcasts to (...)
    teacher_temperature: Temperature | None,  # the same; None for that of the student
    student: Tensor,  # (..., V) or (..., H)
) -> Temperatures:
    own = of_teacher(temperature, teacher_temperature)
    if isinstance(temperature, Tensor):
        loss, of_student = 1.0, per_position(temperature, student)[..., None]
    else:
        loss, of_student = float(temperature), None
    if isinstance(own, Tensor):
        return Temperatures(loss, of_student, per_position(own, student)[..., None] / loss, None)
    own, divisor = float(own), None
    if own != loss:
        divisor = traced(own, student.new_empty((), dtype=result_dtype(student))) / loss
    return Temperatures(loss, of_student, divisor, own)


def per_position(
    temperature: Tensor,  # what broadcasts to (...)
    student: Tensor,  # (..., V) or (..., H)
) -> Tensor:  # (...)
    """NaN where no temperature is: nothing is read on the host."""
    t = temperature.to(result_dtype(student)).expand(student.shape[:-1])
    return torch.where(t > 0, t, torch.nan)


def divided(
    x: Tensor,  # (..., K)
    live: Tensor,  # (..., K) bool
    by: Tensor,  # (..., 1) or ()
) -> Tensor:  # (..., K) up to a constant per row
    """(x - the largest live one) / by: quotients of large logits would lose their difference.

    NaN where `by` is NaN. Nothing is divided by NaN, so that a gradient of 0 stays 0 there.
    """
    best = finite_max(torch.where(live & (x < torch.inf), x.detach(), -torch.inf)).masked_fill(by.isnan(), torch.nan)
    return (x - best) / by.masked_fill(by.isnan(), 1)


def require_temperatures(
    temperature: Any,
    teacher_temperature: Any,
    mass: str,
    student: Tensor,  # (..., V) or (..., H)
    student_name: str = "student_logits",
) -> None:
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if not isinstance(value, Tensor):
            if name == "temperature" or value is not None:
                checks.require_temperature(value, name)
            continue
        checks.require_tensor(name, value, checks.FLOATS)
        checks.require_constant(name, value)
        checks.require_same_device(name, value, student_name, student)
        positions = tuple(student.shape[:-1])
        if not _broadcasts(tuple(value.shape), positions):
            raise ValueError(
                f"{name} has shape {checks.shape_of(value)} and {student_name} {checks.shape_of(student)}; it must be "
                f"a number, or broadcast to the positions {positions}, as (B, 1) does: one per sequence"
            )
        if mass != "renormalized":
            raise ValueError(
                f"{name} is a tensor with mass={mass!r}, which takes one number for all positions; divide the logits "
                f"of that side beforehand, logits / {name}[..., None], and leave it out"
            )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1]))

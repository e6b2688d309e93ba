"""The conventions of causal language models: position t predicts label t + 1, and a label of -100 does not count."""

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from topk_rkl import checks
from topk_rkl.support import Support, require_support


def as_weighted(
    student: Tensor,  # (B, T, V) or (B, T, H)
    student_name: str,
    teacher: Any,  # (B, T, V_teacher) logits, or a Support of (B, T, K) or (B, T - 1, K)
    labels: Tensor,  # (B, T)
    num_items_in_batch: float | Tensor | None,
    world_size: int,
    ignore_index: int,
    weights: Tensor | None,  # (B, T)
    options: dict[str, Any],  # of the loss
) -> dict[str, Any]:
    """All arguments of a loss but the student's, with the labels as weights and a denominator.

    The labels are, not the logits: a slice of logits would cost a gradient of their size in the backward pass. The last
    position gets weight 0.
    """
    checks.require_positions(student_name, student)
    if "denominator" in options:
        raise TypeError("denominator is given, but labels tell it; pass num_items_in_batch for a count over all ranks")
    checks.require_tensor("labels", labels, checks.INTEGERS)
    checks.require_same_positions("labels", labels, student, value_per_position=True, student_name=student_name)
    ignore_index = checks.require_integer("ignore_index", ignore_index)
    if abs(ignore_index) > checks.LARGEST:
        raise ValueError(f"ignore_index is {ignore_index}; it must be an int of at most 64 bits")
    counted = labels != ignore_index  # (B, T)
    if weights is not None:
        checks.require_weights(weights, student, student_name)
        counted = weights.masked_fill(~counted, 0)
    shifted = pad(counted[..., 1:], (0, 1))[..., : labels.shape[-1]]  # of no position none
    found = {"teacher": _with_last(teacher, student), "weights": shifted}
    denominator = _denominator(num_items_in_batch, world_size, student)
    if denominator is not None and options.get("reduction", "mean") != "mean":
        raise ValueError(
            f"num_items_in_batch is given with reduction={options['reduction']!r}; it divides with 'mean' alone"
        )
    return {**options, **found, "denominator": denominator}


def _denominator(
    num_items_in_batch: float | Tensor | None,
    world_size: int,
    student: Tensor,  # (B, T, V) or (B, T, H)
) -> float | Tensor | None:
    world_size = checks.require_positive_integer("world_size", world_size)
    if num_items_in_batch is None:
        if world_size > 1:
            raise ValueError(
                f"world_size is {world_size} without num_items_in_batch; pass the count over all ranks, such as "
                "global_count(labels[:, 1:] != -100), or leave world_size out"
            )
        return None
    checks.require_denominator(num_items_in_batch, student, "num_items_in_batch")
    exact = num_items_in_batch.double() if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    return exact / world_size


def _with_last(
    teacher: Any,  # (B, T, V_teacher) logits, or a Support of (B, T, K) or (B, T - 1, K)
    student: Tensor,  # (B, T, V) or (B, T, H)
) -> Any:
    """A Support without the last position gets an empty one there."""
    if not isinstance(teacher, Support):
        return teacher
    require_support("teacher", teacher)
    short = (*student.shape[:-2], student.shape[-2] - 1, teacher.k)
    if tuple(teacher.ids.shape) != short:
        return teacher
    return teacher.pad(student.shape[-2])

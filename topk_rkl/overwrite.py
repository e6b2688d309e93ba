"""Which logits a loss may overwrite with their gradient."""

import math
from collections.abc import Sequence

from torch import Tensor


def require_overwritable(
    student: Tensor,  # (..., V)
) -> None:
    """Refuses a leaf, whose `.grad` would be its own memory, and elements that share an address."""
    if (leaf := _leaf_of(student)) is not None and leaf.untyped_storage()._cdata == student.untyped_storage()._cdata:
        raise ValueError(
            "overwrite_student_logits=True, but student_logits is a leaf that requires grad, or a view of one, whose "
            ".grad would be its own memory; pass a non-leaf, such as the model's output, or leave the option off"
        )
    if student.numel() and _overlaps(student):
        raise ValueError(
            f"overwrite_student_logits=True, but student_logits of shape {tuple(student.shape)} and strides "
            f"{student.stride()} overlap themselves (an expanded view?); pass a copy, or leave the option off"
        )


def _overlaps(x: Tensor) -> bool:
    """Whether steps along one dimension lead where steps along those of smaller strides do."""
    dims = sorted(((s, n) for s, n in zip(x.stride(), x.shape) if n > 1), reverse=True)
    if any(stride == 0 for stride, _ in dims):
        return True
    for i, (stride, size) in enumerate(dims):
        smaller = dims[i + 1 :]
        common = math.gcd(*(s for s, _ in smaller))
        every = max(1, common // math.gcd(stride, common))  # other numbers of steps cannot lead there
        most = min(size - 1, _reach(smaller) // stride)
        if any(_leads(stride * steps, smaller) for steps in range(every, most + 1, every)):
            return True
    return False


def _leads(distance: int, dims: Sequence[tuple[int, int]]) -> bool:
    """Whether steps along dims, (stride, size) each, back or forth, add up to the distance."""
    if not dims:
        return distance == 0
    (stride, size), *smaller = dims
    reach = _reach(smaller)
    fewest, most = -((reach - distance) // stride), (distance + reach) // stride
    return any(
        _leads(distance - stride * steps, smaller) for steps in range(max(fewest, 1 - size), min(most, size - 1) + 1)
    )


def _reach(dims: Sequence[tuple[int, int]]) -> int:
    return sum(stride * (size - 1) for stride, size in dims)


def _leaf_of(x: Tensor) -> Tensor | None:
    """The leaf that requires grad of which x is made without any other input, as its views are."""
    if x.grad_fn is None:
        return x if x.requires_grad else None
    node = x.grad_fn
    while len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)

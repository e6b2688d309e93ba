"""The rows of tensors with any leading dimensions and strides, as few views as there can be; nothing is copied."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def row_views(first: Tensor, *others: Tensor | None, slabs: bool = False) -> Iterator[tuple[Any, ...]]:
    """The tensors (lead..., X) as views of the same rows, matrices (n, X); several where strides forbid a single view.

    With `slabs`, a view may also be slabs of rows (s, r, X) with s r = n, as logits[:, :-1] has. Several views are then
    for leading dimensions that no two strides lead through.
    """
    tensors, lead = (first, *others), first.dim() - 1
    views = [None if t is None else _row_view(t, lead, slabs) for t in tensors]
    if all((view is None) == (t is None) for view, t in zip(views, tensors)):
        yield tuple(views)
    else:
        for slab in range(len(first)):
            yield from row_views(first[slab], *(None if t is None else t[slab] for t in others), slabs=slabs)


def _row_view(tensor: Tensor, lead: int, slabs: bool) -> Tensor | None:
    """One view of the tensor as `row_views` describes them, or None."""
    if lead == 1:
        return tensor
    columns = tensor.shape[lead:]
    if tensor.is_contiguous():
        return tensor.view(-1, *columns)
    sizes = _joined(tensor.shape, tensor.stride(), lead)
    return tensor.view(*sizes, *columns) if len(sizes) <= 1 + slabs else None


def _joined(shape: tuple[int, ...], strides: tuple[int, ...], lead: int) -> list[int]:
    """The leading sizes, with neighbours multiplied where one stride leads through both."""
    if 0 in shape[:lead]:
        return [0]
    dims = [(size, stride) for size, stride in zip(shape[:lead], strides) if size > 1]
    joined = dims[:1] or [(1, 0)]
    for size, stride in dims[1:]:
        outer_size, outer_stride = joined[-1]
        if outer_stride == size * stride:
            joined[-1] = outer_size * size, stride
        else:
            joined.append((size, stride))
    return [size for size, _ in joined]

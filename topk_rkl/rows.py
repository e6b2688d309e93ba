"""Rows: how results are typed, which slots of a row are compared, and in what views and chunks rows are taken."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK_BYTES = 32 << 20  # of scratch at a time: below what an allocator caches, enough rows for every core


def result_dtype(x: Tensor) -> torch.dtype:
    """float64 stays float64; every other input gives float32 losses and gradients."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def live_slots(
    ids: Tensor,  # (..., K)
    log_probs: Tensor,  # (..., K)
    vocab: int | Tensor,
) -> Tensor:  # (..., K) bool: the slot is in S
    return (ids >= 0) & (ids < vocab) & (log_probs != -torch.inf)


def times(
    g: Tensor,  # (..., X) the gradient of a row
    grad_output: Tensor,  # (...)
) -> Tensor:  # (..., X)
    """The product, and +0 where a factor is 0 even if the other is not finite: what counts as nothing stays nothing."""
    scale = grad_output[..., None]
    return (g * scale).masked_fill_((g == 0).logical_or_(scale == 0), 0)


def chunks(
    n: int,
    bytes_per_row: int,
    budget: int | None = None,  # CHUNK_BYTES
    whole: bool = False,
) -> Iterator[slice]:
    """Slices that cover n rows, each of one row or of rows within the budget. They are one slice if `whole` or n = 0.

    Code that torch.compile traces asks for the whole: a loop would be compiled anew for every number of chunks.
    """
    if whole:
        return iter((slice(0, n),))
    step = max(1, (budget or CHUNK_BYTES) // max(1, bytes_per_row))
    return (slice(start, min(start + step, n)) for start in range(0, max(1, n), step))


def finite_max(
    x: Tensor,  # (..., X)
) -> Tensor:  # (..., 1)
    """The largest, and 0 where that is -inf."""
    best = x.amax(-1, keepdim=True)
    return best.masked_fill(best == -torch.inf, 0)


def repeats(
    ids: Tensor,  # (..., K) sorted
) -> Tensor:  # (..., K) bool: the slot before has the same id
    return pad(ids[..., 1:] == ids[..., :-1], (1, 0))


def add_repeats(
    ids: Tensor,  # (..., K) sorted
    values: Tensor,  # (..., K)
    add: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:  # (..., K)
    """Adds the values of each id, in a fixed order, into its first slot; what its other slots hold means nothing."""
    distance = 1
    while distance < ids.shape[-1]:
        first, later = values[..., :-distance], values[..., distance:]
        total = torch.where(ids[..., distance:] == ids[..., :-distance], add(first, later), first)
        values = torch.cat((total, values[..., -distance:]), -1)
        distance *= 2
    return values


def row_views(*tensors: Tensor | None, slabs: bool = False) -> Iterator[tuple[Any, ...]]:
    """The tensors (lead..., X) as views of the same rows, matrices (n, X); several where strides forbid a single view.

    The first one says how many leading dimensions there are. A tensor of no other dimension gives vectors (n,).

    With `slabs`, a view may also be slabs of rows (s, r, X) with s r = n, as logits[:, :-1] has. Several views are then
    for leading dimensions that no two strides lead through.
    """
    first = tensors[0]
    assert first is not None
    lead = first.dim() - 1
    views = [None if t is None else _row_view(t, lead, slabs) for t in tensors]
    if all((view is None) == (t is None) for view, t in zip(views, tensors)):
        yield tuple(views)
    else:
        for slab in range(len(first)):
            yield from row_views(*(None if t is None else t[slab] for t in tensors), slabs=slabs)


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

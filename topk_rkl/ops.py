"""The torch.library ops and their fakes: the one place where an op meets its backend.

Every op takes the name of the backend, so that a backward pass uses what its forward pass used, in whatever thread it
runs. Logits have any leading dimensions and strides; rows are never copied. Only `scatter` writes to an argument.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from topk_rkl.backends import choose
from topk_rkl.backends.reference import result_dtype


def _op(schema: str) -> Callable[[Callable], Callable]:
    """Registers a function under the schema, for every device, and gives back the op."""

    def register(implementation: Callable) -> Callable:
        name = f"topk_rkl::{implementation.__name__}"
        torch.library.define(name, schema)
        torch.library.impl(name, "default", implementation)
        op: Callable = getattr(torch.ops.topk_rkl, implementation.__name__).default
        return op

    return register


@_op("(Tensor logits, int k, bool normalize, str backend) -> (Tensor, Tensor)")
def select(
    logits: Tensor,  # (..., V)
    k: int,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # (..., K) int32, (..., K) float32
    module = choose(backend, k, logits)
    ids, values = _cat(module.select(rows, k, normalize) for (rows,) in _rows(logits))
    return ids.view(*logits.shape[:-1], k), values.view(*logits.shape[:-1], k)


@torch.library.register_fake("topk_rkl::select")
def _(logits: Tensor, k: int, normalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=result_dtype(logits))


@_op("(Tensor student, Tensor ids, Tensor values, Tensor? weights, float temperature, str backend) -> (Tensor, Tensor)")
def support_loss(
    student: Tensor,  # (..., V)
    ids: Tensor,  # (..., K)
    values: Tensor,  # (..., K)
    weights: Tensor | None,  # (...)
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:  # (...), (..., K)
    k = ids.shape[-1]
    module = choose(backend, k, student)
    loss, g = _cat(
        module.support_loss(*rows, temperature)
        for rows in _rows(student, ids.contiguous(), values.contiguous(), _contiguous(weights))
    )
    return loss.view(student.shape[:-1]), g.view(ids.shape)


@torch.library.register_fake("topk_rkl::support_loss")
def _(
    student: Tensor, ids: Tensor, values: Tensor, weights: Tensor | None, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(student)
    return student.new_empty(student.shape[:-1], dtype=dtype), student.new_empty(ids.shape, dtype=dtype)


@_op(
    "(Tensor student, Tensor teacher, int k, Tensor? weights, float temperature, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
def select_loss(
    student: Tensor,  # (..., V_student)
    teacher: Tensor,  # (..., V)
    k: int,
    weights: Tensor | None,  # (...)
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # (...), (..., K) int32, (..., K)
    module = choose(backend, k, student, teacher)
    lead = student.shape[:-1]
    loss, ids, g = _cat(
        module.select_loss(z, w, k, weight, temperature)
        for z, w, weight in _rows(student, teacher, _contiguous(weights))
    )
    return loss.view(lead), ids.view(*lead, k), g.view(*lead, k)


@torch.library.register_fake("topk_rkl::select_loss")
def _(
    student: Tensor, teacher: Tensor, k: int, weights: Tensor | None, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    lead, dtype = student.shape[:-1], result_dtype(student)
    return (
        student.new_empty(lead, dtype=dtype),
        student.new_empty((*lead, k), dtype=torch.int32),
        student.new_empty((*lead, k), dtype=dtype),
    )


@_op("(Tensor g, Tensor ids, Tensor grad_output, Tensor(a!) out, bool unique, str backend) -> ()")
def scatter(
    g: Tensor,  # (..., K)
    ids: Tensor,  # (..., K)
    grad_output: Tensor,  # (...)
    out: Tensor,  # (..., V), overwritten
    unique: bool,
    backend: str,
) -> None:
    module = choose(backend, ids.shape[-1], out)
    for rows in _rows(g.contiguous(), ids.contiguous(), grad_output.contiguous(), out):
        module.scatter(*rows, unique)


@torch.library.register_fake("topk_rkl::scatter")
def _(g: Tensor, ids: Tensor, grad_output: Tensor, out: Tensor, unique: bool, backend: str) -> None:
    return None


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _rows(first: Tensor, *others: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """The tensors (lead..., X) as views (n, X), all of the same rows; several where strides forbid a single view."""
    tensors, lead = (first, *others), first.dim() - 1
    try:
        views = tuple(None if t is None else t.view(-1, *t.shape[lead:]) for t in tensors)
    except RuntimeError:  # logits[:, :-1] has no 2-D view, its slabs have
        for slab in range(len(first)):
            yield from _rows(first[slab], *(None if t is None else t[slab] for t in others))
    else:
        yield views


def _cat(parts: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    columns = list(zip(*parts, strict=True))
    return tuple(column[0] if len(column) == 1 else torch.cat(column) for column in columns)

"""The torch.library ops and their fakes: the one place where an op meets its backend.

Every op takes the name of the backend, so that a backward pass uses what its forward pass used, in whatever thread it
runs. Temperature, divergence and logit options cross as one tensor of numbers, see `settings`. A divergence that is a
function crosses no op: `carrier` gives the implementation behind the op. Logits have any leading dimensions and
strides; rows are never copied. Only `scatter`, `mass_grad` and the two gradients of the head write to an argument.
A loss is resized, not viewed: autograd lets nobody change a view that a Function returns.
"""

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from topk_rkl.backends import choose, choose_head, choose_plain
from topk_rkl.backends.products import LOGITS, all_logits, logits_at
from topk_rkl.backends.reference import result_dtype
from topk_rkl.divergence import Terms, capped
from topk_rkl.rows import row_views
from topk_rkl.settings import unpack

CHUNK_BYTES = 128 << 20  # of logits at a time: enough rows for a matrix product at full speed

_implementations: dict[Callable, Callable] = {}


def _op(schema: str) -> Callable[[Callable], Callable]:
    """Registers a function under the schema, for every device, and gives back the op."""

    def register(implementation: Callable) -> Callable:
        name = f"topk_rkl::{implementation.__name__}"
        torch.library.define(name, schema)
        torch.library.impl(name, "default", implementation)
        op: Callable = getattr(torch.ops.topk_rkl, implementation.__name__).default
        _implementations[op] = implementation
        return op

    return register


def carrier(op: Callable, terms: Terms | None) -> Callable:
    """The op; where the divergence is a function, what is behind the op, with that function."""
    return op if terms is None else functools.partial(_implementations[op], terms=terms)


@_op("(Tensor logits, int k, bool normalize, str backend) -> (Tensor, Tensor)")
def select(
    logits: Tensor,  # (..., V)
    k: int,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # (..., K) int32, (..., K) float32
    module = choose(backend, k, logits)
    ids, values = _cat(module.select(rows, k, normalize) for (rows,) in _views(module, logits))
    return ids.view(*logits.shape[:-1], k), values.view(*logits.shape[:-1], k)


@torch.library.register_fake("topk_rkl::select")
def _(logits: Tensor, k: int, normalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=result_dtype(logits))


@_op("(Tensor student, Tensor ids, Tensor values, Tensor? weights, Tensor? settings, str backend) -> (Tensor, Tensor)")
def support_loss(
    student: Tensor,  # (..., V)
    ids: Tensor,  # (..., K)
    values: Tensor,  # (..., K)
    weights: Tensor | None,  # (...)
    settings: Tensor | None,
    backend: str,
    terms: Terms | None = None,
) -> tuple[Tensor, Tensor]:  # (...), (..., K)
    at = unpack(settings, terms)
    module = choose(backend, ids.shape[-1], student, divergence=at.divergence)
    loss, g = _cat(
        module.support_loss(*rows, at.temperature, at.divergence)
        for rows in _views(module, student, ids.contiguous(), values.contiguous(), _contiguous(weights))
    )
    return loss.resize_(student.shape[:-1]), g.view(ids.shape)


@torch.library.register_fake("topk_rkl::support_loss")
def _(
    student: Tensor,
    ids: Tensor,
    values: Tensor,
    weights: Tensor | None,
    settings: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(student)
    return student.new_empty(student.shape[:-1], dtype=dtype), student.new_empty(ids.shape, dtype=dtype)


@_op(
    "(Tensor student, Tensor teacher, int k, Tensor? weights, Tensor? settings, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
def select_loss(
    student: Tensor,  # (..., V_student)
    teacher: Tensor,  # (..., V)
    k: int,
    weights: Tensor | None,  # (...)
    settings: Tensor | None,
    backend: str,
    terms: Terms | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # (...), (..., K) int32, (..., K)
    at = unpack(settings, terms)
    module = choose(backend, k, student, teacher, divergence=at.divergence)
    lead = student.shape[:-1]
    loss, ids, g = _cat(
        module.select_loss(z, w, k, weight, at.temperature, at.divergence)
        for z, w, weight in _views(module, student, teacher, _contiguous(weights))
    )
    return loss.resize_(lead), ids.view(*lead, k), g.view(*lead, k)


@torch.library.register_fake("topk_rkl::select_loss")
def _(
    student: Tensor,
    teacher: Tensor,
    k: int,
    weights: Tensor | None,
    settings: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lead, dtype = student.shape[:-1], result_dtype(student)
    return (
        student.new_empty(lead, dtype=dtype),
        student.new_empty((*lead, k), dtype=torch.int32),
        student.new_empty((*lead, k), dtype=dtype),
    )


@_op("(Tensor logits, Tensor ids, Tensor? settings, str backend) -> Tensor")
def tail_logit(
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (..., K)
    settings: Tensor | None,
    backend: str,
) -> Tensor:  # (...) float64
    module, temperature = choose(backend, ids.shape[-1], logits, mass="tail"), unpack(settings).temperature
    vocab = logits.shape[-1]
    ids = torch.where((ids < 0) | (ids >= vocab), vocab, ids).int().sort(-1).values  # as the kernels need them
    (out,) = _cat((module.tail_logit(*rows, temperature),) for rows in _views(module, logits, ids.contiguous()))
    return out.view(logits.shape[:-1])


@torch.library.register_fake("topk_rkl::tail_logit")
def _(logits: Tensor, ids: Tensor, settings: Tensor | None, backend: str) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.float64)


@_op(
    "(Tensor student, Tensor ids, Tensor values, Tensor tail, Tensor? weights, Tensor? settings, str mass,"
    " str backend) -> (Tensor, Tensor, Tensor)"
)
def mass_loss(
    student: Tensor,  # (..., V)
    ids: Tensor,  # (..., K) ascending, none twice in a row, the negative ones last; with "ema_pg" in any order
    values: Tensor,  # (..., K)
    tail: Tensor,  # (...)
    weights: Tensor | None,  # (...)
    settings: Tensor | None,
    mass: str,
    backend: str,
    terms: Terms | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # (...), (..., K), (..., 2) float64
    at = unpack(settings, terms)
    module = choose(backend, ids.shape[-1], student, divergence=at.divergence, mass=mass)
    ids = ids.clamp(-1, student.shape[-1]).int()  # beyond the vocabulary as before, and within the kernels' integers
    if not mass.startswith("ema_pg"):  # which the reference alone serves
        before, after = ids[..., :-1], ids[..., 1:]
        ordered = torch.where(before < 0, after < 0, (after < 0) | (before < after))  # (..., K - 1)
        tail = tail.masked_fill(~ordered.all(-1), torch.nan)
    loss, g, others = _cat(
        module.mass_loss(*rows, at.temperature, at.divergence, mass)
        for rows in _views(
            module, student, ids.contiguous(), values.contiguous(), tail.contiguous(), _contiguous(weights)
        )
    )
    return loss.resize_(student.shape[:-1]), g.view(ids.shape), others.view(*student.shape[:-1], 2)


@torch.library.register_fake("topk_rkl::mass_loss")
def _(
    student: Tensor,
    ids: Tensor,
    values: Tensor,
    tail: Tensor,
    weights: Tensor | None,
    settings: Tensor | None,
    mass: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lead, dtype = student.shape[:-1], result_dtype(student)
    return (
        student.new_empty(lead, dtype=dtype),
        student.new_empty(ids.shape, dtype=dtype),
        student.new_empty((*lead, 2), dtype=torch.float64),
    )


@_op(
    "(Tensor g, Tensor ids, Tensor others, Tensor grad_output, Tensor? student, Tensor(a!) out, Tensor? settings,"
    " str backend) -> ()"
)
def mass_grad(
    g: Tensor,  # (..., K)
    ids: Tensor,  # (..., K)
    others: Tensor,  # (..., 2)
    grad_output: Tensor,  # (...)
    student: Tensor | None,  # (..., V), or None: out holds it
    out: Tensor,  # (..., V), overwritten
    settings: Tensor | None,
    backend: str,
) -> None:
    module, temperature = choose(backend, ids.shape[-1], out, mass="tail"), unpack(settings).temperature
    for rows in _views(
        module, g.contiguous(), ids.contiguous(), others.contiguous(), grad_output.contiguous(), student, out
    ):
        module.mass_grad(*rows, temperature)


@torch.library.register_fake("topk_rkl::mass_grad")
def _(
    g: Tensor,
    ids: Tensor,
    others: Tensor,
    grad_output: Tensor,
    student: Tensor | None,
    out: Tensor,
    settings: Tensor | None,
    backend: str,
) -> None:
    return None


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
    for rows in _views(module, g.contiguous(), ids.contiguous(), grad_output.contiguous(), out):
        module.scatter(*rows, unique)


@torch.library.register_fake("topk_rkl::scatter")
def _(g: Tensor, ids: Tensor, grad_output: Tensor, out: Tensor, unique: bool, backend: str) -> None:
    return None


@_op(
    "(Tensor hidden, Tensor head, Tensor? bias, int k, int? chunk_rows, Tensor? settings, bool normalize, bool full,"
    " str backend) -> (Tensor, Tensor)"
)
def linear_select(
    hidden: Tensor,  # (..., H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    k: int,
    chunk_rows: int | None,
    settings: Tensor | None,
    normalize: bool,
    full: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # (..., K) int32, (..., K) float32
    """Logits some rows at a time in one buffer, and `select` on those.

    By the platform's own matrix product; or, if `full` or where the dtypes differ, by one in float32 (float64).
    """
    lead, vocab, dtype, at = hidden.shape[:-1], head.shape[0], result_dtype(hidden), unpack(settings)
    full |= any(x is not None and x.dtype != hidden.dtype for x in (head, bias))
    buffer_dtype = dtype if full else hidden.dtype
    chunk_rows = chunk_rows or max(1, CHUNK_BYTES // (vocab * buffer_dtype.itemsize))
    buffer = hidden.new_empty((min(chunk_rows, lead.numel()), vocab), dtype=buffer_dtype)
    module = choose(backend, k, buffer)
    ids = hidden.new_empty((lead.numel(), k), dtype=torch.int32)
    values = hidden.new_empty((lead.numel(), k), dtype=dtype)
    done = 0
    for (rows,) in row_views(hidden):
        for part in rows.split(chunk_rows):
            logits = buffer[: len(part)]
            if full:
                all_logits(part, head, bias, at.logit_scale, at.softcap, logits)
            else:
                if bias is None:
                    torch.mm(part, head.T, out=logits)
                else:
                    torch.addmm(bias, part, head.T, out=logits)
                if at.logit_scale != 1 or at.softcap is not None:
                    for few in logits.split(max(1, LOGITS // (vocab * dtype.itemsize))):
                        few.copy_(capped(few.to(dtype), at.logit_scale, at.softcap)[0])
            chunk = slice(done, done + len(part))
            ids[chunk], values[chunk] = module.select(logits, k, normalize)
            done += len(part)
    return ids.view(*lead, k), values.view(*lead, k)


@torch.library.register_fake("topk_rkl::linear_select")
def _(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    k: int,
    chunk_rows: int | None,
    settings: Tensor | None,
    normalize: bool,
    full: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (*hidden.shape[:-1], k)
    return hidden.new_empty(shape, dtype=torch.int32), hidden.new_empty(shape, dtype=result_dtype(hidden))


@_op("(Tensor hidden, Tensor head, Tensor? bias, Tensor ids, Tensor? settings) -> Tensor")
def linear_values(
    hidden: Tensor,  # (..., H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (..., K)
    settings: Tensor | None,
) -> Tensor:  # (..., K)
    """The logits at ids, -inf outside the vocabulary, in plain PyTorch on any device."""
    rows, columns = (x.reshape(-1, x.shape[-1]) for x in (hidden, ids))
    at = unpack(settings)
    return logits_at(rows, head, bias, columns, at.logit_scale, at.softcap).view(ids.shape)


@torch.library.register_fake("topk_rkl::linear_values")
def _(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    settings: Tensor | None,
) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=result_dtype(hidden))


@_op(
    "(Tensor hidden, Tensor head, Tensor? bias, Tensor ids, Tensor values, Tensor? weights, Tensor? settings,"
    " bool want_dhidden, str backend) -> (Tensor, Tensor, Tensor)"
)
def linear_loss(
    hidden: Tensor,  # (..., H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (..., K)
    values: Tensor,  # (..., K)
    weights: Tensor | None,  # (...)
    settings: Tensor | None,
    want_dhidden: bool,
    backend: str,
    terms: Terms | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # (...), (..., K), (..., H) or (0, H)
    lead, at = hidden.shape[:-1], unpack(settings, terms)
    module = choose_head(backend, ids.shape[-1], hidden, len(head), at.divergence)
    loss, g, dhidden = _cat(
        module.linear_loss(
            rows,
            head,
            bias,
            row_ids,
            row_values,
            weight,
            at.temperature,
            at.logit_scale,
            at.softcap,
            want_dhidden,
            at.divergence,
        )
        for rows, row_ids, row_values, weight in _views(
            module, hidden, ids.contiguous(), values.contiguous(), _contiguous(weights)
        )
    )
    return loss.resize_(lead), g.view(ids.shape), dhidden.view(hidden.shape) if want_dhidden else dhidden


@torch.library.register_fake("topk_rkl::linear_loss")
def _(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    values: Tensor,
    weights: Tensor | None,
    settings: Tensor | None,
    want_dhidden: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = result_dtype(hidden)
    return (
        hidden.new_empty(hidden.shape[:-1], dtype=dtype),
        hidden.new_empty(ids.shape, dtype=dtype),
        hidden.new_empty(hidden.shape if want_dhidden else (0, hidden.shape[-1]), dtype=dtype),
    )


@_op("(Tensor g, Tensor ids, Tensor hidden, Tensor(a!)? dhead, Tensor(b!)? dbias, str backend) -> ()")
def linear_weight_grad(
    g: Tensor,  # (..., K)
    ids: Tensor,  # (..., K)
    hidden: Tensor,  # (..., H)
    dhead: Tensor | None,  # (V, H), overwritten
    dbias: Tensor | None,  # (V,), overwritten
    backend: str,
) -> None:
    vocab = next(len(out) for out in (dhead, dbias) if out is not None)
    if vocab == 0:  # no row of the head was touched
        return
    module = choose_head(backend, ids.shape[-1], hidden, vocab)
    flat_g, flat_ids, rows = (x.reshape(-1, x.shape[-1]).contiguous() for x in (g, ids, hidden))
    module.linear_weight_grad(flat_g, flat_ids, rows, dhead, dbias)


@torch.library.register_fake("topk_rkl::linear_weight_grad")
def _(g: Tensor, ids: Tensor, hidden: Tensor, dhead: Tensor | None, dbias: Tensor | None, backend: str) -> None:
    return None


@_op(
    "(Tensor hidden, Tensor head, Tensor? bias, Tensor ids, Tensor values, Tensor tail, Tensor? weights,"
    " Tensor? settings, str mass, str backend) -> (Tensor, Tensor, Tensor)"
)
def linear_mass_loss(
    hidden: Tensor,  # (..., H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (..., K)
    values: Tensor,  # (..., K)
    tail: Tensor,  # (...)
    weights: Tensor | None,  # (...)
    settings: Tensor | None,
    mass: str,
    backend: str,
    terms: Terms | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # (...), (..., K), (..., 2) float64
    lead, module, at = hidden.shape[:-1], choose_plain(backend, mass), unpack(settings, terms)
    flat = (ids.reshape(-1, ids.shape[-1]), values.reshape(-1, ids.shape[-1]), tail.reshape(-1))
    loss, g, others = module.linear_mass_loss(
        hidden.reshape(-1, hidden.shape[-1]), head, bias, *flat, None if weights is None else weights.reshape(-1),
        at.temperature, at.logit_scale, at.softcap, at.divergence, mass,
    )  # fmt: skip
    return loss.resize_(lead), g.view(ids.shape), others.view(*lead, 2)


@torch.library.register_fake("topk_rkl::linear_mass_loss")
def _(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    values: Tensor,
    tail: Tensor,
    weights: Tensor | None,
    settings: Tensor | None,
    mass: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lead, dtype = hidden.shape[:-1], result_dtype(hidden)
    return (
        hidden.new_empty(lead, dtype=dtype),
        hidden.new_empty(ids.shape, dtype=dtype),
        hidden.new_empty((*lead, 2), dtype=torch.float64),
    )


@_op(
    "(Tensor g, Tensor ids, Tensor others, Tensor grad_output, Tensor hidden, Tensor head, Tensor? bias,"
    " Tensor? settings, Tensor(a!)? dhidden, Tensor(b!)? dhead, Tensor(c!)? dbias, str mass, str backend) -> ()"
)
def linear_mass_grad(
    g: Tensor,  # (..., K)
    ids: Tensor,  # (..., K)
    others: Tensor,  # (..., 2)
    grad_output: Tensor,  # (...)
    hidden: Tensor,  # (..., H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    settings: Tensor | None,
    dhidden: Tensor | None,  # (..., H), overwritten
    dhead: Tensor | None,  # (V, H), overwritten
    dbias: Tensor | None,  # (V,), overwritten
    mass: str,
    backend: str,
) -> None:
    flat = (x.reshape(-1, x.shape[-1]) for x in (g, ids, others, grad_output[..., None], hidden))
    g, ids, others, grad_output, hidden = flat
    at = unpack(settings)
    choose_plain(backend, mass).linear_mass_grad(
        g, ids, others, grad_output[:, 0], hidden, head, bias, at.temperature, at.logit_scale, at.softcap,
        None if dhidden is None else dhidden.view(hidden.shape), dhead, dbias,
    )  # fmt: skip


@torch.library.register_fake("topk_rkl::linear_mass_grad")
def _(
    g: Tensor,
    ids: Tensor,
    others: Tensor,
    grad_output: Tensor,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    settings: Tensor | None,
    dhidden: Tensor | None,
    dhead: Tensor | None,
    dbias: Tensor | None,
    mass: str,
    backend: str,
) -> None:
    return None


@_op("(Tensor x) -> Tensor")
def kept(x: Tensor) -> Tensor:
    """A copy that torch.compile saves as it is, and not what it was made of."""
    return x.clone(memory_format=torch.contiguous_format)


@torch.library.register_fake("topk_rkl::kept")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _views(module: ModuleType, first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Row views as the backend takes them."""
    return row_views(first, *others, slabs=getattr(module, "SLABS", False))


def _cat(parts: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    columns = list(zip(*parts))
    return tuple(column[0] if len(column) == 1 else torch.cat(column) for column in columns)

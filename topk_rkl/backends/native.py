"""The compiled extension, on CPU tensors: allocates, checks what a pointer cannot say, and calls csrc/.

float64 goes to the reference: `choose` sees to it.

Logits, hidden states and `out` are matrices (N, V), or slabs of rows (S, R, V) with S R = N where no one stride leads
from row to row.
"""

import torch
from torch import Tensor

from topk_rkl import _native
from topk_rkl.backends.pointers import FLOATS, INTEGERS, Pointers, in_range, rows_of, same_rows, same_shape
from topk_rkl.divergence import MASSES, REVERSE_KL, Code

SLABS = True  # see topk_rkl/rows.py
MAX_SLOTS = 2**32

_cpu = Pointers(torch.device("cpu"))
_matrix, _vector = _cpu.matrix, _cpu.vector


def select(
    logits: Tensor,  # (N, V)
    k: int,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:  # (N, K) int32, (N, K) float32
    n = rows_of(logits)
    in_range("k", k, logits.shape[-1], "V")
    ids, values = _empty(n, k, dtype=torch.int32), _empty(n, k)
    _native.select(
        _matrix("logits", logits), n, k, normalize, torch.get_num_threads(), ids.data_ptr(), values.data_ptr()
    )
    return ids, values


def support_loss(
    student: Tensor,  # (N, V)
    ids: Tensor,  # (N, K)
    values: Tensor,  # (N, K)
    weights: Tensor | None,  # (N,)
    temperature: float,
    divergence: Code = REVERSE_KL,
) -> tuple[Tensor, Tensor]:  # (N,), (N, K) float32: times the weight of the row
    n, k = ids.shape
    same_shape("values", values, (n, k))
    same_rows("student", student, n)
    loss, g = _empty(n), _empty(n, k)
    _native.support_loss(
        _matrix("student", student), n, k, _matrix("ids", ids, INTEGERS), _matrix("values", values, FLOATS),
        _vector("weights", weights, n), temperature, divergence, torch.get_num_threads(), loss.data_ptr(), g.data_ptr(),
    )  # fmt: skip
    return loss, g


def select_loss(
    student: Tensor,  # (N, V_student)
    teacher: Tensor,  # (N, V)
    k: int,
    weights: Tensor | None,  # (N,)
    temperature: float,
    divergence: Code = REVERSE_KL,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K) int32, (N, K)
    n = rows_of(teacher)
    in_range("k", k, teacher.shape[-1], "V")
    same_rows("student", student, n)
    loss, ids, g = _empty(n), _empty(n, k, dtype=torch.int32), _empty(n, k)
    _native.select_loss(
        _matrix("student", student), _matrix("teacher", teacher), n, k, _vector("weights", weights, n),
        temperature, divergence, torch.get_num_threads(), loss.data_ptr(), ids.data_ptr(), g.data_ptr(),
    )  # fmt: skip
    return loss, ids, g


def tail_logit(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N, K) ascending, none twice in a row, the negative ones last
    temperature: float,
) -> Tensor:  # (N,) float64
    n, k = ids.shape
    same_rows("logits", logits, n)
    out = _empty(n, dtype=torch.float64)
    _native.tail_logit(
        _matrix("logits", logits), n, k, _matrix("ids", ids, INTEGERS), temperature, torch.get_num_threads(),
        out.data_ptr(),
    )  # fmt: skip
    return out


def mass_loss(
    student: Tensor,  # (N, V)
    ids: Tensor,  # (N, K) as for `tail_logit`
    values: Tensor,  # (N, K)
    tail: Tensor,  # (N,)
    weights: Tensor | None,  # (N,)
    temperature: float,
    divergence: Code,
    mass: str,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K), (N, 2) float64
    n, k = ids.shape
    same_shape("values", values, (n, k))
    same_rows("student", student, n)
    loss, g, others = _empty(n), _empty(n, k), _empty(n, 2, dtype=torch.float64)
    _native.mass_loss(
        _matrix("student", student), n, k, _matrix("ids", ids, INTEGERS), _matrix("values", values, FLOATS),
        _vector("tail", tail, n), _vector("weights", weights, n), temperature, divergence, MASSES.index(mass),
        torch.get_num_threads(), loss.data_ptr(), g.data_ptr(), others.data_ptr(),
    )  # fmt: skip
    return loss, g, others


def mass_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K), none twice in a row
    others: Tensor,  # (N, 2) float64
    grad_output: Tensor,  # (N,)
    student: Tensor | None,  # (N, V), or None: out holds it
    out: Tensor,  # (N, V), overwritten
    temperature: float,
) -> None:
    (n, k), student = ids.shape, out if student is None else student
    same_shape("g", g, (n, k))
    same_shape("others", others, (n, 2))
    same_rows("out", out, n)
    same_rows("student", student, n, out.shape[-1])
    g = g.float().contiguous()
    _native.mass_grad(
        _matrix("g", g), _matrix("ids", ids, INTEGERS), _matrix("others", others, FLOATS),
        _vector("grad_output", grad_output, n), _matrix("student", student), _matrix("out", out), n, k, temperature,
        torch.get_num_threads(),
    )  # fmt: skip


def scatter(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    grad_output: Tensor,  # (N,)
    out: Tensor,  # (N, V), overwritten
    unique: bool,
) -> None:
    """out[i] = grad_output[i] * the sum over the slots j of row i of g[i, j] at column ids[i, j], and 0 elsewhere."""
    n, k = ids.shape
    same_shape("g", g, (n, k))
    same_rows("out", out, n)
    g = g.float().contiguous()
    _native.scatter(
        _matrix("g", g), _matrix("ids", ids, INTEGERS), _vector("grad_output", grad_output, n),
        _matrix("out", out), n, k, unique, torch.get_num_threads(),
    )  # fmt: skip


def linear_loss(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K)
    values: Tensor,  # (N, K)
    weights: Tensor | None,  # (N,)
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    want_dhidden: bool,
    divergence: Code = REVERSE_KL,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K), (N, H) or (0, H), all float32
    (n, k), (vocab, width) = ids.shape, head.shape
    same_rows("hidden", hidden, n, width)
    same_shape("values", values, (n, k))
    loss, g, dhidden = _empty(n), _empty(n, k), _empty(n if want_dhidden else 0, width)
    _native.linear_loss(
        _matrix("hidden", hidden), _matrix("head", head), vocab, _vector("bias", bias, vocab), n, k,
        _matrix("ids", ids, INTEGERS), _matrix("values", values, FLOATS), _vector("weights", weights, n),
        temperature, logit_scale, softcap or 0.0, divergence, torch.get_num_threads(),
        loss.data_ptr(), g.data_ptr(), dhidden.data_ptr() if want_dhidden else 0,
    )  # fmt: skip
    return loss, g, dhidden


def linear_weight_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    hidden: Tensor,  # (N, H)
    dhead: Tensor | None,  # (V, H), overwritten
    dbias: Tensor | None,  # (V,), overwritten
) -> None:
    (n, k), width = ids.shape, hidden.shape[1]
    vocab = next(len(out) for out in (dhead, dbias) if out is not None)
    same_shape("g", g, (n, k))
    same_shape("hidden", hidden, (n, width))
    if n * k >= MAX_SLOTS:
        raise ValueError(f"ids has {n} rows of {k} slots; the native backend sorts fewer than 2^32, pass fewer rows")
    if dhead is not None:
        same_shape("dhead", dhead, (vocab, width))
    g, hidden = g.float().contiguous(), hidden.contiguous()
    _native.linear_weight_grad(
        _matrix("g", g), _matrix("ids", ids, INTEGERS), _matrix("hidden", hidden), n, k, vocab,
        _matrix("dhead", dhead), _vector("dbias", dbias, vocab), torch.get_num_threads(),
    )  # fmt: skip


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)

"""The CUDA kernels of the compiled extension: allocates, checks what a pointer cannot say, and calls csrc/cuda/.

float64 and K above 1,024 go elsewhere: `choose` sees to it. Where the extension was built for the host, as the tests
without a GPU do, its kernels run on CPU tensors.

Logits, hidden states and `out` are matrices (N, V), or slabs of rows (S, R, V) with S R = N where no one stride leads
from row to row.
"""

import torch
from torch import Tensor

from topk_rkl import _cuda
from topk_rkl.backends.pointers import FLOATS, INTEGERS, KINDS, Pointers, in_range, rows_of, same_rows, same_shape
from topk_rkl.divergence import REVERSE_KL, Code

HOST = _cuda.HOST
MAX_K = _cuda.MAX_K
SLABS = True  # see topk_rkl/rows.py
MAX_SLOTS = 2**31


def select(
    logits: Tensor,  # (N, V)
    k: int,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:  # (N, K) int32, (N, K) float32
    n = rows_of(logits)
    ids, values = logits.new_empty((n, k), dtype=torch.int32), _empty(logits, n, k)
    scratch = _select_scratch(logits, k, normalize)
    _cuda.select(
        Pointers(logits.device).matrix("logits", logits), n, k, normalize,
        scratch.data_ptr(), ids.data_ptr(), values.data_ptr(), _where(logits),
    )  # fmt: skip
    return ids, values


def support_loss(
    student: Tensor,  # (N, V)
    ids: Tensor,  # (N, K)
    values: Tensor,  # (N, K)
    weights: Tensor | None,  # (N,)
    temperature: float,
    divergence: Code = REVERSE_KL,
) -> tuple[Tensor, Tensor]:  # (N,), (N, K) float32: times the weight of the row
    _reverse_kl_alone(divergence)
    (n, k), to = ids.shape, Pointers(student.device)
    in_range("k", k, MAX_K, "the most")
    same_shape("values", values, (n, k))
    same_rows("student", student, n)
    loss, g = _empty(student, n), _empty(student, n, k)
    _cuda.support_loss(
        to.matrix("student", student), n, k, to.matrix("ids", ids, INTEGERS), to.matrix("values", values, FLOATS),
        to.vector("weights", weights, n), temperature, loss.data_ptr(), g.data_ptr(), _where(student),
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
    _reverse_kl_alone(divergence)
    n, to = rows_of(teacher), Pointers(teacher.device)
    same_rows("student", student, n)
    loss, ids, g = _empty(teacher, n), teacher.new_empty((n, k), dtype=torch.int32), _empty(teacher, n, k)
    scratch = _select_scratch(teacher, k, False)
    _cuda.select_loss(
        to.matrix("student", student), to.matrix("teacher", teacher), n, k, to.vector("weights", weights, n),
        temperature, scratch.data_ptr(), loss.data_ptr(), ids.data_ptr(), g.data_ptr(), _where(teacher),
    )  # fmt: skip
    return loss, ids, g


def scatter(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    grad_output: Tensor,  # (N,)
    out: Tensor,  # (N, V), overwritten
    unique: bool,
) -> None:
    """out[i] = grad_output[i] * the sum over the slots j of row i of g[i, j] at column ids[i, j], and 0 elsewhere."""
    (n, k), to = ids.shape, Pointers(out.device)
    same_shape("g", g, (n, k))
    same_rows("out", out, n)
    g = g.float()
    _cuda.scatter(
        to.matrix("g", g), to.matrix("ids", ids, INTEGERS), to.vector("grad_output", grad_output, n),
        to.matrix("out", out), n, k, unique, _where(out),
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
    _reverse_kl_alone(divergence)
    (n, k), (vocab, width), to = ids.shape, head.shape, Pointers(hidden.device)
    in_range("k", k, MAX_K, "the most")
    same_rows("hidden", hidden, n, width)
    same_shape("values", values, (n, k))
    loss, g, dhidden = _empty(hidden, n), _empty(hidden, n, k), _empty(hidden, n if want_dhidden else 0, width)
    _cuda.linear_loss(
        to.matrix("hidden", hidden), to.matrix("head", head), vocab, to.vector("bias", bias, vocab), n, k,
        to.matrix("ids", ids, INTEGERS), to.matrix("values", values, FLOATS), to.vector("weights", weights, n),
        temperature, logit_scale, softcap or 0.0,
        loss.data_ptr(), g.data_ptr(), dhidden.data_ptr() if want_dhidden else 0, _where(hidden),
    )  # fmt: skip
    return loss, g, dhidden


def linear_weight_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    hidden: Tensor,  # (N, H)
    dhead: Tensor | None,  # (V, H), overwritten
    dbias: Tensor | None,  # (V,), overwritten
) -> None:
    (n, k), width, to = ids.shape, hidden.shape[1], Pointers(hidden.device)
    vocab = next(len(out) for out in (dhead, dbias) if out is not None)
    same_shape("g", g, (n, k))
    same_shape("hidden", hidden, (n, width))
    if n * k >= MAX_SLOTS:
        raise ValueError(f"ids has {n} rows of {k} slots; the cuda backend sorts fewer than 2^31, pass fewer rows")
    if dhead is not None:
        same_shape("dhead", dhead, (vocab, width))
    g = g.float().contiguous()
    to.matrix("g", g)
    scratch = _scratch(hidden, _cuda.linear_weight_grad_scratch(n, k, vocab, width, _where(hidden)[0]))
    _cuda.linear_weight_grad(
        g.data_ptr(), to.matrix("ids", ids, INTEGERS), to.matrix("hidden", hidden), n, k, vocab,
        to.matrix("dhead", dhead), to.vector("dbias", dbias, vocab), scratch.data_ptr(), _where(hidden),
    )  # fmt: skip


def _reverse_kl_alone(divergence: Code) -> None:
    if tuple(divergence) != REVERSE_KL:
        raise ValueError(f"divergence is {divergence}; the cuda backend has reverse KL alone, {REVERSE_KL}")


def _select_scratch(
    logits: Tensor,  # (N, V)
    k: int,
    normalize: bool,
) -> Tensor:
    n, vocab = rows_of(logits), logits.shape[-1]
    in_range("k", k, min(vocab, MAX_K), "the smaller of V and the most")
    bytes_ = _cuda.select_scratch(n, vocab, KINDS[logits.dtype], k, normalize, _where(logits)[0])
    return _scratch(logits, bytes_)


def _scratch(like: Tensor, size: int) -> Tensor:
    return like.new_empty(-(-size // 8), dtype=torch.int64)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _where(x: Tensor) -> tuple[int, int]:
    """The device and the stream to launch on."""
    return (0, 0) if HOST else (x.get_device(), torch.cuda.current_stream(x.device).cuda_stream)

"""The compiled extension, on CPU tensors: allocates, checks what a pointer cannot say, and calls csrc/.

float64 goes to the reference: `choose` sees to it.
"""

import torch
from torch import Tensor

from topk_rkl import _native
from topk_rkl.divergence import MASSES, REVERSE_KL, Code

KINDS = {
    dtype: kind
    for kind, dtype in enumerate(
        (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64)
    )
}  # as in csrc/cpu/types.hpp
LOGITS = (torch.bfloat16, torch.float16, torch.float32)
FLOATS = (*LOGITS, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MAX_OFFSET = 2**63 - 1
MAX_VOCAB = 2**31 - 1
MAX_SLOTS = 2**32

Matrix = tuple[int, int, int, int, int]
Vector = tuple[int, int, int]


def select(
    logits: Tensor,  # (N, V)
    k: int,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:  # (N, K) int32, (N, K) float32
    n, vocab = logits.shape
    _in_range("k", k, vocab)
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
    _same_shape("values", values, (n, k))
    _same_shape("student", student, (n, student.shape[1]))
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
    n, vocab = teacher.shape
    _in_range("k", k, vocab)
    _same_shape("student", student, (n, student.shape[1]))
    loss, ids, g = _empty(n), _empty(n, k, dtype=torch.int32), _empty(n, k)
    _native.select_loss(
        _matrix("student", student), _matrix("teacher", teacher), n, k, _vector("weights", weights, n),
        temperature, divergence, torch.get_num_threads(), loss.data_ptr(), ids.data_ptr(), g.data_ptr(),
    )  # fmt: skip
    return loss, ids, g


def rest(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N, K) ascending, none twice in a row, the negative ones last
    temperature: float,
) -> Tensor:  # (N,) float64
    n, k = ids.shape
    _same_shape("logits", logits, (n, logits.shape[1]))
    out = _empty(n, dtype=torch.float64)
    _native.rest(
        _matrix("logits", logits), n, k, _matrix("ids", ids, INTEGERS), temperature, torch.get_num_threads(),
        out.data_ptr(),
    )  # fmt: skip
    return out


def mass_loss(
    student: Tensor,  # (N, V)
    ids: Tensor,  # (N, K) as for `rest`
    values: Tensor,  # (N, K)
    tail: Tensor,  # (N,)
    weights: Tensor | None,  # (N,)
    temperature: float,
    divergence: Code,
    mass: str,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K), (N, 2) float64
    n, k = ids.shape
    _same_shape("values", values, (n, k))
    _same_shape("student", student, (n, student.shape[1]))
    loss, g, others = _empty(n), _empty(n, k), _empty(n, 2, dtype=torch.float64)
    _native.mass_loss(
        _matrix("student", student), n, k, _matrix("ids", ids, INTEGERS), _matrix("values", values, FLOATS),
        _vector("tail", tail, n), _vector("weights", weights, n), temperature, divergence, MASSES.index(mass),
        torch.get_num_threads(), loss.data_ptr(), g.data_ptr(), others.data_ptr(),
    )  # fmt: skip
    return loss, g, others


def spread(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K), none twice in a row
    others: Tensor,  # (N, 2) float64
    grad_output: Tensor,  # (N,)
    student: Tensor | None,  # (N, V), or None: out holds it
    out: Tensor,  # (N, V), overwritten
    temperature: float,
) -> None:
    (n, k), student = ids.shape, out if student is None else student
    _same_shape("g", g, (n, k))
    _same_shape("others", others, (n, 2))
    _same_shape("out", out, (n, out.shape[1]))
    _same_shape("student", student, tuple(out.shape))
    g = g.float().contiguous()
    _native.spread(
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
    _same_shape("g", g, (n, k))
    _same_shape("out", out, (n, out.shape[1]))
    g = g.float().contiguous()
    _native.scatter(
        _matrix("g", g), _matrix("ids", ids, INTEGERS), _vector("grad_output", grad_output, n),
        _matrix("out", out), n, k, unique, torch.get_num_threads(),
    )  # fmt: skip


def sparse_head(
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
    _same_shape("hidden", hidden, (n, width))
    _same_shape("values", values, (n, k))
    loss, g, dhidden = _empty(n), _empty(n, k), _empty(n if want_dhidden else 0, width)
    _native.sparse_head(
        _matrix("hidden", hidden), _matrix("head", head), vocab, _vector("bias", bias, vocab), n, k,
        _matrix("ids", ids, INTEGERS), _matrix("values", values, FLOATS), _vector("weights", weights, n),
        temperature, logit_scale, softcap or 0.0, divergence, torch.get_num_threads(),
        loss.data_ptr(), g.data_ptr(), dhidden.data_ptr() if want_dhidden else 0,
    )  # fmt: skip
    return loss, g, dhidden


def sparse_head_weight_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    hidden: Tensor,  # (N, H)
    dhead: Tensor | None,  # (V, H), overwritten
    dbias: Tensor | None,  # (V,), overwritten
) -> None:
    (n, k), width = ids.shape, hidden.shape[1]
    vocab = next(len(out) for out in (dhead, dbias) if out is not None)
    _same_shape("g", g, (n, k))
    _same_shape("hidden", hidden, (n, width))
    if n * k >= MAX_SLOTS:
        raise ValueError(f"ids has {n} rows of {k} slots; the native backend sorts fewer than 2^32, pass fewer rows")
    if dhead is not None:
        _same_shape("dhead", dhead, (vocab, width))
    g, hidden = g.float().contiguous(), hidden.contiguous()
    _native.sparse_head_weight_grad(
        _matrix("g", g), _matrix("ids", ids, INTEGERS), _matrix("hidden", hidden), n, k, vocab,
        (0, 0, 0, 0, 0) if dhead is None else _matrix("dhead", dhead), _vector("dbias", dbias, vocab),
        torch.get_num_threads(),
    )  # fmt: skip


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _matrix(
    name: str,
    x: Tensor,  # (N, columns)
    dtypes: tuple[torch.dtype, ...] = LOGITS,
) -> Matrix:
    _on_cpu(name, x, dtypes)
    check_extent(name, tuple(x.shape), x.stride(), x.element_size())
    return x.data_ptr(), KINDS[x.dtype], x.shape[1], x.stride(0), x.stride(1)


def _vector(
    name: str,
    x: Tensor | None,  # (N,)
    n: int,
) -> Vector:
    if x is None:
        return 0, 0, 0
    _on_cpu(name, x, FLOATS)
    _same_shape(name, x, (n,))
    check_extent(name, (1, n), (0, x.stride(0)), x.element_size())
    return x.data_ptr(), KINDS[x.dtype], x.stride(0)


def check_extent(name: str, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> None:
    """Refuses what would put a byte of the tensor out of the reach of a 64-bit offset, or before its start."""
    if any(stride < 0 for stride in strides):
        raise ValueError(f"{name} has strides {strides}; a negative one cannot be read, pass {name}.contiguous()")
    if shape[-1] > MAX_VOCAB:
        raise ValueError(f"{name} has {shape[-1]} columns; ids are int32, so that at most {MAX_VOCAB} are possible")
    reach = sum(max(0, size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    if max(reach, *strides) * itemsize > MAX_OFFSET:
        raise ValueError(f"{name} of shape {shape} and strides {strides} reaches past 2^63 bytes; pass a smaller part")


def _on_cpu(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not x.is_cpu:
        raise ValueError(f"{name} is on {x.device}; the native backend takes CPU tensors")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} is {x.dtype}; use one of {', '.join(map(str, dtypes))}")


def _same_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}")


def _in_range(name: str, k: int, vocab: int) -> None:
    if not 1 <= k <= vocab:
        raise ValueError(f"{name} is {k}; it must be between 1 and V = {vocab}")

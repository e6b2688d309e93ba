"""Tensors as the compiled extensions take them: a pointer, a kind, sizes and strides, all of them checked."""

from dataclasses import dataclass

import torch
from torch import Tensor

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

Matrix = tuple[int, int, int, int, int, int, int]
Vector = tuple[int, int, int]


@dataclass(frozen=True)
class Pointers:
    """Takes the tensors of one device."""

    device: torch.device

    def matrix(
        self,
        name: str,
        x: Tensor | None,  # (N, columns), or (S, R, columns) with S R = N
        dtypes: tuple[torch.dtype, ...] = LOGITS,
    ) -> Matrix:
        if x is None:
            return 0, 0, 0, 0, 0, 0, 0
        self._check(name, x, dtypes)
        shape, strides = tuple(x.shape), x.stride()
        if len(shape) not in (2, 3):
            raise ValueError(f"{name} has shape {shape}; it must be rows (N, X), or slabs of rows (S, R, X)")
        check_extent(name, shape, strides, x.element_size())
        slab_stride = strides[0] if len(shape) == 3 else 0
        return x.data_ptr(), KINDS[x.dtype], shape[-1], strides[-2], strides[-1], max(1, shape[-2]), slab_stride

    def vector(
        self,
        name: str,
        x: Tensor | None,  # (N,)
        n: int,
    ) -> Vector:
        if x is None:
            return 0, 0, 0
        self._check(name, x, FLOATS)
        same_shape(name, x, (n,))
        check_extent(name, (1, n), (0, x.stride(0)), x.element_size())
        return x.data_ptr(), KINDS[x.dtype], x.stride(0)

    def _check(self, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        if x.device != self.device:
            raise ValueError(f"{name} is on {x.device}; it must be on {self.device}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name} is {x.dtype}; use one of {', '.join(map(str, dtypes))}")


def check_extent(name: str, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> None:
    """Refuses what would put a byte of the tensor out of the reach of a 64-bit offset, or before its start."""
    if min(strides) < 0:
        raise ValueError(f"{name} has strides {strides}; a negative one cannot be read, pass {name}.contiguous()")
    if shape[-1] > MAX_VOCAB:
        raise ValueError(f"{name} has {shape[-1]} columns; ids are int32, so that at most {MAX_VOCAB} are possible")
    reach = 1
    for size, stride in zip(shape, strides, strict=True):
        reach += max(0, size - 1) * stride
    if max(reach, *strides) * itemsize > MAX_OFFSET:
        raise ValueError(f"{name} of shape {shape} and strides {strides} reaches past 2^63 bytes; pass a smaller part")


def rows_of(
    x: Tensor,  # (N, columns), or (S, R, columns) with S R = N
) -> int:
    return x.shape[:-1].numel()


def same_rows(
    name: str,
    x: Tensor,  # (n, columns), or (S, R, columns) with S R = n
    n: int,
    columns: int | None = None,
) -> None:
    """Refuses another number of rows, and another number of columns where one is given."""
    columns = x.shape[-1] if columns is None else columns
    if rows_of(x) != n or x.shape[-1] != columns:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {(n, columns)}, or slabs of so many rows")


def same_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}")


def in_range(name: str, k: int, most: int, of: str) -> None:
    if not 1 <= k <= most:
        raise ValueError(f"{name} is {k}; it must be between 1 and {of} = {most}")

"""Tensors as the compiled extensions take them: a pointer, a kind, sizes and strides, all of them checked."""

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = {
    dtype: kind
    for kind, dtype in enumerate(
        (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64)
    )
}  # as in csrc/types.hpp
LOGITS = (torch.bfloat16, torch.float16, torch.float32)
FLOATS = (*LOGITS, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MAX_OFFSET = 2**63 - 1
MAX_VOCAB = 2**31 - 1

# As the structs of those names in csrc/types.hpp.
Matrix = tuple[int, int, int, int, int, int, int, int]
Vector = tuple[int, int, int, int]
Rows = tuple[int, int]


@dataclass(frozen=True)
class Pointers:
    """Takes the tensors of one device."""

    device: torch.device

    def matrix(
        self,
        name: str,
        x: Tensor | None,  # (N, columns), or (S, R, columns) with S R = N
        dtypes: tuple[torch.dtype, ...] = LOGITS,
        shape: tuple[int, int] | None = None,
    ) -> Matrix:
        if x is None:
            return 0, 0, 0, 0, 0, 0, 0, 0
        self._check(name, x, dtypes, shape)
        sizes, strides = x.shape, x.stride()
        if len(sizes) not in (2, 3):
            raise ValueError(f"{name} has shape {tuple(sizes)}; it must be rows (N, X), or slabs of rows (S, R, X)")
        check_extent(name, tuple(sizes), strides, x.element_size())
        slabs, slab_stride = (sizes[0], strides[0]) if len(sizes) == 3 else (1, 0)
        *_, rows, columns = sizes
        *_, row_stride, column_stride = strides
        return (
            x.data_ptr(), KINDS[x.dtype], slabs * rows, columns, row_stride, column_stride, max(1, rows), slab_stride
        )  # fmt: skip

    def vector(
        self,
        name: str,
        x: Tensor | None,  # (N,)
        n: int,
    ) -> Vector:
        if x is None:
            return 0, 0, 0, 0
        self._check(name, x, FLOATS, (n,))
        check_extent(name, (1, n), (0, x.stride(0)), x.element_size())
        return x.data_ptr(), KINDS[x.dtype], n, x.stride(0)

    def rows(
        self,
        name: str,
        x: Tensor | None,  # (N, columns)
        shape: tuple[int, int],
        dtype: torch.dtype = torch.float32,
    ) -> Rows:
        """Of an output, which is contiguous."""
        return (0, 0) if x is None else (self._contiguous(name, x, shape, dtype), shape[1])

    def row(
        self,
        name: str,
        x: Tensor,  # (N,)
        n: int,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Of an output, which is contiguous."""
        return self._contiguous(name, x, (n,), dtype)

    def _contiguous(self, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        self._check(name, x, (dtype,), shape)
        if not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()}; it must be contiguous")
        return x.data_ptr()

    def _check(self, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None) -> None:
        if x.device != self.device:
            raise ValueError(f"{name} is on {x.device}; it must be on {self.device}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name} is {x.dtype}; use one of {', '.join(map(str, dtypes))}")
        if shape is not None:
            same_shape(name, x, shape)


def check_extent(name: str, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> None:
    """Refuses what would put a byte of the tensor out of the reach of a 64-bit offset, or before its start."""
    reach = 1
    for size, stride in zip(shape, strides):
        if stride < 0:
            raise ValueError(f"{name} has strides {strides}; a negative one cannot be read, pass {name}.contiguous()")
        reach += max(size, 2) * stride  # past the last element, and past one step even where there is none
    if shape[-1] > MAX_VOCAB:
        raise ValueError(f"{name} has {shape[-1]} columns; ids are int32, so that at most {MAX_VOCAB} are possible")
    if reach * itemsize > MAX_OFFSET:
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

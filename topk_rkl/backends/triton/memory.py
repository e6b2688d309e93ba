"""What kernels do with memory besides loading and storing: find a row, wait for each other's stores, round."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.language import target_info
except ImportError:
    raise ImportError(f"Triton {triton.__version__} is too old: the kernels need 3.5 or later") from None

# Set before this module is imported, as Triton itself reads it when a kernel is decorated.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y"))

Layout = tuple[int, int, int, int]


def layout_of(
    matrix: Tensor,  # (N, X), or (S, R, X) of N = S R rows
) -> Layout:
    """What `row_of` reads: rows per slab, then the strides of slabs, rows and columns.

    A matrix of two dimensions is one whose slabs are its rows: Triton compiles the division by 1 away.
    """
    slab, row, column = (matrix if matrix.dim() == 3 else matrix[:, None]).stride()
    return matrix.shape[1] if matrix.dim() == 3 else 1, slab, row, column


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one; nothing on the CPU, where the interpreter runs."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def row_of(
    matrix,  # (N, X)
    layout,  # as `layout_of` has it
    row,  # int32
):
    """Where the row starts. Its columns are layout[3] apart."""
    slab = row // layout[0]
    return matrix + slab.to(tl.int64) * layout[1] + (row % layout[0]).to(tl.int64) * layout[2]


@triton.jit
def fence():
    """A barrier behind which each thread of the program sees what the others stored before it.

    That of an AMD GPU does not wait for stores: https://llvm.org/docs/AMDGPUUsage.html, memory model of gfx942.
    """
    if not INTERPRETED and target_info.is_hip():
        tl.inline_asm_elementwise("s_waitcnt vmcnt(0)", "=v,~{memory}", [], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def product(
    g,  # [K]
    scale,
    dtype: tl.constexpr,
):
    """The float32 product as dtype, and +0 where a factor is 0 even if the other is not finite."""
    scale = tl.broadcast_to(scale, g.shape)  # before it is compared: the interpreter broadcasts no booleans
    return rounded(tl.where((g == 0.0) | (scale == 0.0), 0.0, g * scale), dtype)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 -> dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # where the cast cuts the low half off instead
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        return tl.where(x == x, nearest, x).to(dtype)
    else:
        return x.to(dtype)

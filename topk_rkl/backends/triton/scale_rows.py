"""The gradient of hidden states, kept in float32, times that of each row's loss: five passes in plain PyTorch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_rkl.backends.triton.launch import compile_options, plan_scale_rows
from topk_rkl.backends.triton.memory import on_device_of, product


@triton.jit
def scale_rows_kernel(
    g,  # (N, X)
    grad_output,  # (N,)
    out,  # (N, X)
    width,  # X
    blocks,  # of a row
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    at = row.to(tl.int64) * width + column
    value = tl.load(g + at, mask=column < width)
    tl.store(out + at, product(value, tl.load(grad_output + row), out.dtype.element_ty), mask=column < width)


def scale_rows(
    g: Tensor,  # (N, X) contiguous
    grad_output: Tensor,  # (N,) contiguous
    out: Tensor,  # (N, X) contiguous, written
) -> None:
    (n, width) = g.shape
    if g.numel() == 0:
        return
    block, num_warps = plan_scale_rows(width)
    blocks = triton.cdiv(width, block)
    with on_device_of(out):
        scale_rows_kernel[(n * blocks,)](
            g, grad_output, out, width, blocks, BLOCK=block, num_warps=num_warps,
            **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip

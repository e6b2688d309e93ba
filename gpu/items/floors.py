"""What the card gives: the rates of a plain read, copy and fill, which every share is of."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu.items.forms import Form, Item
from gpu.items.inputs import Inputs

READS = ((2_048, 4), (4_096, 4), (8_192, 8))  # words per program, warps: the card says which is fastest
FILLS = ((1_024, 4), (2_048, 4), (4_096, 8))


@triton.jit
def read_kernel(
    words,  # (words,) int32
    out,  # (programs,) int32
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0), tl.max(tl.load(words + at), 0))


def read(
    x: Tensor,  # any shape, contiguous: its whole blocks are read
    block: int,
    warps: int,
) -> Tensor:  # (programs,) int32
    words = x.view(-1).view(torch.int32)
    out = torch.empty(len(words) // block, dtype=torch.int32, device=x.device)
    read_kernel[(len(out),)](words, out, BLOCK=block, num_warps=warps)
    return out


@triton.jit
def read_rows_kernel(
    words,  # (N, words of a row) int32
    width,
    out,  # (N,) int32
    BLOCK: tl.constexpr,
):
    row = words + tl.program_id(0).to(tl.int64) * width
    most = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(row + at, mask=at < width, other=0))
    tl.store(out + tl.program_id(0), tl.max(most, 0))


def read_rows(
    x: Tensor,  # (N, V) contiguous
    block: int,
    warps: int,
) -> Tensor:  # (N,) int32
    """As a selection reads: a program per row, so the rows under way lie far apart."""
    words = x.view(torch.int32)
    out = torch.empty(len(words), dtype=torch.int32, device=x.device)
    read_rows_kernel[(len(words),)](words, words.shape[1], out, BLOCK=block, num_warps=warps)
    return out


@triton.jit
def fill_kernel(
    words,  # (words,) int32
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(words + at, tl.zeros([BLOCK], tl.int32))


def fill(
    x: Tensor,  # any shape, contiguous: its whole blocks are written
    block: int,
    warps: int,
) -> None:
    words = x.view(-1).view(torch.int32)
    fill_kernel[(len(words) // block,)](words, BLOCK=block, num_warps=warps)


def floors(inputs: Inputs) -> list[Item]:
    sizes, most = inputs.sizes, inputs.sizes.read_words
    size = sizes.n * sizes.row
    reads = {
        f"{min(block, most):,} words by {warps} warps": Form(
            lambda _, block=block, warps=warps: read(inputs.teacher, min(block, most), warps)
        )
        for block, warps in READS
    }
    reads["a row per program"] = Form(lambda _: read_rows(inputs.teacher, min(8_192, most), 8))
    fills = {
        f"{min(block, most):,} words by {warps} warps": Form(
            lambda _, block=block, warps=warps: fill(inputs.gradient, min(block, most), warps)
        )
        for block, warps in FILLS
    }
    fills["zero_"] = Form(lambda _: inputs.gradient.zero_())  # a third slower on an H200
    copies = {"copy_": Form(lambda _: inputs.gradient.copy_(inputs.teacher))}
    shape = {"n": sizes.n, "v": sizes.v, "dtype": "bfloat16"}
    return [
        Item("read", reads, read=size, sizes=shape),
        Item("copy", copies, read=size, written=size, sizes=shape),
        Item("fill", fills, written=size, sizes=shape),
    ]

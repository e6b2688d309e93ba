"""Launch sizes: the one place that turns a vocabulary, a K and a dtype into block sizes and warps."""

import ctypes
import math
from dataclasses import dataclass

import torch
import triton

from topk_rkl.divergence import REVERSE

MAX_K = 1024
MAX_VOCAB = 1 << 20
RESIDENT_WARPS = 64  # of one core, at most
NARROW_BYTES = 48 << 10  # of a row that is read in less time than the rest of a selection takes
HELD_BYTES = 1 << 16  # of the head per program: L2 of an H200 loses most of 256 KB; the bound itself is not measured
FLOAT32_MAX = torch.finfo(torch.float32).max
SCRATCH_BYTES = 48 << 20
"""Scratch memory held at a time; a launch covers as much as fits."""

# Trailing zero bits of a value of this dtype once it is a float32: bits a comparison need not look at.
IDLE_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


def pad_k(k: int) -> int:
    """K rounded up to a power of two, as a block of Triton must be."""
    return max(16, 1 << (k - 1).bit_length())


def slot_warps(k: int, family: int) -> int:
    """Warps that keep K slots in registers: families other than the plain reverse KL have room for two per thread."""
    return 4 if family == REVERSE else min(16, max(4, pad_k(k) // 64))


@dataclass(frozen=True)
class SelectPlan:
    """How one program selects from one row of the vocabulary."""

    k_pad: int
    picked_pad: int  # groups read again: K, or all where there are fewer
    group: int  # neighbouring columns that share one maximum
    groups_pad: int  # groups in a row, rounded up to a power of two
    block: int  # columns read at a time
    num_warps: int
    registers: int  # of a thread, at most


def plan_select(vocab: int, k: int, itemsize: int, wide: bool, normalize: bool, family: int = REVERSE) -> SelectPlan:
    """Balances the two sets a program bisects: one maximum per group, and the columns of K groups.

    `wide` rows are read 16 bytes at a time.
    """
    k_pad = pad_k(k)
    group = 16
    while triton.next_power_of_2(triton.cdiv(vocab, group)) > k_pad * group:
        group *= 2
    groups_pad = max(16, triton.next_power_of_2(triton.cdiv(vocab, group)))
    keys = max(groups_pad, k_pad * group)
    # Four warps leave a core twice as many rows, and took 0.6 of the time on an H200. K = 256 would spill.
    narrow = k <= 128 and family == REVERSE and vocab * itemsize <= NARROW_BYTES
    num_warps = max(4 if narrow else 8, slot_warps(k, family), min(16, keys // (32 * 64)))
    # For four programs on a core, three, or two: as many as fit without spills that matter.
    per_thread = keys // (32 * num_warps)
    registers = 128 if num_warps == 16 or per_thread > 32 else 64 if wide and per_thread <= 16 else 80
    # 128 bytes in flight per thread cover the latency of memory with two programs on a core, 64 with more of them.
    # Exponentials, and rows that no 16-byte load fits, keep more numbers per element in registers.
    in_flight = num_warps * 32 * ((64 if narrow else 128) // itemsize if wide and not normalize else 16)
    block = min(in_flight, max(16 * group, triton.next_power_of_2(vocab)))
    return SelectPlan(k_pad, min(k_pad, groups_pad), group, groups_pad, block, num_warps, registers)


def plan_scatter(vocab: int) -> tuple[int, int]:
    """Columns that a program writes, and its warps."""
    return min(8192, max(128, triton.next_power_of_2(vocab))), 8


@dataclass(frozen=True)
class TailPlan:
    """How one program adds up the exponentials of one row."""

    block: int  # columns read at a time
    group: int  # neighbouring columns that share one maximum
    num_warps: int


def plan_tail(vocab: int, k: int, family: int = REVERSE) -> TailPlan:
    """32 bytes of 16-bit logits in flight per thread."""
    num_warps = max(8, slot_warps(k + 1, family))
    return TailPlan(
        block=min(16 * 32 * num_warps, max(256, triton.next_power_of_2(vocab))), group=16, num_warps=num_warps
    )


@dataclass(frozen=True)
class LinearLossPlan:
    """How one program multiplies a hidden state with K rows of the head, and adds them up."""

    slots: int  # rows of the head multiplied at a time
    block: int  # columns of them
    terms: int  # rows of the head added at a time
    span: int  # columns of them
    num_warps: int


def plan_linear_loss(k: int, width: int, itemsize: int, family: int = REVERSE) -> LinearLossPlan:
    """A warp multiplies whole rows and a thread adds up its own columns: what threads share they add after the loop.

    Where K rows of the head are many bytes, small programs read best. Two warps of an H200 took 0.67 of the time of
    eight where ids are spread as in prose, and 0.98 where they are spread evenly.
    """
    columns = max(16, triton.next_power_of_2(width))
    large = k > 512 or k * width * itemsize > HELD_BYTES  # the loss of 512 slots takes all registers of four warps
    num_warps = max(8 if k > 512 else 4, slot_warps(k, family))
    if large and k <= 64 and family == REVERSE:
        num_warps = 2
    block, terms = (1024 // itemsize, 16 // itemsize) if large else (256, 4)
    span = 32 * num_warps * 32 // itemsize  # two vectors of 16 bytes per thread
    return LinearLossPlan(min(16, 4 * num_warps), min(block, columns), terms, min(span, columns), num_warps)


@dataclass(frozen=True)
class LinearWeightGradPlan:
    """How one program adds up hidden states."""

    block: int  # columns added at a time
    num_warps: int


def plan_linear_weight_grad(width: int) -> LinearWeightGradPlan:
    """As many columns as keep that block of 16k hidden states within L2."""
    return LinearWeightGradPlan(block=min(512, max(16, triton.next_power_of_2(width))), num_warps=2)


def plan_scale_rows(width: int) -> tuple[int, int]:
    """Columns that a program scales, and its warps: at most four vectors of 16 bytes per thread."""
    block = min(4096, max(16, triton.next_power_of_2(width)))
    return block, max(1, block // 512)


def cores(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; of a CPU, where the interpreter runs, one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def compile_options(hip: bool, registers: int = 128) -> dict[str, int]:
    # Without a limit ptxas aims at more programs on a core and spills a few registers to get there. Fusion is the
    # default that Triton 3.10 turns off, and 3.9 warns of.
    return {"enable_fp_fusion": True} | ({} if hip else {"maxnreg": registers})


def float32_halves(x: float) -> tuple[float, float]:
    """A float64 as the sum of two float32, since Triton takes a Python float as one: the nearest there is."""
    high = ctypes.c_float(x if math.isinf(x) else min(max(x, -FLOAT32_MAX), FLOAT32_MAX)).value
    return high, 0.0 if math.isinf(x) else x - high

"""The cycles of a compiled kernel by its phases, which `compiled_cost` records and `predict` reads.

How often a loop turns cannot be read off the code. It is said here, from the launcher's block sizes and from what the
kernel searches for.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.sass import Sass, load_bits
from benchmarks.simulate import path, run
from topk_rkl.backends.triton.launch import IDLE_BITS, plan_select

SELECTS = ("select", "normalize", "select_loss")
KERNELS = (*SELECTS, "linear_loss", "scatter")
TARGETS = ("sm_90", "sm_100")
DTYPES = (torch.bfloat16, torch.float32)  # float16 compiles to the code of bfloat16 but for conversions
PICKS = 2  # turns of the loop that places what was picked: as many as one of its rows of sixteen keys holds
LONGEST = 80_000  # steps of a warp: what is longer takes minutes to simulate


@dataclass(frozen=True)
class Cycles:
    """The cycles of one row, or of the part of a row that a program of `scatter` writes."""

    alone: int  # by a program that has a core for itself
    scan: int  # of these, in loops that stream from memory, and in what is left of the row behind one
    search: int  # of these, in bisections
    beside: int  # per row of a program, with as many programs on the core as fit


def measure(case: Any, launch: dict[str, Any], sass: Sass, programs: int) -> Cycles | None:
    """The cycles of a `compiled_cost.Case` with its launch's keywords; None where a simulation would take too long."""
    if case.dtype not in DTYPES:
        return None
    steps = path(sass, turns(case, launch, sass))
    if len(steps) > LONGEST:
        return None
    warps, far = launch["num_warps"], _far(sass)
    [issued] = run(sass, steps, warps, far=far)
    spent = [(i, after - before) for i, (before, after) in zip(steps, pairwise(issued), strict=False)]
    scan, search = (
        sum(cycles for i, cycles in spent if any(i in loop for loop in loops))
        for loops in (_scans(sass), _searches(sass))
    )
    alone = beside = issued[-1]
    if programs > 1:
        # Three rows each, one after the other started: during the second of each all others are there.
        starts = [alone * i // programs for i in range(programs)]
        many = run(sass, steps * 3, warps, starts, far)
        beside = sum(last[2 * len(steps) - 1] - last[len(steps) - 1] for last in many) // programs
    return Cycles(alone, scan, search, beside)


def turns(case: Any, launch: dict[str, Any], sass: Sass) -> dict[int, int]:
    """How often each loop turns, by the branch that closes it."""
    streams, searches = _streams(sass), _searches(sass)
    bisections = search_turns(case)[2 - len(searches) :]  # a first one of few keys per thread is unrolled
    outer = [loop for loop in sass.ranges if any(_inside(stream, loop) for stream in streams)]
    if case.kernel == "linear_loss":
        counts = [-(-case.width // launch["BLOCK"]), -(-case.k // launch["TERMS"])]
        outer_counts = [-(-case.k // launch["SLOTS"]), -(-case.width // launch["SPAN"])]
    else:
        counts = [case.vocab // launch["BLOCK"]] * len(streams)
        outer_counts = []  # a program has one row
    picks = [loop for loop in sass.ranges if "STG" in sass.names[loop.start : loop.stop]]
    found = dict.fromkeys((loop.stop - 1 for loop in picks), PICKS)
    for loops, n in ((streams, counts), (outer, outer_counts), (searches, bisections)):
        found |= {loop.stop - 1: max(1, turn) for loop, turn in zip(loops, n, strict=True)}
    return found


def search_turns(case: Any) -> list[int]:
    """The turns of the two bisections of a selection, from normal logits."""
    if case.kernel not in SELECTS:
        return []
    plan, idle = plan_select(case.vocab, case.k, case.dtype.itemsize, wide=True, normalize=False), IDLE_BITS[case.dtype]
    logits = torch.randn(case.vocab, generator=torch.Generator().manual_seed(0)).to(case.dtype)
    groups = torch.nn.functional.pad(logits, (0, -case.vocab % plan.group), value=-torch.inf).view(-1, plan.group)
    maxima = groups.max(1).values
    best = maxima.topk(min(case.k, len(maxima))).indices
    low, first = bisected(keys(maxima, idle), None, case.k)
    return [first, bisected(keys(groups[best].flatten(), idle), low, case.k)[1]]


def keys(
    x: Tensor,  # (n,)
    idle: int,
) -> Tensor:  # (n,) int32
    """As `_order_key` of the kernel has them, of numbers that are finite or -inf."""
    bits = x.float().view(torch.int32)
    return (
        torch.where(x == -torch.inf, torch.tensor(-(2**31), dtype=torch.int32), bits ^ (bits >> 31 & 0x7FFFFFFF))
        >> idle
    )


def bisected(
    found: Tensor,  # (n,) int32
    low: int | None,
    k: int,
) -> tuple[int, int]:
    """The number that `_kth_largest` of the kernel finds, and in how many turns."""
    low, high, taken = int(found.min()) if low is None else low, int(found.max()), 0
    while low < high:
        third = -(-(high - low) // 3)
        first, second = low + third, high - (high - low - third) // 2
        of_first, of_second = (int((found >= x).sum()) for x in (first, second))
        below = second - 1 if of_first > k else first - (of_first < k)
        low = second if of_second >= k else first if of_first >= k else low
        high = high if of_second > k else second if of_second == k else below
        taken += 1
    return low, taken


def _loaded_bytes(sass: Sass, part: range) -> int:
    return sum(map(load_bits, sass.codes[part.start : part.stop])) // 8


def _inside(inner: range, outer: range) -> bool:
    return inner != outer and outer.start <= inner.start and inner.stop <= outer.stop


def _streams(sass: Sass) -> list[range]:
    """The innermost loops of which a turn loads 16 bytes per thread or more."""
    wide = [loop for loop in sass.ranges if _loaded_bytes(sass, loop) >= 16]
    return [loop for loop in wide if not any(_inside(other, loop) for other in wide)]


def _scans(sass: Sass) -> list[range]:
    """Streaming loops, and behind them what is skipped where nothing of the row is left."""
    streams = _streams(sass)
    left = [
        range(i, target)
        for loop in streams
        for i in range(loop.stop, min(loop.stop + 8, len(sass.instructions)))
        if (target := sass.instructions[i].target) and target > i and _loaded_bytes(sass, range(i, target)) >= 16
    ]
    return streams + left[:1]


def _searches(sass: Sass) -> list[range]:
    """Loops that touch no global memory. The instruction after the end of a program jumps to itself."""
    touching = {"LDG", "STG", "ATOMG"}
    return [loop for loop in sass.ranges if len(loop) > 1 and touching.isdisjoint(sass.names[loop.start : loop.stop])]


def _far(sass: Sass) -> set[int]:
    """Loads that the second-level cache does not hold: of 8 bytes or more, and all of a streaming loop without such."""
    wide = {i for i, code in enumerate(sass.codes) if load_bits(code) >= 64}
    return wide | {i for loop in _streams(sass) if wide.isdisjoint(loop) for i in loop}

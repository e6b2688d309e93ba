"""From compiled code to milliseconds and a share of the bandwidth of a card: a model, not a measurement.

    serial phases      `compiled_cost` simulates a program alone on a core, and as many as fit on one (`simulate`)
    bytes              what must move, and what this algorithm moves besides, less what the second-level cache holds
    the whole card     a closed queue: all resident programs in turn ask one memory for the bytes of a job, and spend
                       the cycles of the job elsewhere before they ask again

A job is a row, or the part of one that a program of `scatter` writes. The queue is solved by exact mean-value analysis:
with D the time of a job's bytes at full bandwidth, Z that of its cycles, and Q(0) = 0,

    R(n) = D (1 + Q(n - 1))        X(n) = n / (Z + R(n))        Q(n) = X(n) R(n)

The programs of a launch start together, so their first jobs read together and then leave the memory idle together;
with the second job they are taken to have drifted apart. The last ones leave the card half empty for one job. Left out:
the start of a launch, instruction caches and address translation.

The constants below come from H200s (Triton 3.6): SLOWER from a selection of K = 1,024, the others from measurements of
their own. `test_what_an_h200_measured` compares what they predict.
"""

import json
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

from benchmarks.records import FOLDER
from topk_rkl.backends.triton.launch import plan_scatter, plan_select

LINE = 64  # bytes that a load of one element moves
# Of that of a plain read, which took 1.081 ms: a read of a row per program took 1.090. K rows of the head per program,
# read once with the hidden states (`linear_loss` without dhidden), reached 0.925 of it.
APART, PACES = 0.992, {"linear_loss": 0.925, "scatter": 1.0}
# Of the second-level cache. ncu counted 17 % hits in linear_loss at K = 32 on an H200: 264 programs of which each reads
# 262 KB twice. The whole cache would give 45 %, 0.4 of it 18 %.
NEAR = 0.4
# Cycles on the card over simulated ones, the same for all phases. By ncu's samples it is 1.2 for bisections, and 1.2 to
# 1.4 for all that is no scan. The simulation has no bank conflicts, and its memory answers as if it were idle.
SLOWER = 1.25
ROWS = 16_384


@dataclass(frozen=True)
class Card:
    """Of the SXM boards. Bandwidths and caches are the vendor's.

    `reached` is the part of the bandwidth that a plain read reaches: measured on the H200, quack's on the H100, which
    is taken for the B200 too. ncu saw 1.95 to 1.98 GHz on the H200, and the driver reports 63 MB of cache. The H100
    has the same chip and highest clock.
    """

    target: str
    cores: int
    ghz: float
    terabytes_per_second: float
    cache_megabytes: int
    reached: float = 0.86

    @property
    def bytes_per_second(self) -> float:
        """Of a plain read."""
        return self.terabytes_per_second * 1e12 * self.reached


CARDS = {
    "H100": Card("sm_90", 132, 1.96, 3.35, 50),
    "H200": Card("sm_90", 132, 1.96, 4.8, 63, reached=0.96),
    "B200": Card("sm_100", 148, 1.85, 8.0, 126),
}
ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}

Cost = dict[str, Any]  # a row of compiled_cost.json


def expected(kernel: str, dtype: str, vocab: int, k: int, width: int, card_name: str, n: int = ROWS) -> float | None:
    """The share of `share`, from the committed row of that size; None where there is none.

    The card goes by its key in CARDS or by the name of a device, "NVIDIA H100 80GB HBM3".
    """
    words = set(card_name.split())
    card = next((card for name, card in CARDS.items() if name in words), None)
    if card is None or words & {"PCIe", "NVL"}:  # boards of other cores and bandwidths
        return None
    cost = _committed().get((card.target, kernel, dtype, vocab, k, width))
    return share(cost, card, n) if cost else None


def share(cost: Cost, card: Card, n: int = ROWS) -> float | None:
    """Of the reached bandwidth over the bytes that must move in n rows; None for what was not simulated."""
    time = milliseconds(cost, card, n)
    return time and n * needed_bytes(cost) / card.bytes_per_second / (time / 1e3)


def milliseconds(cost: Cost, card: Card, n: int = ROWS) -> float | None:
    """Of n rows; None for what was not simulated, and for a card of another target."""
    if cost["target"] != card.target or not cost.get("cycles"):
        return None
    per_row = jobs_per_row(cost)
    jobs = per_row * n
    programs = min(jobs, card.cores * cost["programs"])
    pace = card.bytes_per_second * PACES.get(cost["kernel"], APART)
    transfer = moved_bytes(cost, card, programs) / per_row / pace
    cycle = SLOWER * 1e-9 / card.ghz
    free = job_cycles(cost, programs / card.cores) * cycle  # of a job that never waits for other bytes than its own
    together = programs * needed_bytes(cost) / per_row / pace
    first = free + max(0.0, together - cost["cycles"]["scan"] * cycle)
    later = programs / throughput(programs, transfer, max(0.0, free - transfer))
    return 1e3 * (first + later * (max(1.0, jobs / programs - 0.5) if jobs > programs else 0.0))


def job_cycles(cost: Cost, resident: float) -> float:
    """Of a program that shares its core with resident - 1 others."""
    cycles, most = cost["cycles"], cost["programs"]
    beside: float = cycles["beside"] - cycles["alone"]
    return cycles["alone"] + beside * max(0.0, resident - 1) / max(1, most - 1)


def throughput(programs: int, transfer: float, elsewhere: float) -> float:
    """Jobs per second, by mean-value analysis."""
    waiting = rate = 0.0
    for n in range(1, programs + 1):
        residence = transfer * (1 + waiting)
        rate = n / (elsewhere + residence)
        waiting = rate * residence
    return rate


def needed_bytes(cost: Cost) -> int:
    """Per row: of the matrix that is read or written, once."""
    itemsize: int = ITEMSIZES[cost["dtype"]]
    return itemsize * (cost["k"] * cost["width"] if cost["kernel"] == "linear_loss" else cost["vocab"])


def moved_bytes(cost: Cost, card: Card, programs: int) -> float:
    """Per row, to and from memory, with so many rows under way: the cache keeps as much of them as it holds."""
    needed, k, itemsize = needed_bytes(cost), cost["k"], ITEMSIZES[cost["dtype"]]
    cached = card.cache_megabytes * 1e6 * NEAR
    missed = max(0.0, 1 - cached / (programs * needed))  # of what is read a second time
    if cost["kernel"] == "scatter":
        return needed + 8 * k
    if cost["kernel"] == "linear_loss":
        hidden = cost["width"] * (itemsize + 4)  # read, and its gradient written
        return needed * (1 + missed) + hidden + 12 * k
    group = plan_select(cost["vocab"], k, itemsize, wide=True, normalize=False).group
    student = k * (LINE + 4) if cost["kernel"] == "select_loss" else 0
    return needed + k * group * itemsize * missed + 8 * k + student  # the maxima of groups stay in the cache


def jobs_per_row(cost: Cost) -> int:
    return ceil(cost["vocab"] / plan_scatter(cost["vocab"])[0]) if cost["kernel"] == "scatter" else 1


@cache
def _committed() -> dict[tuple[str | int, ...], Cost]:
    sizes = ("target", "kernel", "dtype", "vocab", "k", "width")
    costs = json.loads((FOLDER / "compiled_cost.json").read_text())
    return {tuple(cost[size] for size in sizes): cost for cost in costs}

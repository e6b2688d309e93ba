"""From instructions and bytes to a share of the bandwidth that a card's memory reaches: a model, not a measurement.

A program moves its bytes and issues its instructions, and so do the programs beside it. The time of a row is the
longest of three:

    bytes / bandwidth                    what must move, and what this algorithm moves besides
    instructions / issue rate            four warps' instructions a cycle and core
    bytes * latency / bytes in flight    Little's law, with what the resident programs ask for in a turn of a loop

The instructions of a row are those of its streaming loop times its turns, those of a loop without a load once for every
bit of a key (the two bisections of a selection), and all others once. Left out: the second-level cache, the barriers
within a program, the tail of the last wave.
"""

from dataclasses import dataclass
from typing import Any

from topk_rkl.backends.triton.launch import plan_select

LATENCY = 0.8e-6  # seconds, to memory under load
REACHED = 0.86  # of the nominal bandwidth, by a plain read on an H100 (quack); taken for the others too


@dataclass(frozen=True)
class Card:
    """Of the SXM boards. Bandwidths are the vendor's; clocks are about what a card under load holds."""

    target: str
    cores: int
    ghz: float
    terabytes_a_second: float

    @property
    def bytes_a_second(self) -> float:
        return self.terabytes_a_second * 1e12 * REACHED

    @property
    def instructions_a_second(self) -> float:
        """Of threads, on one core."""
        return 4 * 32 * self.ghz * 1e9


CARDS = {
    "H100": Card("sm_90", 132, 1.755, 3.35),
    "H200": Card("sm_90", 132, 1.755, 4.8),
    "B200": Card("sm_100", 148, 1.85, 8.0),
}
ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
STREAMING = ("select", "normalize", "select_loss", "sparse_head")


def share(cost: dict[str, Any], card: Card) -> float | None:
    """Of the reached bandwidth over the bytes that must move, predicted; None for a kernel that streams nothing."""
    if cost["kernel"] not in STREAMING or cost["target"] != card.target:
        return None
    loop = next(loop for loop in cost["loops"] if loop["load_bits"])
    itemsize, threads = ITEMSIZES[cost["dtype"]], 32 * cost["warps"]
    if cost["kernel"] == "sparse_head":
        needed = cost["k"] * cost["width"] * itemsize
        moved = needed  # the second reading of the rows is taken to come from the cache
        turns = needed / itemsize * cost["scan_per_element"] / (loop["instructions"] * threads)
    else:
        needed = cost["vocab"] * itemsize
        group = plan_select(cost["vocab"], cost["k"], itemsize, wide=True).group
        moved = needed * (1 + 2 / group) + cost["k"] * group * itemsize  # the maxima of groups, and K groups again
        turns = needed / (loop["loaded_bytes"] * threads)
    bits = 8 * itemsize
    in_loops = sum(loop["instructions"] for loop in cost["loops"])
    searching = sum(loop["instructions"] for loop in cost["loops"] if not loop["load_bits"] and not loop["store_bits"])
    issued = (turns * loop["instructions"] + bits * searching + max(0, cost["instructions"] - in_loops)) * threads
    in_flight = cost["programs"] * threads * loop["loaded_bytes"]
    bandwidth = card.bytes_a_second / card.cores
    seconds = max(moved / bandwidth, issued / card.instructions_a_second, moved * LATENCY / in_flight)
    return needed / bandwidth / seconds

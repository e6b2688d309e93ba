"""`python -m benchmarks scaling`: the model's form checked on this machine, with 1 to 4 processes and gloo.

Three things are measured apart: each collective alone at several sizes, a call whose collectives are left out, and the
call itself. The first two predict the third. Processes that share cores slow each other down, so the call without its
collectives is timed on all ranks at once.
"""

import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from benchmarks.records import FOLDER, Line, append, setting
from benchmarks.scaling.collectives import SHARE, Collective, ours
from tests.ranks import on_ranks
from topk_rkl.loss import Support, linear_topk_reverse_kl, teacher_topk, topk_reverse_kl

FILE = FOLDER / "scaling.jsonl"
WORLDS = (1, 2, 3, 4)
SIZES = tuple(1 << power for power in (8, 12, 16, 18, 20, 22, 24))  # bytes of a tensor


@dataclass(frozen=True)
class Case:
    """One call, forward and backward, of `entry`; V is of all ranks together."""

    entry: str
    n: int
    v: int
    k: int
    h: int = 0


CASES = (
    Case("teacher_topk", 512, 151_936, 64),
    Case("topk_reverse_kl", 512, 151_936, 64),
    Case("topk_reverse_kl with a Support", 512, 151_936, 64),
    Case("linear_topk_reverse_kl with a Support", 512, 32_000, 64, 2048),
)
TINY = tuple(Case(case.entry, 8, 64, 4, case.h and 16) for case in CASES)


def share(vocab: int, ranks: int, rank: int) -> range:
    """The ids of a rank."""
    return range(vocab * rank // ranks, vocab * (rank + 1) // ranks)


def call(case: Case, group: dist.ProcessGroup) -> Callable[[], object]:
    """The call on this rank's part of random inputs; one rank alone is called without a group."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    columns = share(case.v, ranks, rank)
    option = {"group": group} if ranks > 1 else {}
    seeded = torch.Generator().manual_seed(rank)
    spread = torch.arange(case.k, dtype=torch.int32) * (case.v // case.k)
    first = torch.randint(case.v // case.k, (case.n, 1), generator=torch.Generator().manual_seed(0)).int()
    support = Support(first + spread, torch.zeros(case.n, case.k))

    def logits() -> Tensor:
        return torch.randn(case.n, len(columns), generator=seeded).bfloat16()

    if case.entry == "teacher_topk":
        teacher = logits()
        return lambda: teacher_topk(teacher, case.k, **option)
    if case.h:
        same = torch.Generator().manual_seed(0)
        hidden = torch.randn(case.n, case.h, generator=same).bfloat16().requires_grad_()
        head = torch.randn(len(columns), case.h, generator=seeded).bfloat16() / case.h**0.5
        return lambda: linear_topk_reverse_kl(hidden, head, support, **option).backward()
    student = logits().requires_grad_()
    if case.entry == "topk_reverse_kl":
        teacher = logits()
        return lambda: topk_reverse_kl(student, teacher, k=case.k, **option).backward()
    return lambda: topk_reverse_kl(student, support, **option).backward()


def left_out(ranks: int) -> dict[str, Callable[..., Tensor]]:
    """In the place of the collectives: what a rank receives is what it sent, at once."""

    def gathered(x: Tensor, *_: object) -> Tensor:
        return torch.cat([x] * ranks)

    def same(x: Tensor, *_: object) -> Tensor:
        return x

    gathers = {name: gathered for name in ("all_gather_single", "all_gather_tensor") if hasattr(functional, name)}
    return gathers | {"all_reduce": same, "all_to_all_single": same, "wait_tensor": same}


def seconds_of(work: Callable[[], object], group: dist.ProcessGroup) -> float:
    dist.barrier(group)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def timed(group: dist.ProcessGroup, case: Case, rounds: int) -> list[tuple[float, float]]:
    """Seconds of this rank per round: of the call, and of the call without its collectives."""
    work, found = call(case, group), []
    for _ in range(rounds + 1):  # the first is not counted
        whole = seconds_of(work, group)
        with mock.patch.multiple(functional, **left_out(dist.get_world_size(group))):
            found.append((whole, seconds_of(work, group)))
    return found[1:]


def timed_collective(group: dist.ProcessGroup, kind: str, size: int, rounds: int) -> list[float]:
    """Seconds of this rank per round, of a collective whose tensor has that many bytes."""
    ranks = dist.get_world_size(group)
    part = torch.zeros(ranks, max(1, size // ranks), dtype=torch.uint8)
    numbers = torch.zeros(max(1, size // 4))
    gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
    work = {
        "all-to-all": lambda: functional.all_to_all_single(part, None, None, group),
        "all-gather": lambda: gather(part[:1], 0, group),
        "all-reduce": lambda: functional.all_reduce(numbers, "sum", group),
    }[kind]
    return [seconds_of(lambda: functional.wait_tensor(work()), group) for _ in range(rounds + 1)][1:]


def slowest(of_ranks: list[list[float]]) -> list[float]:
    """Per round."""
    return [max(round_) for round_ in zip(*of_ranks, strict=True)]


def fitted(points: dict[float, float]) -> tuple[float, float]:
    """Latency and seconds per byte from the seconds of each number of bytes, by least squares of the relative error."""
    weighted = [(1 / s, x / s) for x, s in points.items()]
    aa, ab, bb = (sum(p * q for p, q in pairs) for pairs in _products(weighted))
    a, b = (sum(row[i] for row in weighted) for i in (0, 1))
    determinant = aa * bb - ab * ab
    return max(0.0, (a * bb - b * ab) / determinant), max(0.0, (b * aa - a * ab) / determinant)


def _products(rows: list[tuple[float, float]]) -> tuple[list[tuple[float, float]], ...]:
    return [(a, a) for a, _ in rows], rows, [(b, b) for _, b in rows]


def predicted(
    local: float,  # seconds without collectives
    collectives: tuple[Collective, ...],
    ranks: int,
    rows: int,
    links: dict[str, Line],
) -> float:
    """Seconds of a call from what was measured apart."""
    sent = (links[c.kind]["latency_s"] + c.sent(ranks, rows) * links[c.kind]["seconds_per_byte"] for c in collectives)
    return local + sum(sent)


def lines(worlds: tuple[int, ...], cases: tuple[Case, ...], sizes: tuple[int, ...], rounds: int) -> Iterator[Line]:
    for ranks in worlds:
        links: dict[str, Line] = {}
        for kind in SHARE if ranks > 1 else ():
            links[kind] = collective_line(kind, ranks, sizes, rounds)
            yield {"name": "collective", "kind": kind, "ranks": ranks, **links[kind]}
        for case in cases:
            yield {"name": "call", **vars(case), "ranks": ranks, **call_line(case, ranks, rounds, links)}


def collective_line(kind: str, ranks: int, sizes: tuple[int, ...], rounds: int) -> Line:
    times = {size: slowest(on_ranks(ranks, timed_collective, kind, size, rounds)) for size in sizes}
    medians = {size: statistics.median(of_size) for size, of_size in times.items()}
    points = {Collective(kind, 0, "", call_bytes=size).sent(ranks, 0): s for size, s in medians.items()}
    latency, per_byte = fitted(points)
    return {"seconds": medians, "latency_s": latency, "seconds_per_byte": per_byte}


def call_line(case: Case, ranks: int, rounds: int, links: dict[str, Line]) -> Line:
    of_ranks = on_ranks(ranks, timed, case, rounds)
    whole, local = (slowest([[pair[i] for pair in rank] for rank in of_ranks]) for i in (0, 1))
    alone, quartiles = statistics.median(local), statistics.quantiles(whole, n=4)
    collectives = ours(case.entry, ranks, case.k, width=case.h)
    return {
        "dtype": "bfloat16",
        "rounds": rounds,
        "median_ms": 1e3 * statistics.median(whole),
        "quartiles_ms": [1e3 * quartiles[0], 1e3 * quartiles[2]],
        "local_ms": 1e3 * alone,
        "predicted_ms": 1e3 * predicted(alone, collectives, ranks, case.n, links),
    }


def measure(options: Namespace) -> None:
    """Writes the results anew."""
    cases, sizes = (TINY, SIZES[:2]) if options.tiny else (CASES, SIZES)
    shared = setting("cpu") | {"threads": 1, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    found = []
    for line in lines(tuple(options.ranks), cases, sizes, options.rounds):
        found.append(line | shared)
        print(", ".join(f"{name} {value}" for name, value in line.items()), flush=True)
    file = options.out or FILE
    file.unlink(missing_ok=True)
    for line in found:
        append(line, file)

"""`python -m benchmarks.linear_cpu`: the loss from hidden states beside torch and other projects, as JSON lines.

Every time is of a forward and a backward pass, of contestants that take turns in one process. None is taken before loss
and gradients were found right against float64; `error` is the largest difference as a share of the largest value. TRL
and Liger compare the whole vocabulary, another objective, and are held only to be finite. What is missing is named on
standard error.

"plain" multiplies by the whole head and gathers from the logits. "gathered" multiplies by the K rows of the head alone,
"in chunks" 32 positions at a time. `head_gradient` is the layout that came: sparse where that was asked for and the
contestant can. "floor" fills as many bytes as the head has, fresh from the system, with zeros; a dense gradient of the
head is judged by it. The ids are spread evenly over the vocabulary; those of text repeat, and a cache then helps more.

`peak_bytes` is measured in a new process for each contestant, which has run it on a small problem before: the largest
resident memory during one call (VmHWM of Linux, reset just before the call) less the resident memory before it. The
gradients that the call leaves are part of it.

"scaling" is this package alone with a frozen head, over a decade of each size, and `exponent` the slope of the
logarithms by least squares.
"""

import argparse
import importlib
import math
import mmap
import multiprocessing
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.speed import DTYPES, medians, on_slots, record, setting
from topk_rkl import Support, backends, teacher_topk
from topk_rkl.loss import linear_topk_reverse_kl

GRADIENTS = ("hidden alone", "sparse head", "dense head")
CHUNK = 32
# In bfloat16 the plain form's logits carry 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}

Step = Callable[[], Tensor]


class Sizes(NamedTuple):
    n: int
    v: int
    h: int
    k: int


SMALL = Sizes(40, 64, 16, 4)
SPEED = Sizes(256, 32_000, 1_024, 64)
MEMORY = Sizes(512, 151_936, 2_048, 32)
DECADES = {
    "n": (64, 128, 256, 512, 640),
    "k": (16, 32, 64, 128, 160),
    "h": (256, 512, 1_024, 2_048, 2_560),
    "v": (16_000, 32_000, 64_000, 128_000, 160_000),
}


class Problem(NamedTuple):
    hidden: Tensor  # (N, H)
    head: Tensor  # (V, H)
    support: Support  # (N, K)
    gradients: str


class Truth(NamedTuple):
    """In float64. Of the head's gradient only the rows of the tokens in some support are not 0."""

    loss: Tensor  # ()
    dhidden: Tensor  # (N, H)
    tokens: Tensor  # (U,)
    dhead: Tensor  # (U, H)


def problem(sizes: Sizes, dtype: torch.dtype, gradients: str) -> Problem:
    torch.manual_seed(0)
    n, v, h, k = sizes
    hidden = torch.randn(n, h, dtype=dtype).requires_grad_()
    head = torch.randn(v, h, dtype=dtype).mul_(h**-0.5).requires_grad_(gradients != "hidden alone")
    return Problem(hidden, head, teacher_topk(torch.randn(n, v), k, normalize=True), gradients)


def truth(p: Problem) -> Truth:
    tokens, slots = p.support.ids.long().unique(return_inverse=True)
    hidden = p.hidden.detach().double().requires_grad_()
    rows = p.head.detach()[tokens].double().requires_grad_()
    loss = on_slots(torch.einsum("nkh,nh->nk", rows[slots], hidden), p.support.log_probs.double())
    dhidden, dhead = torch.autograd.grad(loss, (hidden, rows))
    return Truth(loss.detach(), dhidden, tokens, dhead)


def plain(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    ids: Tensor,  # (N, K) int64
    w: Tensor,  # (N, K)
) -> Tensor:
    return on_slots((hidden @ head.T).gather(-1, ids).float(), w)


def gathered(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    ids: Tensor,  # (N, K) int64
    w: Tensor,  # (N, K)
    sparse: bool,
) -> Tensor:
    rows = F.embedding(ids, head, sparse=True) if sparse else head[ids]
    return on_slots(torch.bmm(rows, hidden[..., None]).squeeze(-1).float(), w)


def stepping(loss: peers.Loss) -> Step:
    def step() -> Tensor:
        total = loss()
        total.backward()
        return total.detach()

    return step


def ours_and_eager(p: Problem) -> dict[str, Step]:
    hidden, head, support, gradients = p
    ids, w = support.ids.long(), support.log_probs
    sparse = gradients == "sparse head"

    def in_chunks() -> Tensor:
        parts = []
        for rows in torch.arange(len(hidden)).split(CHUNK):
            part = slice(rows[0], rows[-1] + 1)
            loss = gathered(hidden[part], head, ids[part], w[part], sparse) * (len(rows) / len(hidden))
            loss.backward()
            parts.append(loss.detach())
        return torch.stack(parts).sum()

    ours = partial(linear_topk_reverse_kl, hidden, head, support, weight_grad="sparse" if sparse else "dense")
    return {
        "topk_rkl": stepping(ours),
        "plain": stepping(lambda: plain(hidden, head, ids, w)),
        "gathered": stepping(lambda: gathered(hidden, head, ids, w, sparse)),
        "gathered in chunks": in_chunks,
    }


def others(p: Problem) -> dict[str, Step]:
    hidden, head, support, _ = p
    given = hidden, head, support.ids.long(), support.log_probs
    teacher = torch.randn_like(hidden), torch.randn_like(head).mul_(head.shape[1] ** -0.5)
    compiled = torch.compile(plain, dynamic=False)
    steps = {"torch.compile": stepping(lambda: compiled(*given))}
    losses = {
        "axolotl": partial(peers.axolotl, *given),
        "axolotl, compiled": partial(peers.axolotl, *given, compiled=True),
        "TRL": partial(peers.trl, hidden, head, *teacher),
        "Liger": partial(peers.liger, hidden, head, *teacher),
        "Liger, compiled": partial(peers.liger, hidden, head, *teacher, compiled=True),
    }
    for name, loss in losses.items():
        try:
            steps[name] = stepping(loss())
        except (FileNotFoundError, ImportError) as missing:
            print(f"{name} is missing: {missing}; benchmarks/peers.py says how to get it", file=sys.stderr)
    return steps


def objective(name: str) -> str:
    return "full vocabulary" if name.startswith(("TRL", "Liger")) else "top-K reverse KL"


def fresh(p: Problem, step: Step) -> Tensor:
    p.hidden.grad = p.head.grad = None
    return step()


def share(x: Tensor, of: Tensor) -> Tensor:
    return x.double().abs().max() / of.abs().max()


def checked(name: str, step: Step, p: Problem, want: Truth) -> dict[str, object]:
    """What is known of a contestant after one step.

    Raises:
        AssertionError: it is wrong.
    """
    loss, dhidden, dhead = fresh(p, step), p.hidden.grad, p.head.grad
    line = {"contestant": name, "objective": objective(name), "head_gradient": None}
    if dhead is not None:
        line["head_gradient"] = "sparse" if dhead.is_sparse else "dense"
    if line["objective"] == "full vocabulary":
        assert all(x.isfinite().all() for x in (loss, dhidden, dhead) if x is not None), f"{name} is not finite"
        return line
    errors = [share(loss - want.loss, want.loss), share(dhidden - want.dhidden, want.dhidden)]
    if p.head.requires_grad:
        dhead = dhead.to_dense()
        elsewhere = torch.ones(len(dhead), dtype=torch.bool)
        elsewhere[want.tokens] = False
        errors += [share(dhead[want.tokens] - want.dhead, want.dhead), share(dhead[elsewhere], want.dhead)]
    error = torch.stack(errors).max().item()
    assert error <= TOLERANCE[p.hidden.dtype], f"{name} is wrong by {error:.1e} of the largest value"
    return {**line, "error": float(f"{error:.1e}")}


def backend(p: Problem) -> str:
    module = backends.choose_head(backends.requested(), p.support.ids.shape[1], p.hidden, len(p.head))
    return module.__name__.rpartition(".")[2]


def contest(sizes: Sizes, dtype: str, gradients: str, runs: int, with_others: bool) -> Iterator[dict[str, object]]:
    p = problem(sizes, DTYPES[dtype], gradients)
    steps = {**ours_and_eager(p), **(others(p) if with_others else {})}
    want = truth(p)
    lines = {name: checked(name, step, p, want) for name, step in steps.items()}
    calls: dict[str, Callable[[], object]] = {name: partial(fresh, p, step) for name, step in steps.items()}
    if gradients == "dense head":
        lines["floor"] = {"contestant": "floor"}
        calls["floor"] = lambda: torch.frombuffer(mmap.mmap(-1, p.head.nbytes), dtype=p.head.dtype).zero_()
    times = medians(calls, runs, "cpu", settled=True)
    for name, taken in times.items():
        line = {
            "work": "loss and gradients", "gradients": gradients, **lines[name], **sizes._asdict(), "dtype": dtype,
            "median_ms": round(taken * 1e3, 3), "over_topk_rkl": round(taken / times["topk_rkl"], 2),
            "backend": backend(p),
        }  # fmt: skip
        yield {**line, "over_floor": round(taken / times["floor"], 2)} if "floor" in times else line


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def peak_bytes(name: str, sizes: Sizes, dtype: str, gradients: str, threads: int) -> int:
    """Of a contestant, in a process that does nothing else."""
    torch.set_num_threads(threads)
    small = problem(SMALL, DTYPES[dtype], gradients)
    fresh(small, ours_and_eager(small)[name])
    p = problem(sizes, DTYPES[dtype], gradients)
    step = ours_and_eager(p)[name]
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def memory(threads: int, runs: int) -> Iterator[dict[str, object]]:
    for gradients in ("hidden alone", "dense head"):
        for line in contest(MEMORY, "bfloat16", gradients, runs, with_others=False):
            if line["contestant"] != "floor":
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    asked = process.submit(peak_bytes, line["contestant"], MEMORY, "bfloat16", gradients, threads)
                    line["peak_bytes"] = asked.result()
            yield line


def speed(runs: int) -> Iterator[dict[str, object]]:
    for gradients in GRADIENTS:
        yield from contest(SPEED, "float32", gradients, runs, with_others=True)


def scaling(runs: int) -> Iterator[dict[str, object]]:
    for axis, values in DECADES.items():
        calls, lines = {}, {}
        for value in values:
            p = problem(SPEED._replace(**{axis: value}), torch.float32, "hidden alone")
            step = ours_and_eager(p)["topk_rkl"]
            sizes = SPEED._replace(**{axis: value})._asdict()
            lines[value] = {"work": "scaling", "axis": axis, **checked("topk_rkl", step, p, truth(p)), **sizes}
            calls[value] = partial(fresh, p, step)
        times = medians(calls, runs, "cpu", settled=True)
        for value, taken in times.items():
            yield {**lines[value], "dtype": "float32", "median_ms": round(taken * 1e3, 3), "backend": backend(p)}
        yield {"work": "exponent", "axis": axis, "exponent": round(exponent(times), 3), "backend": backend(p)}


def exponent(times: dict[int, float]) -> float:
    return statistics.linear_regression(*([math.log(x) for x in xs] for xs in (times, times.values()))).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a file to which the lines are appended")
    works = {"speed": speed, "memory": memory, "scaling": scaling}
    parser.add_argument("--works", choices=works, nargs="*", default=[*works])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    works["memory"] = partial(memory, options.threads)
    shared = setting("cpu")
    if backends.unavailable("native") is None:
        native = importlib.import_module("topk_rkl._native")
        shared |= {"build": native.BUILD, "isa": native.isa()}
    for work in options.works:
        for line in works[work](options.runs):
            record({**line, **shared}, options.out)


if __name__ == "__main__":
    main()

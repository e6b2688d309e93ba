"""`python -m benchmarks.speed`: time and peak memory beside plain PyTorch, as JSON lines.

The contestants take turns in one process; medians and their ratio are what counts. "floor" is the time that copying
the bytes that must move would take at the copy rate measured here: the teacher read, the gradient written.
"""

import argparse
import contextlib
import datetime
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
import triton
from torch import Tensor

from topk_rkl import Support, linear_topk_reverse_kl, teacher_topk, topk_reverse_kl
from topk_rkl.backends import choose

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def plain(
    student: Tensor,  # (N, V)
    teacher: Tensor,  # (N, V)
    k: int,
) -> Tensor:
    """The loss as the README's plain form writes it."""
    w, ids = teacher.float().topk(k, dim=-1)
    return on_ids(student.float(), w, ids)


def on_ids(
    student: Tensor,  # (N, V)
    w: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
) -> Tensor:
    return on_slots(student.gather(-1, ids), w)


def on_slots(
    z: Tensor,  # (N, K), the student's logits
    w: Tensor,  # (N, K), the teacher's
) -> Tensor:
    log_p = z.log_softmax(-1)
    return (log_p.exp() * (log_p - w.log_softmax(-1))).sum(-1).mean()


def trained(loss: Callable[[Tensor, Tensor, int], Tensor], student: Tensor, teacher: Tensor, k: int) -> None:
    student.grad = None
    loss(student, teacher, k).backward()


def contests(student: Tensor, teacher: Tensor, k: int) -> dict[str, tuple[int, dict[str, Callable[[], object]]]]:
    """Work -> the bytes that must move, and the contestants."""

    def ours(z: Tensor, w: Tensor, k: int) -> Tensor:
        return topk_reverse_kl(z, w, k=k)

    size = teacher.numel() * teacher.element_size()
    compiled = torch.compile(plain)
    return {
        "select": (
            size,
            {"topk_rkl": lambda: teacher_topk(teacher, k), "torch.topk": lambda: teacher.topk(k)},
        ),
        "loss and gradient": (
            2 * size,
            {
                "topk_rkl": lambda: trained(ours, student, teacher, k),
                "plain": lambda: trained(plain, student, teacher, k),
                "torch.compile": lambda: trained(compiled, student, teacher, k),
            },
        ),
    }


def linear_contests(
    n: int, vocab: int, k: int, width: int, dtype: torch.dtype, device: str
) -> dict[str, tuple[int, dict[str, Callable[[], object]]]]:
    """As `contests`, from hidden states: K rows of the head a position must be read, and its gradient written."""
    hidden, head = (torch.randn(size, width, device=device, dtype=dtype) for size in (n, vocab))
    head = head.mul_(width**-0.5)
    ids = torch.randint(vocab, (n, k), device=device)
    support = Support(ids, torch.randn(n, k, device=device))
    hidden.requires_grad_()

    def ours() -> Tensor:
        return linear_topk_reverse_kl(hidden, head, support)

    def plain_head(hidden: Tensor, head: Tensor) -> Tensor:
        return on_ids((hidden @ head.T).float(), support.log_probs, ids)

    def step(loss: Callable[[], Tensor], trains_head: bool) -> None:
        hidden.grad = head.grad = None
        head.requires_grad_(trains_head)
        loss().backward()

    some = hidden[:16].detach().double()
    z = torch.einsum("nkh,nh->nk", head[ids[:16]].double(), some)
    losses = linear_topk_reverse_kl(hidden[:16], head, Support(ids[:16], support.log_probs[:16]))
    torch.testing.assert_close(losses.double(), on_slots(z, support.log_probs[:16].double()), rtol=1e-4, atol=0)
    compiled = torch.compile(plain_head)
    contestants = {
        "topk_rkl": ours,
        "plain": lambda: plain_head(hidden, head),
        "torch.compile": lambda: compiled(hidden, head),
    }
    gathered = n * k * width * head.element_size()
    return {
        work: (moved, {name: partial(step, loss, trains_head) for name, loss in contestants.items()})
        for work, moved, trains_head in (
            ("from hidden states, frozen head", gathered, False),
            ("from hidden states, dense head gradient", gathered + head.nbytes, True),
        )
    }


def seconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(calls: dict[str, Callable[[], object]], runs: int, device: str, settled: bool = False) -> dict[str, float]:
    """Of each, in turns. `settled` puts a call before each timed one, so that what it is given was freed by itself."""
    for call in calls.values():
        call(), call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            if settled:
                call()
            times[name].append(seconds(call, device))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """Peak beyond what was held before; only a GPU's allocator says it."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_rate(device: str) -> float:
    """Bytes read and written a second by a copy of 512 MiB."""
    source = torch.empty(128 << 20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians({"copy": lambda: target.copy_(source)}, 11, device)["copy"]


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        return f"{names[0]}, {len(names)} cores" if names else platform.machine()
    return platform.processor() or platform.machine()


def setting(device: str) -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def record(line: dict[str, object], out: Path | None) -> None:
    """Prints the line, and appends it to the file."""
    print(json.dumps(line), flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[256, 16_384] if cuda else [128])
    parser.add_argument("--vocab", type=int, nargs="*", default=[151_936])
    parser.add_argument("--k", type=int, nargs="*", default=[16, 64, 256] if cuda else [32])
    parser.add_argument("--width", type=int, nargs="*", default=[4_096] if cuda else [], help="of hidden states")
    parser.add_argument("--dtype", choices=DTYPES, nargs="*", default=["bfloat16"])
    parser.add_argument("--runs", type=int, default=21 if cuda else 7)
    parser.add_argument("--out", type=Path, help="a file to which the lines are appended")
    options = parser.parse_args()
    device = "cuda" if cuda else "cpu"
    shared, rate = setting(device), copy_rate(device)

    def run(works: dict[str, tuple[int, dict[str, Callable[[], object]]]], **sizes: object) -> None:
        for work, (size, calls) in works.items():
            times = medians(calls, options.runs, device)
            for name, taken in times.items():
                line = {
                    "work": work, "contestant": name, **sizes,
                    "median_ms": round(taken * 1e3, 4), "over_topk_rkl": round(taken / times["topk_rkl"], 2),
                    "over_floor": round(taken * rate / size, 2), "peak_bytes": peak_bytes(calls[name], device),
                    "copy_gb_s": round(rate / 1e9, 1), **shared,
                }  # fmt: skip
                record(line, options.out)

    for n, vocab, k, dtype in product(options.rows, options.vocab, options.k, options.dtype):
        student, teacher = (torch.randn(n, vocab, device=device, dtype=DTYPES[dtype]) for _ in range(2))
        student.requires_grad_()
        # torch.topk takes any of equal logits, so the plain form is checked on the ids of the stable order.
        ids, w = teacher_topk(teacher, k)
        want = on_ids(student.double(), w.double(), ids.long())
        torch.testing.assert_close(topk_reverse_kl(student, teacher, k=k).double(), want, rtol=1e-5, atol=0)
        backend = choose("auto", k, student, teacher).__name__.rpartition(".")[2]
        sizes = {"backend": backend, "n": n, "v": vocab, "k": k, "dtype": dtype}
        run(contests(student, teacher, k), **sizes)
        del student, teacher, want
        for width in options.width:
            run(linear_contests(n, vocab, k, width, DTYPES[dtype], device), **sizes, h=width)


if __name__ == "__main__":
    main()

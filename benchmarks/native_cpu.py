"""`python -m benchmarks.native_cpu`: the compiled extension beside torch and other projects on a CPU, as JSON lines.

The contestants take turns in one process. `read_rate` is that of a float32 sum over as many bytes as the logits have,
by the side of which a selection, which must read them all, is judged. What is not there is named on standard error.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.speed import DTYPES, medians, on_ids, plain, record, setting, trained
from tests import cases
from topk_rkl import Support, _native, teacher_topk, topk_reverse_kl, use_backend

WORST = ("random", "ascending", "two_valued", "all_equal")

Calls = dict[str, Callable[[], object]]


def selection(n: int, vocab: int, k: int, dtype: torch.dtype) -> Calls:
    logits = torch.randn(n, vocab).to(dtype)
    as_many_bytes = torch.randn(logits.nbytes // 4)
    return {
        "topk_rkl": lambda: teacher_topk(logits, k),
        "torch.topk": lambda: logits.topk(k),
        "read_rate": lambda: as_many_bytes.sum(),
    }


def worst_cases(n: int, vocab: int, k: int, dtype: torch.dtype) -> Calls:
    def call(name: str) -> Callable[[], object]:
        logits = cases.ROWS[name](vocab, k).to(dtype).expand(n, vocab).contiguous()
        return lambda: teacher_topk(logits, k)

    return {("topk_rkl" if name == "random" else name): call(name) for name in WORST}


def loss(n: int, vocab: int, k: int, dtype: torch.dtype) -> Calls:
    student, teacher = (torch.randn(n, vocab).to(dtype) for _ in range(2))
    student.requires_grad_()
    compiled = torch.compile(plain)

    def ours(z: Tensor, w: Tensor, k: int) -> Tensor:
        return topk_reverse_kl(z, w, k=k)

    return {
        "topk_rkl": lambda: trained(ours, student, teacher, k),
        "plain": lambda: trained(plain, student, teacher, k),
        "torch.compile": lambda: trained(compiled, student, teacher, k),
    }


class Logits(torch.autograd.Function):
    """What a head gives: not a leaf. Its memory is that of `buffer`, and no gradient goes further."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, buffer: Tensor) -> Tensor:
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def loss_on_ids(n: int, vocab: int, k: int, dtype: torch.dtype) -> Calls:
    """The teacher given as ids and log-probs. A contestant is called only after its gradient was found right."""
    student, teacher = (torch.randn(n + 1, vocab).to(dtype) for _ in range(2))
    ids, log_probs = teacher_topk(teacher, k, normalize=True)
    ids = ids.long()
    # NeMo-RL's function drops the last position, so it is given one more.
    leaf, longer, buffer = student[:n].clone().requires_grad_(), student.clone().requires_grad_(), student[:n].clone()
    support = Support(ids[:n], log_probs[:n])
    compiled = torch.compile(on_ids)
    losses: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {
        "topk_rkl": (leaf, lambda: topk_reverse_kl(leaf, support)),
        "plain": (leaf, lambda: on_ids(leaf, log_probs[:n], ids[:n])),
        "torch.compile": (leaf, lambda: compiled(leaf, log_probs[:n], ids[:n])),
    }
    for name, peer, given in (("ms-swift", peers.ms_swift, leaf), ("NeMo-RL", peers.nemo_rl, longer)):
        try:
            losses[name] = given, peer(given, ids[: len(given)], log_probs[: len(given)])
        except FileNotFoundError as missing:
            print(f"{name} is missing: {missing}; benchmarks/peers.py says how to get it", file=sys.stderr)

    def backward(student: Tensor, loss: Callable[[], Tensor]) -> None:
        student.grad = None
        loss().backward()

    def overwriting() -> None:
        topk_reverse_kl(Logits.apply(leaf, buffer), support, overwrite_student_logits=True).backward()

    truth = leaf.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(on_ids(truth, log_probs[:n].double(), ids[:n]), truth)
    calls: Calls = {name: partial(backward, *loss) for name, loss in losses.items()}
    for name, (given, _) in losses.items():
        calls[name]()
        torch.testing.assert_close(given.grad[:n].double(), want, rtol=1e-4, atol=1e-8, msg=f"{name} is wrong")
    overwriting()
    torch.testing.assert_close(buffer.double(), want, rtol=1e-4, atol=1e-8)
    return {**calls, "topk_rkl, overwriting": overwriting}


CONTESTS = [  # work, calls, N, V, K, dtype
    *(("select", selection, 256, 151_936, k, "bfloat16") for k in (16, 64, 256)),
    ("select", selection, 256, 151_936, 64, "float32"),
    *(("worst cases", worst_cases, 256, 151_936, k, "bfloat16") for k in (16, 64, 256)),
    ("loss and gradient", loss, 256, 151_936, 32, "bfloat16"),
    *(("loss and gradient, ids given", loss_on_ids, n, 32_000, 64, "float32") for n in (256, 1_024)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--out", type=Path, help="a file to which the lines are appended")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shared = {**setting("cpu"), "build": _native.BUILD, "isa": _native.isa()}
    for work, contest, n, vocab, k, dtype in CONTESTS:
        with use_backend("native"):
            times = medians(contest(n, vocab, k, DTYPES[dtype]), options.runs, "cpu", settled=work.startswith("loss"))
        for name, taken in times.items():
            line = {
                "work": work, "contestant": name, "n": n, "v": vocab, "k": k, "dtype": dtype,
                "median_ms": round(taken * 1e3, 3), "over_topk_rkl": round(taken / times["topk_rkl"], 2), **shared,
            }  # fmt: skip
            record(line, options.out)


if __name__ == "__main__":
    main()

"""`python -m benchmarks.native_cpu`: the compiled extension beside torch on a CPU, as JSON lines.

The contestants take turns in one process. `read_rate` is that of a float32 sum over as many bytes as the logits have,
by the side of which a selection, which must read them all, is judged.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.speed import DTYPES, medians, plain, record, setting, trained
from tests import cases
from topk_rkl import _native, teacher_topk, topk_reverse_kl, use_backend

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


CONTESTS = [  # work, calls, V, K, dtype
    *(("select", selection, 151_936, k, "bfloat16") for k in (16, 64, 256)),
    ("select", selection, 151_936, 64, "float32"),
    *(("worst cases", worst_cases, 151_936, k, "bfloat16") for k in (16, 64, 256)),
    ("loss and gradient", loss, 151_936, 32, "bfloat16"),
    ("loss and gradient", loss, 32_000, 64, "float32"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--out", type=Path, help="a file to which the lines are appended")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shared = {**setting("cpu"), "build": _native.BUILD, "isa": _native.isa()}
    for work, contest, vocab, k, dtype in CONTESTS:
        with use_backend("native"):
            times = medians(contest(options.rows, vocab, k, DTYPES[dtype]), options.runs, "cpu")
        for name, taken in times.items():
            line = {
                "work": work, "contestant": name, "n": options.rows, "v": vocab, "k": k, "dtype": dtype,
                "median_ms": round(taken * 1e3, 3), "over_topk_rkl": round(taken / times["topk_rkl"], 2), **shared,
            }  # fmt: skip
            record(line, options.out)


if __name__ == "__main__":
    main()

"""What the kernels of a shard cost once compiled for an H100: `predict` makes milliseconds from it.

python -m benchmarks.scaling.cost    # writes benchmarks/results/shard_cost.json, in some minutes and without a GPU
"""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from unittest import mock

import torch

from benchmarks import predict
from benchmarks.records import FOLDER
from topk_rkl.backends.triton import launch

FILE = FOLDER / "shard_cost.json"
CARD = "H100"
RANKS = (1, 2, 4, 8, 16, 32, 64)
VOCABS = (151_936, 256_000)
SLOTS = (32, 64, 128, 256)
ROWS = 16_384
WIDTH = 4096
PADDED = 128  # a trainer pads each shard to a multiple of this, as Megatron-LM does
FIELDS = ("triton", "target", "kernel", "dtype", "vocab", "k", "width", "programs", "cycles")


def shard(vocab: int, ranks: int) -> int:
    """Columns of a rank."""
    return -(-vocab // (ranks * PADDED)) * PADDED


def wanted() -> Iterator[tuple[str, int, int, int]]:
    """Kernel, vocabulary, K and H of every record."""
    for k in SLOTS:
        for vocab in VOCABS:
            yield "select_loss", vocab, k, 0
            for ranks in RANKS:
                yield "select", shard(vocab, ranks), k, 0
                yield "scatter", shard(vocab, ranks), k, 0
        for ranks in RANKS[1:]:
            yield "select", ranks * k, k, 0  # of the candidates
        yield "linear_loss", VOCABS[0], k, WIDTH


WIDE_PLAN = "select, eight warps"  # as the code has it for wider rows


def narrow_ranks() -> list[int]:
    """By which V = 151,936 is divided into rows that four warps select from."""
    return [ranks for ranks in RANKS if shard(VOCABS[0], ranks) * torch.bfloat16.itemsize <= launch.NARROW_BYTES]


def compared() -> Iterator[tuple[str, int, int, int]]:
    """The selections that are compiled with eight warps too."""
    for ranks in narrow_ranks():
        yield WIDE_PLAN, shard(VOCABS[0], ranks), 64, 0


def milliseconds(kernel: str, vocab: int, k: int, rows: int, width: int = 0) -> float:
    """Of that many rows on an H100, predicted."""
    time = predict.milliseconds(_committed()[kernel, vocab, k, width], predict.CARDS[CARD], rows)
    assert time is not None, f"{kernel} of {vocab} columns was not simulated"
    return time


@cache
def _committed() -> dict[tuple[str, int, int, int], predict.Cost]:
    records = json.loads(FILE.read_text())
    return {(r["kernel"], r["vocab"], r["k"], r["width"]): r for r in records}


def main() -> None:
    from benchmarks.compiled_cost import Case, measure, write
    from topk_rkl.backends.triton.memory import INTERPRETED

    if INTERPRETED.value:
        sys.exit("TRITON_INTERPRET is set, so the kernels were built for the interpreter: unset it to compile them.")
    records = []
    for kernel, vocab, k, width in dict.fromkeys((*wanted(), *compared())):
        case = Case(kernel.partition(",")[0], torch.bfloat16, vocab, k, width)
        with mock.patch.object(launch, "NARROW_BYTES", 0) if kernel == WIDE_PLAN else nullcontext():
            [cost] = [vars(cost) for cost in measure(case, predict.CARDS[CARD].target)]
        cycles = cost["cycles"] and vars(cost["cycles"])
        records.append({field: cost[field] for field in FIELDS} | {"kernel": kernel, "cycles": cycles})
        print(*records[-1].values(), flush=True)
    write(records, FILE)


if __name__ == "__main__":
    main()

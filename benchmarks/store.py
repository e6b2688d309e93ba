"""Stored sets: how fast they are read and written, what a token takes, and what rounding does to the loss.

    python -m benchmarks.store [--tiny] [--json benchmarks/results/store.json]

One thread; the files are in the page cache, since they were just written. A rate counts stored bytes of ids and
log-probs. The tables of docs/stores.md are of that file: `tables`.
"""

import argparse
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from benchmarks.records import FOLDER, Line, setting
from topk_rkl.loss import Support, teacher_topk, topk_reverse_kl
from topk_rkl.store import Collator, Header, Row, Store, Writer

FILE = FOLDER / "store.json"
VOCABS, SLOTS = (49_152, 151_936), (32, 64, 128)
FORMS = {
    "set, float16": "this package, float16",
    "set, float32": "this package, float32",
    "torch": "torch.save of int64 and float32",
    "parquet": "Parquet of lists, int64 and float32",
    "JSON": "JSON as vLLM answers",
    "logits": "all logits, bfloat16",
}


def header(vocab: int, k: int, dtype: str = "float16") -> Header:
    return Header(k, vocab, "random logits", "none", "random", log_probs_dtype=dtype)  # type: ignore[arg-type]


def logits(rows: int, vocab: int, seed: int = 0) -> Tensor:  # (rows, V)
    """As a trained model spreads them: the best tokens have most of the probability, by ranks that fall as a power."""
    draw = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, vocab + 1).log()
    sharp = 1 + 1.5 * torch.rand(rows, 1, generator=draw)
    noise = torch.randn(rows, vocab, generator=draw) * 0.5
    order = torch.rand(rows, vocab, generator=draw).argsort(-1)
    return (-sharp * ranks + noise).gather(-1, order)


def answers(length: int, vocab: int, k: int) -> Support:
    """Log-probs that fall as a power of their rank, of uniform ids, which no compression shortens much."""
    spread = -(1 + 1.5 * torch.rand(length, 1)) * torch.arange(1, k + 1).log() + 0.1 * torch.randn(length, k)
    return Support(torch.randint(vocab, (length, k)), (spread.log_softmax(-1) - 0.1).sort(-1, descending=True)[0])


def median(call: Callable[[], object], rounds: int) -> float:
    """Seconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rates(folder: Path, vocab: int, k: int, rows: int, length: int, rounds: int) -> Line:
    """Gigabytes of stored ids and log-probs per second."""
    made = [Row(torch.randint(vocab, (length,)), answers(length, vocab, k)) for _ in range(rows)]
    asked = header(vocab, k)
    written = iter(range(1_000))

    def write() -> None:
        with Writer(folder / str(next(written)), asked) as writer:
            writer.append(made)
            writer.finish()

    writing = median(write, 3)
    store, collator = Store(folder / "0"), Collator(0)
    stored = store.positions * k * ((2 if vocab < 2**16 else 4) + 2)
    batch = [store[i] for i in range(8)]
    batches = [range(i, i + 8) for i in range(0, rows, 8)]
    parts = {
        "write": writing,
        "open": median(lambda: Store(folder / "0"), rounds),
        "decode": median(lambda: [store[i] for i in range(rows)], rounds),
        "pad": median(lambda: [collator(batch) for _ in batches], rounds),
        "batch": median(lambda: [collator([store[i] for i in batch]) for batch in batches], rounds),
    }
    found = {
        "vocab": vocab,
        "k": k,
        "rows": rows,
        "length": length,
        "stored_bytes": stored,
        "open_s": parts.pop("open"),
    }
    return found | {f"{name}_gb_per_s": stored / seconds / 1e9 for name, seconds in parts.items()}


def bytes_per_token(folder: Path, vocab: int, k: int, rows: int, length: int) -> dict[str, float]:
    """Of each form in which the same answers are stored."""
    made = [Row(torch.randint(vocab, (length,)), answers(length, vocab, k)) for _ in range(rows)]
    tokens = rows * length
    found = {}
    for dtype in ("float16", "float32"):
        with Writer(folder / f"{vocab} {k} {dtype}", header(vocab, k, dtype)) as writer:
            writer.append(made)
            writer.finish()
        found[f"set, {dtype}"] = Store(folder / f"{vocab} {k} {dtype}").bytes / tokens
    ids, log_probs = (torch.cat([row.support.tensors[i] for row in made]) for i in (0, 1))
    data = io.BytesIO()
    torch.save({"ids": ids.long(), "log_probs": log_probs, "input_ids": torch.cat([r.input_ids for r in made])}, data)
    found["torch"] = len(data.getvalue()) / tokens
    found["parquet"] = parquet_bytes(made) / tokens
    found["JSON"] = sum(len(answer) for row in made for answer in vllm(row)) / tokens
    found["logits"] = 2.0 * vocab
    return found


def parquet_bytes(made: list[Row]) -> int:
    """As a dataset of lists writes them, compressed by snappy."""
    columns = {
        "input_ids": [row.input_ids.tolist() for row in made],
        "teacher_ids": [row.support.ids.tolist() for row in made],
        "teacher_log_probs": pyarrow.array(
            [row.support.log_probs.tolist() for row in made], pyarrow.list_(pyarrow.list_(pyarrow.float32()))
        ),
    }
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().size


def vllm(row: Row) -> Iterator[str]:
    """The entries of prompt_logprobs, with the texts of tokens of 5 letters."""
    draw = random.Random(0)
    for ids, log_probs in zip(*(x.tolist() for x in row.support.tensors), strict=True):
        yield json.dumps({
            str(token): {"logprob": x, "rank": rank, "decoded_token": "".join(draw.choices("abcdefgh", k=5))}
            for rank, (token, x) in enumerate(zip(ids, log_probs, strict=True), 1)
        })  # fmt: skip


def rounding(vocab: int, k: int, rows: int, dtype: torch.dtype) -> Line:
    """Relative errors, per position, of the loss and of its gradient from log-probs of this dtype instead of float64.

    The student's logits are the teacher's and noise of standard deviation 1.
    """
    w = logits(rows, vocab).double()
    z = (w + torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).double()).requires_grad_()
    exact = teacher_topk(w, k, normalize=True)
    losses, gradients = [], []
    for support in (exact, exact.to(dtype).to(torch.float64)):
        loss = topk_reverse_kl(z, support, reduction="none")
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss.sum(), z)[0].norm(dim=-1))
    found: Line = {"vocab": vocab, "k": k, "rows": rows, "dtype": str(dtype).removeprefix("torch.")}
    found["of_mean"] = abs(float(losses[1].mean() / losses[0].mean()) - 1)
    for name, (want, got) in {"loss": losses, "gradient": gradients}.items():
        error = (got / want - 1).abs()
        found |= {f"{name}_mean": float(error.mean()), f"{name}_max": float(error.max())}
    return found


def measured(tiny: bool) -> dict[str, Any]:
    """All that the page tells; tiny checks the harness."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vocabs, slots = ((60, 70_000), (4,)) if tiny else (VOCABS, SLOTS)
    rows, length, rounds = (8, 5, 2) if tiny else (64, 1024, 7)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        speed = [rates(folder / f"rates {v}", v, slots[len(slots) // 2], rows, length, rounds) for v in vocabs]
        sizes = [
            {"vocab": v, "k": k, **bytes_per_token(folder / "sizes", v, k, 2 if tiny else 8, length)}
            for v in vocabs
            for k in slots
        ]
    dtypes = torch.float16, torch.bfloat16
    errors = [rounding(vocabs[0], k, 8 if tiny else 256, dtype) for k in slots for dtype in dtypes]
    shared = {**setting("cpu"), "safetensors": version("safetensors"), "pyarrow": pyarrow.__version__}
    return {"setting": shared, "rates": speed, "bytes_per_token": sizes, "rounding": errors}


def tables(found: dict[str, Any]) -> str:
    """The three tables of docs/stores.md."""
    return "\n".join((rate_table(found["rates"]), size_table(found["bytes_per_token"]), error_table(found["rounding"])))


def rate_table(lines: list[Line]) -> str:
    parts = {"decode": "rows", "pad": "padding", "batch": "batches of 8 rows", "write": "writing, with fsync"}
    rows = [["V", "K", *parts.values()], ["---:", "---:", *["---:"] * len(parts)]]
    rows += [[f"{x['vocab']:,}", str(x["k"]), *(f"{x[f'{name}_gb_per_s']:.1f} GB/s" for name in parts)] for x in lines]
    return as_table(rows)


def size_table(lines: list[Line]) -> str:
    rows = [["form", *(f"V {x['vocab']:,}, K {x['k']}" for x in lines)], ["---", *["---:"] * len(lines)]]
    rows += [[name, *(f"{x[form]:,.0f}" for x in lines)] for form, name in FORMS.items()]
    return as_table(rows)


def error_table(lines: list[Line]) -> str:
    shown = {"of_mean": "mean loss", "loss_mean": "loss, mean", "loss_max": "loss, largest"}
    shown |= {"gradient_mean": "gradient's norm, mean", "gradient_max": "gradient's norm, largest"}
    rows = [["K", "log-probs", *shown.values()], ["---:", "---", *["---:"] * len(shown)]]
    rows += [[str(x["k"]), x["dtype"], *(f"{x[name]:.1e}" for name in shown)] for x in lines]
    return as_table(rows)


def as_table(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to check the harness")
    parser.add_argument("--json", type=Path, help="the file that is written anew")
    options = parser.parse_args()
    found = measured(options.tiny)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(tables(found))


if __name__ == "__main__":
    main()

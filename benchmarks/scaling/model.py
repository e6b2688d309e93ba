"""The time of a call on ranks that share a vocabulary: a model of H100s, not a measurement.

    time = kernels of a rank + collectives, each of a latency and its bytes over the bandwidth of the link

Kernels that stream a shard are predicted from compiled code (`cost`, `predict`). Work on K slots per row counts bytes
at the pace of a plain read, and at least SMALL seconds per operation. Products take their operations at RATE.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks import predict
from benchmarks.scaling.collectives import AGREED, Collective, Design, ours
from benchmarks.scaling.cost import CARD, ROWS, VOCABS, WIDTH, milliseconds, shard

SMALL = 2e-6  # seconds of an operation on few numbers, one after the other
# Counted in the code, those that one rank alone has too left out.
SMALL_OPERATIONS = {
    "teacher_topk": 23,
    "topk_reverse_kl": 42,
    "topk_reverse_kl with a Support": 24,
    "linear_topk_reverse_kl with a Support": 18,
}
RATE = 700e12  # operations per second of large bfloat16 products on an H100; 989e12 are nominal
MEMORY = predict.CARDS[CARD].bytes_per_second
LOGIT = 2  # bytes


@dataclass(frozen=True)
class Link:
    """Latencies in seconds, of NCCL's own model: by a ring, and by a tree, which an all-reduce may take."""

    name: str
    nominal: float  # bytes per second, of each rank in each direction
    bytes_per_second: float  # taken
    ring_step: float
    tree_step: float
    ring_start: float = 14.0e-6
    tree_start: float = 14.0e-6

    def latency(self, kind: str, ranks: int) -> float:
        if kind != "all-reduce":
            return self.ring_start + (ranks - 1) * self.ring_step
        return min(
            self.ring_start + 2 * (ranks - 1) * self.ring_step,
            self.tree_start + 2 * math.ceil(math.log2(ranks)) * self.tree_step,
        )

    def seconds(self, collective: Collective, ranks: int, rows: int = ROWS) -> float:
        sent = collective.sent(ranks, rows)
        return self.latency(collective.kind, ranks) + sent / self.bytes_per_second


LINKS = {
    "NVLink": Link("NVLink", 450e9, 370.8e9, 1.9e-6, 1.25e-6),
    "InfiniBand": Link("InfiniBand", 50e9, 46e9, 4.0e-6, 8.5e-6),
}


class Part(NamedTuple):
    """Seconds of one part of a call."""

    what: str
    seconds: float


class Step(NamedTuple):
    """A piece of a training step, by what it calls."""

    name: str
    entries: tuple[str, ...]
    products: float = 0  # of N by V by H, all ranks together
    hidden_bytes: int = 0  # of the gradient of a hidden state that the trainer's head reduces


STEPS = {
    "teacher_topk": Step("`teacher_topk`", ("teacher_topk",)),
    "loss": Step("`topk_reverse_kl` from logits", ("topk_reverse_kl",)),
    "support": Step("`topk_reverse_kl` with a `Support`", ("topk_reverse_kl with a Support",)),
    "heads": Step("both heads and `topk_reverse_kl`", ("topk_reverse_kl",), products=4, hidden_bytes=2),
    "linear": Step(
        "`linear_teacher_topk` and `linear_topk_reverse_kl`",
        ("linear_teacher_topk", "linear_topk_reverse_kl with a Support"),
        products=1,
    ),
}


def parts(step: Step, vocab: int, ranks: int, k: int, link: Link, rows: int = ROWS) -> list[Part]:
    """What the time of a step consists of."""
    columns, found = shard(vocab, ranks), []
    if step.products:
        found.append(Part("products", step.products * 2 * rows * columns * WIDTH / RATE))
    for entry in step.entries:
        kernels = KERNELS[entry](columns, ranks, k, rows)
        found += kernels
        selection = sum(part.seconds for part in kernels if part.what == "selection")
        for c in ours(entry, ranks, k, width=WIDTH):
            # A GPU selects while the ranks agree.
            meanwhile = selection if c.what == AGREED else 0.0
            found.append(Part(c.what, max(0.0, link.seconds(c, ranks, rows) - meanwhile)))
    if step.hidden_bytes and ranks > 1:
        gradient = Collective("all-reduce", step.hidden_bytes * WIDTH, HEADS_GRADIENT)
        found.append(Part(gradient.what, link.seconds(gradient, ranks, rows)))
    return found


HEADS_GRADIENT = "gradient of the hidden states"


def seconds(step: Step, vocab: int, ranks: int, k: int, link: Link, rows: int = ROWS) -> float:
    return sum(part.seconds for part in parts(step, vocab, ranks, k, link, rows))


def overlapped(step: Step, vocab: int, ranks: int, k: int, link: Link, rows: int = ROWS) -> float:
    """The same with the gradient of the hidden states reduced during the product that gives the head's gradient."""
    found = parts(step, vocab, ranks, k, link, rows)
    product = sum(part.seconds for part in found if part.what == "products") / max(1, step.products)
    reduced = sum(part.seconds for part in found if part.what == HEADS_GRADIENT)
    return sum(part.seconds for part in found) - min(product, reduced)


def efficiency(alone: float, shared: float, ranks: int) -> float:
    """T(1) / (w T(w))."""
    return alone / (ranks * shared)


def scaling(step: Step, vocab: int, ranks: int, k: int, link: Link) -> float:
    return efficiency(seconds(step, vocab, 1, k, link), seconds(step, vocab, ranks, k, link), ranks)


def small(entry: str, moved: float) -> Part:
    return Part("numbers of K slots", max(SMALL * SMALL_OPERATIONS[entry], moved / MEMORY))


def _select(columns: int, ranks: int, k: int, rows: int) -> list[Part]:
    """Of `teacher_topk`: a rank selects from its shard, and merges the candidates of the rows that it owns."""
    found = [Part("selection", milliseconds("select", columns, k, rows) / 1e3)]
    if ranks == 1:
        return found
    owned = rows if ranks == 2 else -(-rows // ranks)
    merge = Part("merge", milliseconds("select", ranks * k, k, owned) / 1e3)
    return [*found, merge, small("teacher_topk", rows * k * 6 * (LOGIT + 4))]


def _loss(columns: int, ranks: int, k: int, rows: int) -> list[Part]:
    gradient = Part("gradient", milliseconds("scatter", columns, k, rows) / 1e3)
    if ranks == 1:
        return [Part("selection", milliseconds("select_loss", columns, k, rows) / 1e3), gradient]
    select = Part("selection", milliseconds("select", columns, k, rows) / 1e3)
    merge = Part("merge", milliseconds("select", ranks * k, k, -(-rows // ranks)) / 1e3)
    # The student's logits of the candidates; what is told, and what is answered, each read and written three times.
    moved = rows * k * (predict.LINE + 6 * (2 * LOGIT + 1) + 6 * 4)
    return [select, merge, small("topk_reverse_kl", moved), gradient]


def _support(columns: int, ranks: int, k: int, rows: int) -> list[Part]:
    gradient = Part("gradient", milliseconds("scatter", columns, k, rows) / 1e3)
    # Each rank reads the logits that it has, and works on all K of a row.
    moved = rows * k * (predict.LINE / ranks + 6 * 4)
    if ranks == 1:
        return [Part("numbers of K slots", moved / MEMORY), gradient]
    return [small("topk_reverse_kl with a Support", moved), gradient]


def _linear_loss(_: int, ranks: int, k: int, rows: int) -> list[Part]:
    """One kernel on a rank alone. Else the shard's slots, K over ranks, are multiplied, and read again backwards."""
    whole = milliseconds("linear_loss", VOCABS[0], k, rows, WIDTH) / 1e3
    if ranks == 1:
        return [Part("products at the slots", whole)]
    head = rows * k * WIDTH * LOGIT  # bytes of the rows of the head, of all ranks
    hidden = rows * WIDTH * (2 * LOGIT + 4)  # read twice, and the gradient written
    pace = head / whole  # bytes per second, as the one kernel reads the head
    kept = small("linear_topk_reverse_kl with a Support", rows * k * 6 * 4)
    return [Part("products at the slots", 2 * head / ranks / pace + hidden / MEMORY), kept]


KERNELS = {
    "teacher_topk": _select,
    "linear_teacher_topk": _select,
    "topk_reverse_kl": _loss,
    "topk_reverse_kl with a Support": _support,
    "linear_topk_reverse_kl with a Support": _linear_loss,
}


def design_seconds(design: Design, vocab: int, ranks: int, link: Link, rows: int = ROWS) -> float:
    """Of another project's design: the bytes of its passes at the pace of a plain read, and its collectives."""
    columns = vocab if design.all_of_it else shard(vocab, ranks)
    sent = sum(link.seconds(collective, ranks, rows) for collective in design.collectives) if ranks > 1 else 0
    return rows * columns * design.shard_bytes / MEMORY + sent


def chunked(vocab: int, ranks: int, k: int, link: Link, chunks: int, rows: int = ROWS) -> float:
    """The loss from logits with its rows in chunks: the selection of one runs while the candidates of another travel.

    The collectives of a chunk have their whole latency. Nothing that follows a chunk's candidates overlaps.
    """
    found = parts(STEPS["loss"], vocab, ranks, k, link, rows)
    selection = next(part.seconds for part in found if part.what == "selection")
    candidates, answer = ours("topk_reverse_kl", ranks, k)[1:]
    told, answered = (link.seconds(collective, ranks, rows // chunks) for collective in (candidates, answer))
    travelling = max(0.0, told - selection / chunks) * (chunks - 1) + told
    answering = max(0.0, answered - selection / chunks) * (chunks - 1) + answered
    rest = sum(p.seconds for p in found if p.what not in ("selection", candidates.what, answer.what))
    kept = next(p.seconds for p in found if p.what == "numbers of K slots")
    more = max(0.0, chunks * SMALL * SMALL_OPERATIONS["topk_reverse_kl"] - kept)
    return selection + travelling + answering + rest + more

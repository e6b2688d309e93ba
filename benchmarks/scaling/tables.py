"""The tables of docs/scaling.md, from the model and from what `python -m benchmarks scaling` measured.

A mark is <!-- scaling NAME ARGUMENTS -->, with a NAME of TABLES.
"""

import statistics
from collections import Counter
from collections.abc import Callable

from benchmarks.records import FOLDER, Line, load
from benchmarks.scaling.collectives import Collective, designs, ours
from benchmarks.scaling.cost import RANKS, ROWS, SLOTS, VOCABS, WIDE_PLAN, WIDTH, milliseconds, narrow_ranks, shard
from benchmarks.scaling.model import (
    LINKS,
    STEPS,
    Link,
    Step,
    chunked,
    design_seconds,
    efficiency,
    overlapped,
    parts,
    scaling,
    seconds,
)
from benchmarks.summaries import digits, table

K = 64
VOCAB = VOCABS[0]
# Of Liger's fused linear cross-entropy, forward and backward, on Blackwell GPUs: its pull request 1458.
PUBLISHED = {1: 1.0, 2: 1.083, 4: 1.001, 8: 0.761, 16: 0.399}
TARGETS = {8: 0.95, 16: 0.80}


def ms(s: float) -> str:
    return digits(1e3 * s)


def percent(x: float) -> str:
    return f"{100 * x:.0f} %"


def aligned(head: list[str], texts: int = 1) -> list[list[str]]:
    return [head, ["---"] * texts + ["---:"] * (len(head) - texts)]


def kinds(collectives: tuple[Collective, ...]) -> str:
    counted = Counter(c.kind for c in collectives)
    return ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in counted.items())


CALLS = {
    "`teacher_topk`": ("teacher_topk", {}),
    "`teacher_topk` with `normalize=True`": ("teacher_topk", {"normalize": True}),
    "`topk_reverse_kl` from teacher logits": ("topk_reverse_kl", {}),
    "`topk_reverse_kl` with a `Support`": ("topk_reverse_kl with a Support", {}),
    "`linear_teacher_topk`": ("linear_teacher_topk", {}),
    "`linear_topk_reverse_kl` from teacher logits": ("linear_topk_reverse_kl", {"width": WIDTH}),
    "`linear_topk_reverse_kl` with a `Support`": ("linear_topk_reverse_kl with a Support", {"width": WIDTH}),
    "the same, hidden states without a gradient": (
        "linear_topk_reverse_kl with a Support",
        {"width": WIDTH, "hidden_grad": False},
    ),
}


def sent_bytes(_: str) -> str:
    """Per row and rank."""
    rows = aligned(
        ["call, bfloat16, K = 64", "collectives from 3 ranks on", "tp = 2", "tp = 4", "tp = 8", "tp = 64"], texts=2
    )
    for name, (entry, options) in CALLS.items():
        cells = []
        for ranks in (2, 4, 8, 64):
            found = ours(entry, ranks, K, **options)[1:]
            cells.append(digits(sum(c.sent(ranks, ROWS) for c in found) / ROWS))
        rows.append([name, kinds(ours(entry, 8, K, **options)[1:]), *cells])
    return table(rows)


def design_table(_: str) -> str:
    rows = aligned(["design", "objective", "collectives", "bytes sent", "bytes per logit", *link_heads()], texts=3)
    for design in designs(8, K, VOCAB):
        sent = sum(c.sent(8, ROWS) for c in design.collectives) / ROWS
        cells = [ms(design_seconds(design, VOCAB, 8, link)) for link in LINKS.values()]
        said = [design.name, design.objective, kinds(design.collectives)]
        rows.append([*said, digits(sent), f"{design.shard_bytes:g}", *cells])
    return table(rows)


def spread(_: str) -> str:
    """Milliseconds of each design by the number of ranks."""
    rows = aligned(["design, ms", "link", *(f"tp = {ranks}" for ranks in RANKS)], texts=2)
    for i, design in enumerate(designs(2, K, VOCAB)):
        for name, link in LINKS.items():
            took = (design_seconds(designs(ranks, K, VOCAB)[i], VOCAB, ranks, link) for ranks in RANKS)
            rows.append([design.name, name, *map(ms, took)])
    return table(rows)


def link_heads() -> list[str]:
    return [f"{link}, ms" for link in LINKS]


def links(_: str) -> str:
    rows = aligned(["link", "nominal", "taken", "start of a collective", "step of a ring", "step of a tree"])
    for link in LINKS.values():
        gigabytes = [f"{x / 1e9:,.0f} GB/s" for x in (link.nominal, link.bytes_per_second)]
        micros = [f"{1e6 * x:g} µs" for x in (link.ring_start, link.ring_step, link.tree_step)]
        rows.append([link.name, *gigabytes, *micros])
    return table(rows)


def times(arguments: str) -> str:
    """Milliseconds and efficiency of a step for every size."""
    step = STEPS[arguments]
    rows = aligned(["V", "K", "link", *(f"tp = {ranks}" for ranks in RANKS)], texts=3)
    for vocab in VOCABS:
        for k in SLOTS:
            for name, link in LINKS.items():
                alone = seconds(step, vocab, 1, k, link)
                cells = [f"{ms(alone)} ms"]
                for ranks in RANKS[1:]:
                    shared = seconds(step, vocab, ranks, k, link)
                    cells.append(f"{ms(shared)} ({percent(efficiency(alone, shared, ranks))})")
                rows.append([f"{vocab:,}", str(k), name, *cells])
    return table(rows)


def summary(_: str) -> str:
    """The efficiency of every step at the ranks that have a target."""
    head = ["V = 151,936, K = 64", *(f"tp = {ranks}, {name}" for ranks in TARGETS for name in LINKS)]
    rows = aligned(head)
    rows.append(["target", *(percent(target) for target in TARGETS.values() for _ in LINKS)])
    for name, step in STEPS.items():
        cells = [percent(scaling(step, VOCAB, ranks, K, link)) for ranks in TARGETS for link in LINKS.values()]
        rows.append([step.name, *cells])
        if name == "heads":
            hidden = [
                percent(efficiency(seconds(step, VOCAB, 1, K, link), overlapped(step, VOCAB, ranks, K, link), ranks))
                for ranks in TARGETS
                for link in LINKS.values()
            ]
            rows.append(["the same, the hidden gradient reduced during the product for the head's", *hidden])
    published = [percent(PUBLISHED[ranks]) if link == "NVLink" else "" for ranks in TARGETS for link in LINKS]
    rows.append(["Liger, fused linear cross-entropy, as reported", *published])
    return table(rows)


def consists(arguments: str) -> str:
    """Microseconds of the parts of a step."""
    step, link = STEPS[arguments], LINKS["NVLink"]
    found = {ranks: _together(step, ranks, link) for ranks in RANKS}
    rows = aligned([f"{step.name}, µs", *(f"tp = {ranks}" for ranks in RANKS)])
    for what in dict.fromkeys(what for times in found.values() for what in times):
        rows.append([what, *(digits(1e6 * times[what]) if what in times else "" for times in found.values())])
    return table(rows)


def _together(step: Step, ranks: int, link: Link) -> dict[str, float]:
    sums: Counter[str] = Counter()
    for what, s in parts(step, VOCAB, ranks, K, link):
        sums[what] += s
    return {what: s for what, s in sums.items() if s}


def warps(_: str) -> str:
    """Microseconds of the selection from a narrow shard, and of that with the plan of wider rows."""
    rows = aligned(["selection, V = 151,936, K = 64, µs", *(f"tp = {ranks}" for ranks in narrow_ranks())])
    for name, kernel in (("four warps per row, as in the code", "select"), ("eight warps per row", WIDE_PLAN)):
        took = (1e3 * milliseconds(kernel, shard(VOCAB, ranks), K, ROWS) for ranks in narrow_ranks())
        rows.append([name, *map(digits, took)])
    return table(rows)


def chunks(_: str) -> str:
    rows = aligned(["tp, link", *(f"{n} chunk{'s' if n > 1 else ''}, ms" for n in (1, 2, 3, 4))])
    for ranks in (8, 16, 64):
        for name, link in LINKS.items():
            rows.append([f"{ranks}, {name}", *(ms(chunked(VOCAB, ranks, 256, link, n)) for n in (1, 2, 3, 4))])
    return table(rows)


def three_numbers(ranks: int) -> tuple[Collective, Collective]:
    """What would do instead of K logits, and the K logits."""
    three = Collective("all-gather", 12 * ranks, "three numbers of each rank")
    return three, ours("topk_reverse_kl with a Support", ranks, K)[1]


def three(_: str) -> str:
    head = ["tp", "three numbers, bytes", "K = 64 logits, bytes"]
    rows = aligned([*head, *(f"{what}, {name}, µs" for name in LINKS for what in ("three", "K"))], texts=0)
    for ranks in RANKS[1:]:
        both = three_numbers(ranks)
        sent = [digits(c.sent(ranks, ROWS) / ROWS) for c in both]
        took = [digits(1e6 * link.seconds(c, ranks)) for link in LINKS.values() for c in both]
        rows.append([str(ranks), *sent, *took])
    return table(rows)


NONE = "Nothing has been measured yet.\n"


def measured() -> list[Line]:
    file = FOLDER / "scaling.jsonl"
    return load(file) if file.exists() else []


def check(_: str) -> str:
    """Every call: what was measured apart, what that predicts, and what was measured."""
    calls = [line for line in measured() if line["name"] == "call"]
    if not calls:
        return NONE
    head = ["call", "ranks", "without collectives, ms", "collectives, ms", "predicted, ms", "measured, ms", "error"]
    rows = aligned(head)
    for line in calls:
        sizes = f"N = {line['n']:,}, V = {line['v']:,}, K = {line['k']}" + (f", H = {line['h']:,}" if line["h"] else "")
        name = {entry: name for name, (entry, _) in reversed(CALLS.items())}[line["entry"]]
        collectives = line["predicted_ms"] - line["local_ms"]
        cells = [digits(x) for x in (line["local_ms"], collectives, line["predicted_ms"], line["median_ms"])]
        rows.append([f"{name}, {sizes}", str(line["ranks"]), *cells, error(line)])
    last = calls[-1]
    where = f"{last['device'].rpartition(',')[0]}, torch {last['torch']}, commit {last['commit'][:9]}, {last['date']}"
    said = f"Each process has one thread. Medians of {last['rounds']} rounds are shown."
    return f"{table(rows)}\n{where}. {said} {errors(calls)}\n"


def errors(calls: list[Line]) -> str:
    sizes = [abs(line["predicted_ms"] / line["median_ms"] - 1) for line in calls if line["ranks"] > 1]
    return f"Half of the errors are within {percent(statistics.median(sizes))}, the largest is {percent(max(sizes))}."


def error(line: Line) -> str:
    """Of the prediction; a rank alone has no collective to predict."""
    relative = round(100 * (line["predicted_ms"] / line["median_ms"] - 1))
    return "" if line["ranks"] == 1 else f"{relative:+d} %" if relative else "0 %"


def gloo_links(_: str) -> str:
    found = [line for line in measured() if line["name"] == "collective"]
    if not found:
        return NONE
    rows = aligned(["collective", "ranks", "latency, µs", "bandwidth, GB/s"])
    for line in found:
        pace = digits(1e-9 / line["seconds_per_byte"]) if line["seconds_per_byte"] else ""
        rows.append([line["kind"], str(line["ranks"]), digits(1e6 * line["latency_s"]), pace])
    return table(rows)


TABLES: dict[str, Callable[[str], str]] = {
    "bytes": sent_bytes, "designs": design_table, "links": links, "times": times, "summary": summary,
    "parts": consists, "warps": warps, "spread": spread, "chunks": chunks, "three": three,
    "check": check, "gloo": gloo_links,
}  # fmt: skip


def written(arguments: str) -> str:
    name, _, rest = arguments.partition(" ")
    return TABLES[name](rest)

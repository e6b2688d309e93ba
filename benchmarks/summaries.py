"""Results read back: several runs of a case are one contest, and each contestant has a name for people."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.records import FOLDER, Line, load

WORKS = {
    "select": "`teacher_topk`",
    "loss": "`topk_reverse_kl`",
    "loss on ids": "`topk_reverse_kl` with a `Support`",
    "linear": "`linear_topk_reverse_kl`",
}
GRADIENTS = {
    "hidden alone": "frozen head",
    "sparse head": "row-sparse gradient of the head",
    "dense head": "dense gradient of the head",
}
NAMES = {
    "topk_rkl": "this package",
    "topk_rkl, overwriting": "this package with `overwrite_student_logits`",
    "topk_rkl, CUDA C++": "this package in CUDA C++",
    "topk_rkl, teacher from its hidden states": "this package with `linear_teacher_topk`",
    "plain": "plain PyTorch",
    "plain in float32": "plain PyTorch, all in float32",
    "gathered": "`head[ids]` and `bmm`",
    "gathered in chunks": "`head[ids]` and `bmm`, in chunks",
    "floor": "only moving the bytes",
}
STARS = {"reverse KL of the whole vocabulary": "*", "top-K forward KL, not renormalised": "†"}
NOTES = {
    "*": "reverse KL of the whole vocabulary, whose time includes the teacher's logits",
    "†": "forward KL, not renormalised",
    "‡": "makes the gradient of the frozen head too",
}
PYTORCH_ALONE = ("plain", "plain in float32", "torch.compile", "gathered", "gathered in chunks")
# They make the head's gradient, frozen or not.
FROZEN_ALL_THE_SAME = ("axolotl", "axolotl, compiled", "Liger", "Liger, compiled")
SIZES = ("n", "v", "h", "k", "dtype")

Contest = dict[str, list[Line]]  # the lines of each contestant


class Bar(NamedTuple):
    """A bar of the README's picture."""

    contestant: str
    name: str
    value: float
    text: str


def contests(suite: str, names: Iterable[str]) -> list[tuple[Line, Contest]]:
    """Each case of those names, as the fields that its lines share, and its contestants."""
    fields = ("name", "work", *SIZES, "gradients", "rows", "axis")
    found: dict[tuple[Any, ...], Contest] = defaultdict(lambda: defaultdict(list))
    file = FOLDER / f"{suite}.jsonl"
    for line in load(file) if file.exists() else []:
        if line["name"] in names:
            found[tuple(line.get(field) for field in fields)][line["contestant"]].append(line)
    return [(dict(zip(fields, key, strict=True)), contest) for key, contest in found.items()]


def digits(x: float) -> str:
    """Three of them."""
    return f"{float(f'{x:.3g}'):,g}"


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the second row says how the columns are aligned."""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def median_of(lines: list[Line], field: str) -> float:
    """The median over the runs that have the field. Runs without it had no time."""
    return statistics.median(line[field] for line in lines if field in line)


def gap(lines: list[Line]) -> str | None:
    """Why there is no time: the contestant was missing or refused when it was last tried."""
    return next((f"{why}: {lines[-1][why]}" for why in ("missing", "refused") if why in lines[-1]), None)


def label(case: Line) -> str:
    rows = case["rows"].replace("_", " ")
    return ", ".join(
        [WORKS[case["work"]]]
        + ([GRADIENTS[case["gradients"]]] if case["gradients"] else [])
        + ([f"{rows} rows"] if rows != "random" else [])
    )


def marked(name: str, lines: list[Line]) -> str:
    """The contestant's name with the marks of another objective, and of a head's gradient that nobody asked for."""
    marks = STARS.get(lines[0].get("objective", ""), "")
    if lines[0].get("gradients") == "hidden alone" and name in FROZEN_ALL_THE_SAME:
        marks += "‡"
    return NAMES.get(name, name) + marks


def sizes(case: Line) -> str:
    numbers = ", ".join(f"{size.upper()} = {case[size]:,}" for size in SIZES[:-1] if case[size])
    return f"{numbers}, {case['dtype']}"


def picture(suite: str) -> dict[str, tuple[Line, list[Bar]]]:
    """The bars of both panels, "time" and "memory", of the loss from hidden states with a frozen head."""
    found = [
        next(pair for pair in contests(suite, [name]) if pair[0]["gradients"] == "hidden alone")
        for name in ("linear", "linear memory")
    ]
    times, peaks = (
        sorted(bars(contest, field), key=lambda bar: bar.value)
        for (_, contest), field in zip(found, ("median_ms", "peak_bytes"), strict=True)
    )
    return {"time": (found[0][0], times), "memory": (found[1][0], peaks)}


def bars(contest: Contest, field: str) -> list[Bar]:
    """The fastest form of each project, without the floor."""
    timed = {name: lines for name, lines in contest.items() if name != "floor" and not gap(lines)}
    fastest: dict[str, str] = {}
    for name in sorted(timed, key=lambda name: median_of(timed[name], "median_ms")):
        fastest.setdefault(name.removesuffix(", compiled"), name)
    return [bar(name, timed[name], field) for name in fastest.values()]


def bar(name: str, lines: list[Line], field: str) -> Bar:
    time = f"{digits(median_of(lines, 'median_ms'))} ms"
    if field == "median_ms":
        return Bar(name, marked(name, lines).replace("`", ""), median_of(lines, field), time)
    mebibytes = median_of(lines, field) / 2**20
    return Bar(name, marked(name, lines).replace("`", ""), mebibytes, f"{digits(mebibytes)} MiB in {time}")

"""Results read back: the lines of several runs of a case are one entry, with a name for people."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

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
    "topk_rkl, overwriting": "ours with `overwrite_student_logits`",
    "topk_rkl, CUDA C++": "ours in CUDA C++",
    "topk_rkl, teacher from its hidden states": "ours with `linear_teacher_topk`",
    "plain": "plain PyTorch",
    "plain in float32": "plain PyTorch, all in float32",
    "gathered": "`head[ids]` and `bmm` in PyTorch",
    "gathered in chunks": "the same 32 positions at a time",
    "floor": "only moving the bytes",
}
STARS = {"reverse KL of the whole vocabulary": "*", "top-K forward KL, not renormalised": "†"}
# They make the head's gradient, frozen or not.
FROZEN_ALL_THE_SAME = ("axolotl", "axolotl, compiled", "Liger", "Liger, compiled")
SIZES = ("n", "v", "h", "k", "dtype")

Contest = dict[str, list[Line]]  # the lines of each contestant


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
    """In Markdown; the second row says how the columns are aligned."""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def middle(lines: list[Line], field: str) -> float:
    """Of the runs that have the field: the others had no time."""
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

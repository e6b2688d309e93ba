"""`python -m benchmarks.report [README.md]`: the tables of the committed results, printed or put into a file.

A mark is a pair of comments, <!-- results/NAME --> and <!-- end -->, around the table of results/NAME.jsonl. Lines of
several runs of a contest are one entry: the median of their medians, and of their ratios.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
WORKS = {
    "select": "`teacher_topk`",
    "worst cases": "`teacher_topk` of other rows than random ones",
    "loss and gradient": "`topk_reverse_kl`, forward and backward",
    "loss and gradient, ids given": "`topk_reverse_kl` with a `Support`, forward and backward",
    "loss and gradients": "`linear_topk_reverse_kl`, forward and backward",
}
GRADIENTS = {
    "hidden alone": "frozen head",
    "sparse head": "row-sparse gradient of the head",
    "dense head": "dense gradient of the head",
}
NAMES = {
    "plain": "plain PyTorch",
    "read_rate": "a plain read of as many bytes",
    "floor": "fresh memory filled with zeros",
    "gathered": "`head[ids]` and `bmm` in PyTorch",
    "gathered in chunks": "the same 32 positions at a time",
    "topk_rkl, overwriting": "ours with `overwrite_student_logits`",
    "two_valued": "of two values",
    "all_equal": "all equal",
}
SIZES = ("n", "v", "h", "k", "dtype")
MARK = re.compile(r"(<!-- results/(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def digits(x: float) -> str:
    """Three of them."""
    return f"{float(f'{x:.3g}'):,g}"


def entry(lines: list[dict[str, Any]]) -> str:
    """A contestant: its time, how many times ours that is, and its memory; a star where the objective is another."""
    name = lines[0]["contestant"]
    time, ratio = (statistics.median(line[field] for line in lines) for field in ("median_ms", "over_topk_rkl"))
    text = f"{digits(time)} ms"
    if name != "topk_rkl":
        star = "*" if lines[0].get("objective") == "full vocabulary" else ""
        text = f"{NAMES.get(name, name)}{star} {text} ({ratio:.{1 if ratio >= 1 else 2}f})"
    if "peak_bytes" in lines[0]:
        text += f", {digits(lines[0]['peak_bytes'] / 2**20)} MiB"
    return text


def table(name: str) -> str:
    lines = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    contests: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["work"] in WORKS:
            sizes = tuple(line.get(size) for size in SIZES)
            contests[(line["work"], line.get("gradients"), *sizes)][line["contestant"]].append(line)
    used = [i for i in range(len(SIZES)) if any(contest[2 + i] for contest in contests)]
    rows = [
        ["work", *(SIZES[i] if SIZES[i] == "dtype" else SIZES[i].upper() for i in used), "this package", "beside it"]
    ]
    rows.append(["---", *("---:" for _ in used), "---:", "---"])
    for (work, gradients, *sizes), found in contests.items():
        label = WORKS[work] + (f", {GRADIENTS[gradients]}" if gradients else "")
        shown = (f"{sizes[i]:,}" if isinstance(sizes[i], int) else sizes[i] for i in used)
        others = [entry(contestant) for name, contestant in found.items() if name != "topk_rkl"]
        rows.append([label, *shown, entry(found["topk_rkl"]), "; ".join(others)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def filled(text: str) -> str:
    """The text with every marked table as the results have it."""
    return MARK.sub(lambda mark: mark[1] + table(mark[2]) + mark[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="the file whose tables are written anew")
    options = parser.parse_args()
    if options.file:
        options.file.write_text(filled(options.file.read_text()))
    else:
        print("\n".join(table(path.stem) for path in sorted(RESULTS.glob("*.jsonl"))))


if __name__ == "__main__":
    main()

"""Tables and plots from the committed results.

In Markdown, a mark is a pair of comments around what is written anew, <!-- KIND ARGUMENTS --> and <!-- end -->:

    cases SUITE: NAME, NAME     this package beside the others, a row for a case
    exponents SUITE             how time grows with each size
    compiled                    what the kernels of K = 64 cost once compiled, and what a model makes of it
    demo                        the table of examples/distill.py
    gpu targets                 what was measured on a GPU beside what is aimed at
    gpu items, gpu decisions    every timed item, and the constants that they decide

Lines of several runs of a case are one entry: the median of their medians and of their ratios.
"""

import json
import re
import statistics
from argparse import Namespace
from collections.abc import Callable

from benchmarks import predict
from benchmarks.fit import exponents
from benchmarks.gpu_report import gpu
from benchmarks.records import FOLDER, Line, load
from benchmarks.summaries import (
    FROZEN_ALL_THE_SAME,
    NAMES,
    SIZES,
    STARS,
    WORKS,
    Contest,
    contests,
    digits,
    gap,
    label,
    middle,
    table,
)

MARK = re.compile(r"(<!-- (cases|exponents|compiled|demo|gpu)(?: ([^\n]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def entry(name: str, lines: list[Line]) -> str:
    """A rival: its time, how many times ours that is, and its memory, with marks that the README explains."""
    label = NAMES.get(name, name)
    if reason := gap(lines):
        return f"{label} {reason.partition(':')[0]}"
    marks = STARS.get(lines[0].get("objective", ""), "")
    if lines[0].get("gradients") == "hidden alone" and name in FROZEN_ALL_THE_SAME:
        marks += "‡"
    text = f"{label}{marks} {digits(middle(lines, 'median_ms'))} ms"
    if "over_topk_rkl" in lines[-1]:
        ratio = middle(lines, "over_topk_rkl")
        text += f" ({ratio:.{1 if ratio >= 1 else 2}f})"
    return text + mebibytes(lines)


def mebibytes(lines: list[Line]) -> str:
    measured = [line for line in lines if "peak_bytes" in line]
    return f", {digits(middle(measured, 'peak_bytes') / 2**20)} MiB" if measured else ""


def cases(arguments: str) -> str:
    suite, names = re.fullmatch(r"(\w+): (.*)", arguments).groups()
    found = contests(suite, names.split(", "))
    used = [size for size in SIZES if any(case[size] for case, _ in found)]
    rows = [["work", *(s if s == "dtype" else s.upper() for s in used), "this package", "of the floor", "beside it"]]
    rows.append(["---", *("---:" for _ in used), "---:", "---:", "---"])
    for case, contest in found:
        ours = contest["topk_rkl"]
        hidden = {"topk_rkl", "floor", *slower_plain(contest)}
        rivals = [entry(name, lines) for name, lines in contest.items() if name not in hidden]
        shown = (f"{case[size]:,}" if isinstance(case[size], int) else case[size] or "" for size in used)
        time, share = "refused", ""
        if not gap(ours):
            time = f"{digits(middle(ours, 'median_ms'))} ms{mebibytes(ours)}"
            share = f"{1 / middle(ours, 'over_floor'):.2f}"
        rows.append([label(case), *shown, time, share, "; ".join(rivals)])
    return table(rows)


def slower_plain(contest: Contest) -> list[str]:
    """Of the plain forms all but the fastest."""
    timed = {name: lines for name, lines in contest.items() if name.startswith("plain") and not gap(lines)}
    return sorted(timed, key=lambda name: middle(timed[name], "median_ms"))[1:]


def growth(suite: str) -> str:
    """A row for each work and contestant, a column for each size that was varied."""
    axes = ["n", "v", "k", "h"]
    fitted = exponents(contests(suite, ["scaling"]))
    rows = [["time grows as", *(axis.upper() for axis in axes)], ["---", *("---:" for _ in axes)]]
    for work, name in dict.fromkeys((work, name) for work, name, _ in fitted):
        powers = [fitted.get((work, name, axis)) for axis in axes]
        cells = [
            "" if power is None else f"{axis.upper()}^{power:.2f}" for axis, power in zip(axes, powers, strict=True)
        ]
        rows.append([f"{WORKS[work]}, {NAMES.get(name, name)}", *cells])
    return table(rows)


def compiled(_: str) -> str:
    """Of sm_90, and sm_100 for B200. A share is of the bandwidth that a plain read reaches on the card."""
    costs = json.loads((FOLDER / "compiled_cost.json").read_text())
    shown = [
        c for c in costs if c["target"] == "sm_90" and c["k"] == 64 and c["dtype"] != "float16" and c["vocab"] % 16 == 0
    ]
    others = {(c["kernel"], c["dtype"], c["vocab"], c["k"], c["width"]): c for c in costs if c["target"] == "sm_100"}
    rows = [
        [
            "kernel",
            "dtype",
            "registers",
            "spills",
            "shared",
            "programs a core",
            "instructions an element",
            "widest load",
        ]
        + [f"{card}, predicted" for card in predict.CARDS]
        + ["measured"]
    ]
    rows.append(["---", "---", *("---:" for _ in rows[0][2:])])
    for cost in shown:
        twin = others[(cost["kernel"], cost["dtype"], cost["vocab"], cost["k"], cost["width"])]
        shares = [predict.share(cost, card) or predict.share(twin, card) for card in predict.CARDS.values()]
        widest = max((loop["load_bits"] for loop in cost["loops"]), default=0)
        rows.append(
            [f"`{cost['kernel']}`", cost["dtype"], str(cost["registers"]), str(cost["spills"])]
            + [f"{cost['shared_bytes']:,}", str(cost["programs"])]
            + ["" if cost["scan_per_element"] is None else f"{cost['scan_per_element']:.1f}"]
            + [f"{widest} bit" if widest else ""]
            + ["" if share is None else f"{share:.2f}" for share in shares]
            + [measured_share(cost)]
        )
    for cost in json.loads((FOLDER / "cuda_cost.json").read_text()):
        if cost["target"] == "sm_90a" and cost["variant"] in ("packed", "") and cost["load_bits"] == 128:
            scan = "" if cost["scan_per_element"] is None else f"{cost['scan_per_element']:.1f}"
            name, used = f"`{cost['kernel']}` in CUDA C++", [str(cost["registers"]), str(cost["spills"])]
            rows.append([name, cost["dtype"], *used, "", "", scan, "128 bit", "", "", "", "not measured"])
    return table(rows)


def measured_share(cost: Line) -> str:
    work = {"select": "select", "select_loss": "loss", "linear_loss": "linear"}.get(cost["kernel"])
    for case, contest in contests("gpu", ["select", "loss", "linear"]):
        sizes = (case["work"], case["v"], case["k"], case["dtype"])
        if sizes == (work, cost["vocab"], cost["k"], cost["dtype"]) and not gap(contest["topk_rkl"]):
            shares = [
                contest["floor"][i]["forward_ms"] / line["forward_ms"] for i, line in enumerate(contest["topk_rkl"])
            ]
            return f"{statistics.median(shares):.2f}, {contest['topk_rkl'][0]['device']}"
    return "not measured" if work else ""


def demo(_: str) -> str:
    found = json.loads((FOLDER / "demo.json").read_text())
    rows = [["student, held-back prompts", *found["metrics"].values()], ["---", *("---:" for _ in found["metrics"])]]
    for name, scores in found["held_back"].items():
        rows.append([found["rows"][name], *(f"{scores[metric]:.3f}" for metric in found["metrics"])])
    size, seconds = found["peak_bytes"] / 1e9, found["seconds"]
    took = f"{found['options']['steps']} steps of {found['options']['batch']} answers each, twice: {seconds:.0f} s and"
    return table(rows) + f"\n{took} {size:.1f} GB on {found['cores']} shared CPU cores, torch {found['torch']}.\n"


KINDS: dict[str, Callable[[str], str]] = {
    "cases": cases, "exponents": growth, "compiled": compiled, "demo": demo, "gpu": gpu,
}  # fmt: skip


def filled(text: str) -> str:
    """The text with every mark's content as the results have it."""
    return MARK.sub(lambda mark: mark[1] + KINDS[mark[2]](mark[3]) + mark[4], text)


def whole(suite: str) -> str:
    """Every case with every contestant: passes, spread, floor, memory, error; and why one is missing or refused."""
    head = ["contestant", "objective", "forward ms", "backward ms", "both ms", "quartiles", "over ours", "over floor"]
    head += ["peak MiB", "kept MiB", "error"]
    text = ""
    names = dict.fromkeys(line["name"] for line in load(FOLDER / f"{suite}.jsonl"))
    for case, contest in contests(suite, names):
        if case["axis"]:
            continue
        sizes = ", ".join(f"{size.upper()} = {case[size]:,}" for size in SIZES[:-1] if case[size])
        text += f"\n### {label(case)}: {sizes}, {case['dtype']}\n\n"
        rows = [head, ["---", "---", *("---:" for _ in head[2:])]]
        for name, lines in contest.items():
            reason = gap(lines)
            cells = [reason] + [""] * (len(head) - 2) if reason else figures([x for x in lines if "median_ms" in x])
            rows.append([NAMES.get(name, name), *cells])
        text += table(rows)
    return text


def figures(lines: list[Line]) -> list[str]:
    quartiles = [digits(statistics.median(line["quartiles_ms"][i] for line in lines)) for i in (0, 1)]
    sizes = [
        digits(middle(lines, field) / 2**20) if field in lines[0] else "" for field in ("peak_bytes", "retained_bytes")
    ]
    return [
        lines[0].get("objective", ""),
        *(digits(middle(lines, field)) for field in ("forward_ms", "backward_ms", "median_ms")),
        " to ".join(quartiles),
        *(digits(middle(lines, field)) if field in lines[0] else "" for field in ("over_topk_rkl", "over_floor")),
        *sizes,
        f"{lines[0]['error']:.0e}" if "error" in lines[0] else "",
    ]


def report(options: Namespace) -> None:
    """Writes results/README.md and the plots anew, and the marked parts of the files named."""
    (FOLDER / "README.md").write_text(page())
    for file in options.files:
        file.write_text(filled(file.read_text()))
    from benchmarks import plots  # which needs matplotlib; tables are written without it

    for suite in suites():
        plots.draw(suite)


def page() -> str:
    """The text of results/README.md."""
    text = "# Every contestant of every case\n\nWritten by `python -m benchmarks report`.\n"
    for suite in suites():
        lines = load(FOLDER / f"{suite}.jsonl")
        text += f"\n## {suite.upper()}: {lines[-1]['device']}, torch {lines[-1]['torch']}\n{whole(suite)}"
    return f"{text}\n## Timed items on a GPU\n\n{gpu('items')}\n## What they decide\n\n{gpu('decisions')}"


def suites() -> list[str]:
    return [suite for suite in ("cpu", "gpu") if (FOLDER / f"{suite}.jsonl").exists()]

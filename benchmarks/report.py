"""Tables and plots from the committed results.

A mark is a pair of Markdown comments, <!-- KIND ARGUMENTS --> and <!-- end -->. The text between them is written anew:

    picture SUITE               what the README's picture shows, in words
    cases SUITE: NAME, NAME     this package beside the others, a row per case
    exponents SUITE             how time grows with each size
    compiled                    what the kernels of K = 64 cost once compiled, and what a model predicts from it
    held N V H K                bytes that the loss head holds, by arithmetic
    demo scores, demo answers   the tables of examples/distill.py
    gpu targets                 what was measured on a GPU beside what is aimed at
    gpu items, gpu decisions    every timed item, and the constants that the items decide
    scaling NAME                a table of scaling/tables.py: the model of ranks that share a vocabulary
    used                        what ran in real trainers
    paper claims                what became of each claim that a study of examples/paper measured
    stores NAME                 a table of docs/stores.md, from `python -m benchmarks.store`
    paper NAME TITLE            a table of that study; `ran` for its seeds and its time

Several runs of a case are one contest: the median of their medians and of their ratios is printed.
"""

import json
import re
import statistics
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from benchmarks import phases, predict, store
from benchmarks.fit import exponents
from benchmarks.gpu_report import gpu, item_lines
from benchmarks.records import FOLDER, Line, load
from benchmarks.scaling import tables as scaling
from benchmarks.summaries import (
    NAMES,
    SIZES,
    WORKS,
    Contest,
    contests,
    digits,
    gap,
    label,
    marked,
    median_of,
    picture,
    sizes,
    table,
)
from benchmarks.trainers import used
from examples.paper import study, summary

ROOT = Path(__file__).parent.parent
FILES = tuple(
    ROOT / name
    for name in (
        "README.md",
        "docs/benchmarks.md",
        "docs/compiled.md",
        "docs/paper.md",
        "docs/scaling.md",
        "docs/stores.md",
        "docs/integrations/README.md",
        "examples/README.md",
    )
)
UNPUBLISHED = "tiny"  # the case that checks the harness
MARK = re.compile(
    r"(<!-- (picture|cases|held|exponents|compiled|demo|gpu|scaling|stores|used|paper)(?: ([^\n]*?))? -->\n)"
    r".*?(<!-- end -->)",
    re.DOTALL,
)


def rival(name: str, lines: list[Line]) -> str:
    """Its time, that time over ours, and its memory, with marks that docs/benchmarks.md explains."""
    if reason := gap(lines):
        return f"{NAMES.get(name, name)} {reason.partition(':')[0]}"
    text = f"{marked(name, lines)} {digits(median_of(lines, 'median_ms'))} ms"
    if "over_topk_rkl" in lines[-1]:
        ratio = median_of(lines, "over_topk_rkl")
        text += f" ({ratio:.{1 if ratio >= 1 else 2}f})"
    return text + mebibytes(lines)


def mebibytes(lines: list[Line]) -> str:
    measured = [line for line in lines if "peak_bytes" in line]
    return f", {digits(median_of(measured, 'peak_bytes') / 2**20)} MiB" if measured else ""


def shown(suite: str) -> str:
    """The picture in words: its sizes, its setting, and who is in it."""
    panels = picture(suite)
    line = load(FOLDER / f"{suite}.jsonl")[-1]
    said = " ".join(f"{name.capitalize()}: {sizes(case)}." for name, (case, _) in panels.items())
    where = f"{line['device']}, torch {line['torch']}, commit {line['commit'][:9]}"
    return f"Forward and backward pass with a frozen head. {said} {where}.\n"


def cases(arguments: str) -> str:
    suite, names = re.fullmatch(r"(\w+): (.*)", arguments).groups()
    found = contests(suite, names.split(", "))
    used = [size for size in SIZES if any(case[size] for case, _ in found)]
    rows = [["work", *(s if s == "dtype" else s.upper() for s in used), "this package", "of the floor", "beside it"]]
    rows.append(["---", *("---:" for _ in used), "---:", "---:", "---"])
    for case, contest in found:
        ours = contest["topk_rkl"]
        hidden = {"topk_rkl", "floor", *slower_plain(contest)}
        rivals = [rival(name, lines) for name, lines in contest.items() if name not in hidden]
        columns = (f"{case[size]:,}" if isinstance(case[size], int) else case[size] or "" for size in used)
        time, share = "refused", ""
        if not gap(ours):
            time = f"{digits(median_of(ours, 'median_ms'))} ms{mebibytes(ours)}"
            share = f"{1 / median_of(ours, 'over_floor'):.2f}"
        rows.append([label(case), *columns, time, share, "; ".join(rivals)])
    return table(rows)


def slower_plain(contest: Contest) -> list[str]:
    """All plain forms but the fastest."""
    timed = {name: lines for name, lines in contest.items() if name.startswith("plain") and not gap(lines)}
    return sorted(timed, key=lambda name: median_of(timed[name], "median_ms"))[1:]


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
    """The table of sm_90, with B200 of sm_100. A share is of the bandwidth that a plain read reaches on the card."""
    costs = json.loads((FOLDER / "compiled_cost.json").read_text())
    shown = [
        c
        for c in costs
        if c["target"] == "sm_90" and c["k"] == 64 and c["dtype"] != "float16" and c["vocab"] == 151_936
    ]
    others = {(c["kernel"], c["dtype"], c["vocab"], c["k"], c["width"]): c for c in costs if c["target"] == "sm_100"}
    rows = [
        [
            "kernel",
            "dtype",
            "registers",
            "spills",
            "shared",
            "programs per core",
            "instructions per element",
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
            + [measured_share(*(cost[size] for size in ("kernel", "dtype", "vocab", "k", "width")))]
        )
    for cost in json.loads((FOLDER / "cuda_cost.json").read_text()):
        if cost["target"] == "sm_90a" and cost["variant"] in ("packed", "") and cost["load_bits"] == 128:
            scan = "" if cost["scan_per_element"] is None else f"{cost['scan_per_element']:.1f}"
            name, used = f"`{cost['kernel']}` in CUDA C++", [str(cost["registers"]), str(cost["spills"])]
            kernel = cost["kernel"].removesuffix("_kernel")
            share = measured_share(kernel, cost["dtype"], 151_936, 64, 4096 if kernel == "linear_loss" else 0, "cuda")
            rows.append([name, cost["dtype"], *used, "", "", scan, "128 bit", "", "", "", share])
    return table(rows)


def measured_share(kernel: str, dtype: str, vocab: int, k: int, width: int, form: str = "triton") -> str:
    """The share of each device that has one: "0.92, NVIDIA H200; 0.90, NVIDIA H100 80GB HBM3"."""
    found: dict[str, str] = {}
    for line in item_lines():
        sizes = (line.get("kernel"), line.get("dtype"), line.get("v"), line.get("k"), line.get("h", 0), line["form"])
        if sizes == (kernel, dtype, vocab, k, width, form) and "share" in line:
            found.setdefault(line["device"], f"{line['share']:.2f}, {line['device']}")
    return "; ".join(found.values()) or ("not measured" if kernel in phases.KERNELS else "")


def held(arguments: str) -> str:
    """The bytes of bfloat16 logits, hidden states and head, beside plain PyTorch that gathers before it casts."""
    n, v, h, k = map(int, arguments.split())
    logits, states, wide_states, head = (f"{x / 1e9:.2f} GB" for x in (2 * n * v, 2 * n * h, 4 * n * h, 2 * v * h))
    rows = [
        ["what", "plain PyTorch", "`topk_reverse_kl`", "`linear_topk_reverse_kl`"],
        ["---", "---:", "---:", "---:"],
        ["the student's logits", logits, logits, "none"],
        [f"kept for the backward pass, {n * k:,} numbers each", "ids, logits, log p, log q", "ids, g", "ids, g"],
        ["gradient of the logits", logits, f"{logits}, or the logits' own memory", "none"],
        ["gradient of the hidden states", states, states, f"{states}, and {wide_states} in float32"],
        ["gradient of the head, if it is trained", head, head, f"{head}, or only the rows that occur"],
    ]
    return table(rows)


def demo(arguments: str) -> str:
    found = json.loads((FOLDER / "demo.json").read_text())
    if arguments == "answers":
        answers = [[found["rows"][name], text] for name, text in found["answers"].items()]
        return table([["model", "answer"], ["---", "---"], *answers])
    rows = [["student, held-back prompts", *found["metrics"].values()], ["---", *("---:" for _ in found["metrics"])]]
    for name, scores in found["held_back"].items():
        rows.append([found["rows"][name], *(f"{scores[metric]:.3f}" for metric in found["metrics"])])
    size, seconds = found["peak_bytes"] / 1e9, found["seconds"]
    ran = f"Each objective ran {found['options']['steps']} steps of {found['options']['batch']} answers."
    took = (
        f"Both took {seconds:.0f} s and {size:.1f} GB on {found['cores']} shared CPU cores with torch {found['torch']}."
    )
    return f"{table(rows)}\n{ran} {took}\n"


def paper(arguments: str) -> str:
    if arguments == "claims":
        every = [claim for name in study.NAMES for claim in study.study(name).claims(study.load(name))]
        held, failed, unseen = (sum(claim.held is x for claim in every) for x in (True, False, None))
        counted = f"{held} of {len(every)} claims held, {failed} did not hold, and {unseen} were not shown."
        return f"{counted}\n\n{summary.markdown(study.verdicts(every))}"
    name, title = arguments.split(" ", 1)
    record = study.load(name)
    return study.ran(record) if title == "ran" else summary.markdown(study.study(name).tables(record)[title])


KINDS: dict[str, Callable[[str], str]] = {
    "picture": shown, "cases": cases, "exponents": growth, "compiled": compiled, "held": held, "demo": demo,
    "gpu": gpu, "scaling": scaling.written, "used": used, "paper": paper,
    "stores": store.told,
}  # fmt: skip


def filled(text: str) -> str:
    """The text with every mark's content as the results have it."""
    return MARK.sub(lambda mark: mark[1] + KINDS[mark[2]](mark[3]) + mark[4], text)


def whole(suite: str) -> str:
    """Every case with every contestant: passes, spread, floor, memory, error; and why one is missing or refused."""
    columns = [
        "contestant",
        "objective",
        "forward ms",
        "backward ms",
        "both ms",
        "quartiles",
        "over ours",
        "over floor",
    ]
    columns += ["peak MiB", "kept MiB", "error"]
    text = ""
    names = dict.fromkeys(line["name"] for line in load(FOLDER / f"{suite}.jsonl"))
    for case, contest in contests(suite, names):
        if case["axis"] or case["name"] == UNPUBLISHED:
            continue
        text += f"\n### {label(case)}: {sizes(case)}\n\n"
        rows = [columns, ["---", "---", *("---:" for _ in columns[2:])]]
        for name, lines in contest.items():
            reason = gap(lines)
            cells = [reason] + [""] * (len(columns) - 2) if reason else figures([x for x in lines if "median_ms" in x])
            rows.append([NAMES.get(name, name), *cells])
        text += table(rows)
    return text


def figures(lines: list[Line]) -> list[str]:
    quartiles = [digits(statistics.median(line["quartiles_ms"][i] for line in lines)) for i in (0, 1)]
    held = [
        digits(median_of(lines, field) / 2**20) if field in lines[0] else ""
        for field in ("peak_bytes", "retained_bytes")
    ]
    return [
        lines[0].get("objective", ""),
        *(digits(median_of(lines, field)) for field in ("forward_ms", "backward_ms", "median_ms")),
        " to ".join(quartiles),
        *(digits(median_of(lines, field)) if field in lines[0] else "" for field in ("over_topk_rkl", "over_floor")),
        *held,
        f"{lines[0]['error']:.0e}" if "error" in lines[0] else "",
    ]


def report(options: Namespace) -> None:
    """Writes anew the marked parts of the files; without files named, those of all, results/README.md and pictures."""
    for file in options.files or FILES:
        file.write_text(filled(file.read_text()))
    if options.files:
        return
    (FOLDER / "README.md").write_text(page())
    from benchmarks import plots  # which needs matplotlib; tables are written without it

    for suite in suites():
        plots.draw(suite)
    from benchmarks.scaling import picture

    picture.draw()


def page() -> str:
    """The text of results/README.md."""
    text = "# Every contestant of every case\n\nWritten by `python -m benchmarks report`.\n"
    for suite in suites():
        lines = load(FOLDER / f"{suite}.jsonl")
        text += f"\n## {suite.upper()}: {lines[-1]['device']}, torch {lines[-1]['torch']}\n{whole(suite)}"
    return f"{text}\n## Timed items on a GPU\n\n{gpu('items')}\n## What they decide\n\n{gpu('decisions')}"


def suites() -> list[str]:
    return [suite for suite in ("cpu", "gpu") if (FOLDER / f"{suite}.jsonl").exists()]

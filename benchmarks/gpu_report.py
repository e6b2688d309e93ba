"""Tables of what was measured on a GPU: the timed items, the decisions they make, and the targets.

The lines are those that gpu/items writes. A form is one way to do the work of an item: a backend, a rival, a constant
under trial. Forms of an item took turns; the first is what the code does today. Each device has a column, a table or
rows of its own.
"""

import json
import re
from collections import defaultdict
from typing import NamedTuple

from benchmarks.records import FOLDER, Line, load
from benchmarks.summaries import digits, table

Items = dict[str, list[Line]]  # the lines of each item, one per form

NONE = "No GPU has been measured yet.\n"
MARGIN = 0.03  # by which another form has to be faster than the first to win


class Target(NamedTuple):
    """One of three: a share of the floor, milliseconds, or how many times as long a rival takes."""

    work: str
    item: str
    share: float = 0
    ms: float = 0
    times: float = 0
    rival: str = ""


TARGETS = [
    Target("selection, K = 64", "select K 64", share=0.92),
    Target("selection, K = 256", "select K 256", share=0.85),
    Target("selection, K = 1,024", "select K 1,024", share=0.75),
    Target("selection and loss in one launch, K = 64", "select_loss K 64", share=0.90),
    Target("loss and dense gradient from both logits, K = 64", "loss and gradient K 64", share=0.90),
    Target("from hidden states, K = 32: forward with dhidden", "linear K 32, forward with dhidden", ms=1.7),
    Target("from hidden states, K = 32: with dhead too", "linear K 32, dhidden and dhead", ms=3),
    Target("the dense products beside that", "linear K 32, dhidden and dhead", times=20, rival="dense products"),
    Target("torch.topk beside the selection, K = 64", "select K 64", times=12, rival="torch.topk"),
]


def item_lines() -> list[Line]:
    file = FOLDER / "gpu_items.jsonl"
    return load(file) if file.exists() else []


def runs_of_tests() -> list[Line]:
    """One per device."""
    file = FOLDER / "gpu_tests.json"
    return json.loads(file.read_text()) if file.exists() else []


def by(field: str, lines: list[Line]) -> dict[str, list[Line]]:
    """The lines of each value of the field, values in the order of their first line."""
    found = defaultdict(list)
    for line in lines:
        found[line[field]].append(line)
    return dict(found)


def measured() -> dict[str, Items]:
    """The items of each device."""
    return {device: by("item", lines) for device, lines in by("device", item_lines()).items()}


def short(device: str) -> str:
    """The name without maker and memory: "H100" of "NVIDIA H100 80GB HBM3"."""
    return " ".join(word for word in device.split() if not re.fullmatch(r"NVIDIA|\d+GB|HBM\w+", word))


def gpu(arguments: str) -> str:
    """The content of a mark: its argument is targets, items or decisions."""
    found = measured()
    return {"targets": targets, "items": items, "decisions": decisions}[arguments](found) if found else NONE


def targets(found: dict[str, Items]) -> str:
    sizes = "N = 16,384, V = 151,936, H = 4,096, bfloat16"
    rows = [[sizes, "target", *map(short, found)], ["---", "---:", *("---:" for _ in found)]]
    for target in TARGETS:
        cells = (fastest(target, timed(of_it.get(target.item, []))) for of_it in found.values())
        rows.append([target.work, aim(target), *cells])
    return f"{table(rows)}\n{settings_and_tests(found)}"


def fastest(target: Target, lines: list[Line]) -> str:
    """What the fastest form of the target's item reached, and its name."""
    best = min(ours(lines), key=lambda line: line["median_ms"], default=None)
    value = best and reached(target, best, lines)
    return f"{value}, {best['form']}" if value else "not measured"


def aim(target: Target) -> str:
    if target.share:
        return f"{target.share:.2f} of the floor"
    return f"{target.ms:g} ms" if target.ms else f"{target.times:g} times"


def reached(target: Target, best: Line, lines: list[Line]) -> str | None:
    if target.share:
        return f"{best['share']:.3f} of {best['of']}" if "share" in best else None
    if target.ms:
        return f"{digits(best['median_ms'])} ms"
    rival = next((line for line in lines if line["form"] == target.rival), None)
    return rival and f"{rival['median_ms'] / best['median_ms']:.1f} times"


def items(found: dict[str, Items]) -> str:
    return "\n".join(f"**{short(device)}**\n\n{every_form(of_it)}\n{setting(of_it)}" for device, of_it in found.items())


def every_form(found: Items) -> str:
    columns = ["item", "form", "ms", "quartiles", "TB/s", "share", "of", "predicted", "measured / predicted"]
    rows = [columns, ["---", "---", *("---:" for _ in columns[2:6]), "---", "---:", "---:"]]
    for name, lines in found.items():
        rows += [[name, line.get("form", ""), *figures(line)] for line in lines]
    return table(rows)


def figures(line: Line) -> list[str]:
    if "median_ms" not in line:
        why = next(f"{kind}: {line[kind]}" for kind in ("missing", "error") if kind in line)
        return [why.splitlines()[0].replace("|", "/")[:120], *[""] * 6]
    share, predicted = line.get("share"), line.get("predicted_share")
    return [
        digits(line["median_ms"]),
        " to ".join(map(digits, line["quartiles_ms"])),
        f"{line['tb_s']:.2f}" if "tb_s" in line else "",
        "" if share is None else f"{share:.2f}",
        line.get("of", "host" if line.get("clock") == "host" else ""),
        "" if predicted is None else f"{predicted:.2f}",
        "" if share is None or predicted is None else f"{share / predicted:.2f}",
    ]


def decisions(found: dict[str, Items]) -> str:
    """Per decision what to change, then its items, the times of their forms over the first, and the winner."""
    text = ""
    contests = [(short(device), name, lines) for device, of_it in found.items() for name, lines in of_it.items()]
    named = {lines[-1]["decision"]: lines[-1]["if_it_wins"] for *_, lines in contests if "decision" in lines[-1]}
    for decision, what in named.items():
        rows = [["card", "item", "time over the first form", "winner"], ["---", "---", "---", "---"]]
        for card, name, lines in contests:
            if lines[-1].get("decision") == decision:
                forms = ours(timed(lines))
                over = ", ".join(f"{line['form']} {line['over_first']:.2f}" for line in forms)
                rows.append([card, name, over, winner(forms)])
        text += f"**{decision.capitalize()}.** Where another form than the first wins: {what}\n\n{table(rows)}\n"
    return text + "\n".join(map(setting, found.values()))


def winner(lines: list[Line]) -> str:
    """The first form, unless another is faster by more than MARGIN."""
    if len(lines) < 2:
        return "nothing to compare"
    best = min(lines, key=lambda line: line["over_first"])
    return best["form"] if best["over_first"] < (1 - MARGIN) * lines[0]["over_first"] else lines[0]["form"]


def timed(lines: list[Line]) -> list[Line]:
    return [line for line in lines if "median_ms" in line]


def ours(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line["backend"] != "torch"]


def settings_and_tests(found: dict[str, Items]) -> str:
    """A paragraph per device."""
    settings = {device: setting(of_it) for device, of_it in found.items()}
    tests = {record["device"]: outcomes(record) for record in runs_of_tests()}
    return "\n".join(settings.get(device, "") + tests.get(device, "") for device in settings | tests)


def setting(found: Items) -> str:
    """Device, driver, versions and commits, each as often as it differs."""
    lines = [line for lines in found.values() for line in lines]
    cards = dict.fromkeys(
        f"{line['device']}, driver {line['driver']}, CUDA {line['cuda']}, torch {line['torch']}, "
        f"Triton {line['triton']}, commit {line['commit'][:9]}, {line['date']}"
        for line in lines
    )
    return "; ".join(cards) + ".\n"


def outcomes(record: Line) -> str:
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in record["outcomes"].items())
    return f"Tests on {record['device']}, commit {record['commit'][:9]}: {counts}.\n"

"""`python -m benchmarks collect FOLDER`: what the GPU kit wrote, as committed results.

    items.jsonl                 -> gpu_items.jsonl   the timed items
    suite.jsonl                 -> gpu.jsonl         the suite of benchmarks/cases.py
    tests.jsonl, steps.jsonl    -> gpu_tests.json    tests by outcome, with the last line of each failure

A file that is not in the folder leaves its result as it was. Timed items and tests replace those of the same device,
and cases of the suite those of the same name; all others stay, in the order in which they first came. One line of no
clean commit, or of no GPU, and nothing is written: a figure of code that nobody can check out again is no result.
"""

import json
from argparse import Namespace
from collections import Counter
from pathlib import Path

from benchmarks.gpu_report import by, item_lines, runs_of_tests
from benchmarks.records import FOLDER, Line, is_clean, load

FAILED = ("failed", "error")


def collect(options: Namespace) -> None:
    folder: Path = options.folder
    there = [name for name in ("items.jsonl", "suite.jsonl", "tests.jsonl") if (folder / name).exists()]
    if not there:
        raise FileNotFoundError(f"{folder} has no items.jsonl, suite.jsonl or tests.jsonl; name the kit's OUT folder")
    found = {}
    if "items.jsonl" in there:
        lines = [line for line in load(folder / "items.jsonl") if "begun" not in line]
        found["gpu_items.jsonl"] = as_lines(merged("device", item_lines(), checked(lines, "items.jsonl")))
    if "suite.jsonl" in there:
        before = load(FOLDER / "gpu.jsonl") if (FOLDER / "gpu.jsonl").exists() else []
        found["gpu.jsonl"] = as_lines(merged("name", before, checked(load(folder / "suite.jsonl"), "suite.jsonl")))
    if "tests.jsonl" in there:
        found["gpu_tests.json"] = json.dumps(merged("device", runs_of_tests(), [tests(folder)]), indent=1) + "\n"
    for name, text in found.items():
        (FOLDER / name).write_text(text)
        print(f"benchmarks/results/{name}: {len(text.splitlines()):,} lines")


def merged(field: str, before: list[Line], new: list[Line]) -> list[Line]:
    """The lines of each value of the field together: the new ones where there are any, else those from before."""
    found = by(field, before) | by(field, new)
    return [line for lines in found.values() for line in lines]


def checked(lines: list[Line], file: str) -> list[Line]:
    """The lines, if each is of a clean commit and of a GPU."""
    for line in lines:
        commit = line.get("commit", "unknown")
        if not is_clean(commit):
            remedy = "measure a committed state; where the repository does not come along, COMMIT= names it"
            raise ValueError(f"{file} has a line of commit {commit!r}; {remedy}")
        if "driver" not in line:
            raise ValueError(f"{file} has a line of {line.get('device')!r}, no GPU; a rehearsal is no result")
    return lines


def tests(folder: Path) -> Line:
    """Of a test that ran more than once, the last outcome."""
    last = {line["test"]: line for line in load(folder / "tests.jsonl")}
    failed = [line for line in last.values() if line["outcome"] in FAILED]
    return {
        **card(folder),
        "outcomes": dict(Counter(line["outcome"] for line in last.values()).most_common()),
        "failures": {line["test"]: last_line(line.get("why", "")) for line in failed},
    }


def card(folder: Path) -> Line:
    """Device, driver, versions and commit of the run, from the line that the kit's first step writes."""
    steps = folder / "steps.jsonl"
    found = next((line for line in load(steps) if "card" in line), None) if steps.exists() else None
    if found is None:
        raise FileNotFoundError("steps.jsonl has no line of the card; tests.jsonl does not say where the tests ran")
    line = {name: found[name] for name in ("commit", "python", "torch", "triton", "numpy")}
    line["device"] = found["card"].get("name", "a CPU")
    said = found["nvidia-smi"].split(", ")  # name, driver, and more
    return checked([{**line, "driver": said[1]} if len(said) > 1 else line], "steps.jsonl")[0]


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]


def as_lines(lines: list[Line]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)

"""What a run found, in few words, from the files that it wrote."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from gpu.lines import Line, read
from gpu.steps import in_words

MOST = 20  # failures of a file that are named
WIDTH = 240  # characters of each
GOOD = ("ok", "passed", "skipped", "missing")


def summary(out: Path, outcomes: list[Line], commit: str) -> str:
    said = ["", *map(in_words, outcomes)]
    said += counted("smoke", read(out / "smoke.jsonl"), lambda x: f"{x['backend']} {x['check']}: {x.get('error')}")
    items = [line for line in read(out / "items.jsonl") if "begun" not in line]
    said += counted("items", judged(items, "error"), lambda x: f"{x['item']} {x.get('form', '')}: {x['error']}")
    suite = judged(read(out / "suite.jsonl"), "refused")
    said += counted("suite", suite, lambda x: f"{x.get('name')} {x['contestant']}: {x['refused']}")
    said += counted("tests", read(out / "tests.jsonl"), lambda x: f"{x['test']}: {last_line(x['why'])}")
    said += ended(out / "sanitizer.txt")
    if any("NO EXTENSION" in line.get("left_out", "") for line in outcomes):
        said.append("NO EXTENSION: no CUDA kernel of this package was run, see output.txt")
    if commit.startswith("unknown"):
        said.append("THE COMMIT IS UNKNOWN: give it as COMMIT=, or no result can be kept")
    return "\n".join(said)


def judged(lines: list[Line], fault: str) -> list[Line]:
    """With an outcome, by what they have."""
    return [{"outcome": "FAIL" if fault in x else "missing" if "missing" in x else "ok", **x} for x in lines]


def counted(name: str, lines: list[Line], words: Callable[[Line], str]) -> list[str]:
    """How many of each outcome, then the first failures."""
    if not lines:
        return []
    counts = Counter(line["outcome"] for line in lines)
    bad = [line for line in lines if line["outcome"] not in GOOD]
    named = [f"  {line['outcome']} {words(line)[:WIDTH]}" for line in bad[:MOST]]
    more = [f"  and {len(bad) - MOST} more"] if len(bad) > MOST else []
    return [f"{name}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()), *named, *more]


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def ended(file: Path) -> list[str]:
    """The lines of compute-sanitizer that sum up."""
    text = file.read_text(errors="replace") if file.exists() else ""
    return [line for line in text.splitlines() if re.search(r"ends with|SUMMARY", line)]

"""What the studies share: a study is a module with `measure`, `tables`, `claims` and `draw`.

    measure(size, seeds) -> Record     runs it; a Record holds what JSON holds, nothing else
    tables(record) -> {name: Rows}     the first row is the heading
    claims(record) -> [Claim]          what somebody says, beside what the record says
    draw(record) -> Figure

It also has `Size`, a NamedTuple whose defaults take minutes on two cores, `FULL`, a Size for more time, and `SEEDS`.
Pages and pictures are written from the record alone, so `tables` and `claims` need neither models nor matplotlib.
"""

import json
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

NAMES = ("control", "variance", "failures", "method", "smollm2", "mass")
RESULTS = Path(__file__).parent / "results"
PAPER = "2603.25562"
# 97.5 % quantiles for 1 to 10 degrees of freedom. More than 11 values take the last, which is a little too wide.
STUDENTS_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
Record = dict[str, Any]
Rows = list[list[str]]
Item = TypeVar("Item")


class Claim(NamedTuple):
    """A claim, and what became of it here. `held` is None where this scale cannot tell."""

    source: str  # an arXiv number, and the section: "2603.25562, section 3.2"
    claim: str  # in our words
    measured: str  # figures of the record
    held: bool | None


def study(name: str) -> Any:
    """The module of that name."""
    return import_module(f"examples.paper.{name}")


def run(name: str, full: bool, seeds: Sequence[int], out: Path) -> Record:
    """Measures a study and writes NAME.json, NAME.md and NAME.png into `out`."""
    module, started = study(name), time.perf_counter()
    size = module.FULL if full else module.Size()
    record = {"size": size._asdict(), "seeds": list(seeds), "torch": torch.__version__}
    record |= {"threads": torch.get_num_threads(), **module.measure(size, seeds)}
    record["seconds"] = round(time.perf_counter() - started, 1)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, allow_nan=False)
    flat = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)  # a curve on one line
    (out / f"{name}.json").write_text(flat + "\n", encoding="utf-8")
    redraw(name, out)
    return record


def redraw(name: str, out: Path) -> None:
    """NAME.md and NAME.png from NAME.json."""
    module, record = study(name), load(name, out)
    (out / f"{name}.md").write_text(page(name, record), encoding="utf-8")
    module.draw(record).savefig(out / f"{name}.png", dpi=110, metadata={"Software": None})


def load(name: str, out: Path = RESULTS) -> Record:
    record: Record = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    return record


def page(name: str, record: Record) -> str:
    module = study(name)
    titled = {"Claims": verdicts(module.claims(record)), **module.tables(record)}
    parts = [f"## {title}\n\n{markdown(rows)}" for title, rows in titled.items()]
    return "\n".join([f"# {name}\n", *parts, ran(record)])


def verdicts(claims: Iterable[Claim]) -> Rows:
    said = {True: "held", False: "**did not hold**", None: "not at this scale"}
    return [["source", "claim", "measured here", "verdict"], *([*c[:3], said[c.held]] for c in claims)]


def markdown(rows: Rows) -> str:
    """A table; a column of numbers is flush right. A list, such as an arXiv number and a section, is no number."""
    right = [all(cell[:1] in "+-0123456789" and ", " not in cell for cell in column) for column in zip(*rows[1:])]
    lines = [rows[0], ["---:" if x else "---" for x in right], *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ran(record: Record) -> str:
    seeds, took = ", ".join(map(str, record["seeds"])), f"{record['seconds']:.0f} s"
    return f"Seeds {seeds}; {took} on {record['threads']} CPU threads with torch {record['torch']}.\n"


def bar(items: Iterable[Item], name: str) -> Iterator[Item]:
    return iter(tqdm(items, desc=name, dynamic_ncols=True))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval by Student's t; NaN for a single value."""
    if len(values) < 2:
        return statistics.fmean(values), float("nan")
    quantile = STUDENTS_T[min(len(values) - 1, len(STUDENTS_T)) - 1]
    return statistics.fmean(values), quantile * statistics.stdev(values) / len(values) ** 0.5

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
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from examples.paper.summary import Rows, markdown, rounded

NAMES = ("control", "variance", "failures", "rates", "method", "smollm2", "mass")
RESULTS = Path(__file__).parent / "results"
PAPER = "2603.25562"
OURSELVES = "our question"  # the source of a claim that nobody made
Record = dict[str, Any]
Item = TypeVar("Item")


class Claim(NamedTuple):
    """A claim, and what became of it here. `held` is None where the seeds cannot tell."""

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
    record |= {"threads": torch.get_num_threads(), **rounded(module.measure(size, seeds))}
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
    claims, found = module.claims(record), module.tables(record)
    titled = {"Claims": verdicts(claims), **found} if claims else found
    parts = [f"## {title}\n\n{markdown(rows)}" for title, rows in titled.items()]
    return "\n".join([f"# {name}\n", *parts, ran(record)])


def verdicts(claims: Iterable[Claim]) -> Rows:
    said = {True: "held", False: "**did not hold**", None: "not shown"}
    return [["source", "claim", "measured here", "verdict"], *([*c[:3], said[c.held]] for c in claims)]


def ran(record: Record) -> str:
    seeds, took = ", ".join(map(str, record["seeds"])), f"{record['seconds']:.0f} s"
    return f"Seeds {seeds}; {took} on {record['threads']} CPU threads with torch {record['torch']}.\n"


def bar(items: Iterable[Item], name: str) -> Iterator[Item]:
    return iter(tqdm(items, desc=name, dynamic_ncols=True))

"""The file of results: a JSON line per form of an item, with its share of the floor that the same run measured."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import predict, records
from gpu.items.experiments import AS_PLANNED, DECISIONS
from gpu.items.forms import Item

Line = dict[str, Any]

FLOORS = ("read", "copy", "fill")


class Records:
    """The lines of the file. What was written before is read back, so that a run can go on where another ended."""

    def __init__(self, path: Path | None, shared: Line) -> None:
        self.path, self.shared = path, shared
        self.lines: list[Line] = records.load(path) if path and path.exists() else []

    def write(self, line: Line) -> None:
        line = {**line, **self.shared}
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        if self.path:
            records.append(line, self.path)

    def begin(self, item: Item) -> None:
        """Written first, so that an item which ends the process is known by name."""
        self.write({"item": item.name, "begun": True})

    def done(self) -> set[str]:
        return {line["item"] for line in self.lines if "begun" not in line}

    def cut_short(self) -> list[str]:
        done = self.done()
        return [name for name in dict.fromkeys(line["item"] for line in self.lines) if name not in done]


def measured(item: Item, times: dict[str, list[float]], rates: dict[str, float], device: str) -> dict[str, Line]:
    """Of every form that was timed, in milliseconds."""
    medians = {label: statistics.median(turns) for label, turns in times.items()}
    size, first = item.read + item.written, next(iter(times), "")
    found = {}
    for label, turns in times.items():
        line: Line = {
            "median_ms": digits(medians[label]),
            "quartiles_ms": [digits(x) for x in quartiles(turns)],
            "least_ms": digits(min(turns)),
            "repetitions": len(turns),
            "over_first": digits(statistics.median(x / y for x, y in zip(turns, times[first], strict=True))),
        }
        if item.host_calls:
            line |= {"clock": "host", "calls": item.host_calls}
        if size:
            line |= {"bytes": size, "tb_s": digits(size / medians[label] / 1e9)}
        if of := floor(item, medians, rates):
            line |= {"of": of[0], "share": digits(of[1] / medians[label])}
        if label in ("triton", AS_PLANNED):
            line |= prediction(item, device)
        found[label] = line
    return found


def floor(item: Item, medians: dict[str, float], rates: dict[str, float]) -> tuple[str, float] | None:
    """Its name, and the milliseconds that it takes for the bytes of the item."""
    if item.floor:
        return (f"{item.floor} in turns", medians[item.floor]) if item.floor in medians else None
    parts = {name: size for name, size in (("read", item.read), ("fill", item.written)) if size}
    if item.name in FLOORS or not parts or not parts.keys() <= rates.keys():
        return None
    return "+".join(parts), sum(size / rates[name] for name, size in parts.items())


def floor_rates(lines: Iterable[Line]) -> dict[str, float]:
    """Bytes per millisecond of the fastest form of each floor."""
    rates: dict[str, float] = {}
    for line in lines:
        if line["item"] in FLOORS and "median_ms" in line:
            rates[line["item"]] = max(rates.get(line["item"], 0.0), line["bytes"] / line["median_ms"])
    return rates


def prediction(item: Item, device: str) -> Line:
    """A fault of the model is written down; it must not cost the time that was taken."""
    try:
        share = predicted(item, device)
    except Exception as error:
        return {"prediction_error": f"{type(error).__name__}: {error}"[:200]}
    return {} if share is None else {"predicted_share": digits(share)}


def predicted(item: Item, device: str) -> float | None:
    """The one place that asks benchmarks/predict.py; None for what it does not predict."""
    if not item.kernel:
        return None
    size = {"h": 0, **item.sizes}
    return predict.expected(item.kernel, size["dtype"], size["v"], size["k"], size["h"], device, size["n"])


def quartiles(turns: list[float]) -> list[float]:
    return statistics.quantiles(turns, n=4)[::2] if len(turns) > 1 else [turns[0], turns[0]]


def digits(x: float) -> float:
    return float(f"{x:.4g}")


def described(item: Item, label: str, backend: str) -> Line:
    line: Line = {"item": item.name, "form": label, "backend": backend or "torch", **item.sizes}
    if item.kernel:
        line["kernel"] = item.kernel
    if item.decision:
        line |= {"decision": item.decision, "if_it_wins": DECISIONS[item.decision]}
    return line

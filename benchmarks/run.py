"""Cases times contestants: checked against float64, then timed in turns, then written down."""

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.against import Rival
from benchmarks.cases import SUITES, Case
from benchmarks.contestants import Contestant, Entry, taking_part
from benchmarks.measure import (
    Floor,
    Passes,
    Stage,
    contest,
    peak_on_gpu,
    peaks_on_cpu,
    retained_bytes,
    summary,
)
from benchmarks.problems import TOLERANCE, Problem, error, selects_the_largest


class Wrong(Exception):
    """A contestant's result is not that of float64."""


def run(options: Namespace) -> None:
    device = {"cpu": "cpu", "gpu": "cuda"}[options.suite]
    if device == "cpu":
        torch.set_num_threads(options.threads)
    cases = [case for case in SUITES[options.suite] if not options.case or case.name in options.case]
    out: Path = options.out or results.FOLDER / f"{options.suite}.jsonl"
    stage, shared = Stage(device), results.setting(device)
    with Rival(options.against, device, options.threads) if options.against else contextlib.nullcontext() as rival:
        for case in progress(cases):
            for line in measured(case, stage, options.rounds, options.seconds, rival):
                results.append({**line, **shared}, out)


def progress(cases: list[Case]) -> Iterator[Case]:
    """With a bar, where tqdm is there."""
    try:
        from tqdm import tqdm
    except ImportError:
        for done, case in enumerate(cases):
            print(f"{done + 1}/{len(cases)} {case.name}", flush=True)
            yield case
    else:
        bar = tqdm(cases, unit="case")
        for case in bar:
            bar.set_postfix_str(f"{case.name} {case.gradients}{case.rows if case.name == 'worst rows' else ''}")
            yield case


def measured(case: Case, stage: Stage, rounds: int, seconds: float, rival: Rival | None) -> Iterator[results.Line]:
    """A line for every contestant, those that are missing or wrong included."""
    torch._dynamo.reset()  # a compiled function is compiled for eight shapes and then no more, without a word
    problem = Problem(case, stage.device)
    moved = case.moved(problem.touched)
    floor = Floor(*moved, stage.device)
    entries, lines = entered(problem)
    lines["floor"] = {"contestant": "floor"}
    turns: dict[str, Callable[[], Passes]] = {
        name: partial(stage.passes, entry) for name, entry in {**entries, "floor": floor}.items()
    }
    if rival:
        lines["against"] = {"contestant": f"topk_rkl at {rival.ref}"}
        turns["against"] = rival.turn(case)
    times = {name: summary(taken) for name, taken in contest(turns, rounds, seconds).items()}
    peaks = peaks_on_cpu(case, [*entries]) if case.peak and stage.device == "cpu" else {}
    sizes = {name: value for name, value in asdict(case).items() if value and name not in ("contestants", "peak")}
    for name, line in lines.items():
        line = {**sizes, **line}
        if name in times:
            line |= times[name]
            line |= {f"over_{other}": ratio(times, name, other) for other in ("floor", "topk_rkl")}
            line["moved_bytes"] = [*moved[0], *moved[1]]
        if name in entries:
            line |= memory(entries[name], problem, peaks.get(name))
        yield line


def entered(problem: Problem) -> tuple[dict[str, Entry], dict[str, results.Line]]:
    """Who was found right, and what is known of each: without an entry, why."""
    entries, lines = {}, {}
    for contestant in taking_part(problem.case, problem.device):
        name = contestant.name
        lines[name] = {"contestant": name}
        try:
            entry = contestant.build(problem)
            lines[name] |= checked(contestant, entry, problem)
            entries[name] = entry
        except Exception as reason:  # a rival may fail in any way, and is then named with it
            if name == "topk_rkl":
                raise
            kind = "refused" if isinstance(reason, Wrong) else "missing"
            lines[name][kind] = f"{type(reason).__name__}: {reason}".splitlines()[0][:200]
    return entries, lines


def checked(contestant: Contestant, entry: Entry, problem: Problem) -> results.Line:
    entry.fresh()
    out = entry.forward()
    entry.backward(out)
    if problem.case.work == "select":
        if not selects_the_largest(problem, *out):
            raise Wrong("not the largest of each row")
        return {}
    gradients = entry.results()
    off = error(problem, contestant.objective, out.detach(), gradients)
    tolerance = TOLERANCE[problem.case.dtype]
    if not off <= tolerance:
        raise Wrong(f"off by {off:.1e} of the largest value, of which {tolerance:.0e} are allowed")
    line: results.Line = {"objective": contestant.objective, "error": float(f"{off:.1e}")}
    if len(gradients) == 2:
        line["head_gradient"] = "sparse" if gradients[1].is_sparse else "dense"
    return line


def memory(entry: Entry, problem: Problem, peak: int | None) -> results.Line:
    found: dict[str, Any] = {}
    if problem.case.work != "select":
        found["retained_bytes"] = retained_bytes(entry, problem)
    if problem.device == "cuda":
        peak = peak_on_gpu(entry)
    return found if peak is None else {**found, "peak_bytes": peak}


def ratio(times: dict[str, results.Line], name: str, other: str) -> float:
    return round(times[name]["median_ms"] / times[other]["median_ms"], 3)

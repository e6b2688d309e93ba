"""Cases times contestants: checked against float64, then timed in turns, then written down."""

import contextlib
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.against import Rival
from benchmarks.cases import SUITES, Case
from benchmarks.contestants import FROM_STATES, Contestant, Runner, Unavailable, taking_part
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
from benchmarks.problems import TOLERANCE, WHOLE, Problem, error, selects_the_largest


class Wrong(Exception):
    """A contestant's result is not that of float64."""


def run(options: Namespace) -> None:
    """Every case is tried and every result written; a result of ours that was refused makes the exit code 1."""
    device = {"cpu": "cpu", "gpu": "cuda"}[options.suite]
    if device == "cpu":
        torch.set_num_threads(options.threads)
    cases = [case for case in SUITES[options.suite] if not options.case or case.name in options.case]
    out: Path = options.out or records.FOLDER / f"{options.suite}.jsonl"
    shared = records.setting(device)
    if options.out is None and not records.is_clean(shared["commit"]):
        sys.exit(
            f"the results would be of commit {shared['commit']}, which nobody can check out; commit the changes first, "
            "or name another file with --out"
        )
    stage, refused = Stage(device), []
    with Rival(options.against, device, options.threads) if options.against else contextlib.nullcontext() as rival:
        for case in progress(cases):
            for line in tried(case, stage, options.rounds, options.seconds, rival, options.only_ours):
                records.append({**line, **shared}, out)
                if line["contestant"].startswith("topk_rkl") and "refused" in line:
                    refused.append(f"{case.work} of {case.name}, {line['contestant']}: {line['refused']}")
    if refused:
        sys.exit("\n".join(["refused:", *refused]))


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


def tried(
    case: Case, stage: Stage, rounds: int, seconds: float, rival: Rival | None, only_ours: bool
) -> Iterator[records.Line]:
    """The lines of the case, or one line that says why it ended before them: the next case is measured either way."""
    try:
        yield from measured(case, stage, rounds, seconds, rival, only_ours)
    except Exception as reason:
        traceback.print_exc()
        yield {**sizes(case), "contestant": "topk_rkl", "refused": f"the case ended: {in_short(reason)}"}


def measured(
    case: Case, stage: Stage, rounds: int, seconds: float, rival: Rival | None, only_ours: bool = False
) -> Iterator[records.Line]:
    """A line for every contestant, those that are missing or wrong included."""
    torch._dynamo.reset()  # a compiled function is compiled for eight shapes and then no more, without a word
    problem = Problem(case, stage.device)
    moved = case.moved(problem.touched)
    floor = Floor(*moved, stage.device)
    runners, lines = found_right(problem, only_ours)
    lines["floor"] = {"contestant": "floor"}
    turns: dict[str, Callable[[], Passes]] = {
        name: partial(stage.passes, runner) for name, runner in {**runners, "floor": floor}.items()
    }
    if rival:
        lines["against"] = {"contestant": f"topk_rkl at {rival.ref}"}
        turns["against"] = rival.turn(case)
    times = {name: summary(taken) for name, taken in contest(turns, rounds, seconds).items()}
    peaks = peaks_on_cpu(case, [*runners]) if case.peak and stage.device == "cpu" else {}
    for name, line in lines.items():
        line = {**sizes(case), **line}
        if name in times:
            line |= times[name]
            # Rivals that compare the whole vocabulary from hidden states make the teacher's logits within the clock.
            alike = FROM_STATES if case.work == "linear" and line.get("objective") == WHOLE else "topk_rkl"
            beside = {"over_floor": "floor", "over_topk_rkl": alike}
            line |= {field: ratio(times, name, other) for field, other in beside.items() if other in times}
            line["moved_bytes"] = [*moved[0], *moved[1]]
        if name in runners:
            line |= memory(runners[name], problem, peaks.get(name))
        yield line


def sizes(case: Case) -> records.Line:
    return {name: value for name, value in asdict(case).items() if value and name not in ("contestants", "peak")}


def in_short(reason: Exception) -> str:
    return f"{type(reason).__name__}: {reason}".splitlines()[0][:200]


def found_right(problem: Problem, only_ours: bool) -> tuple[dict[str, Runner], dict[str, records.Line]]:
    """Who was found right, and what is known of each: without an runner, why."""
    runners, lines = {}, {}
    for contestant in taking_part(problem.case, problem.device, only_ours):
        name = contestant.name
        lines[name] = {"contestant": name}
        try:
            runner = contestant.build(problem)
            lines[name] |= checked(contestant, runner, problem)
            runners[name] = runner
        except Exception as reason:  # a rival may fail in any way, ours in none
            if contestant.ours and not isinstance(reason, Unavailable):
                traceback.print_exc()
                lines[name]["refused"] = in_short(reason)
            else:
                lines[name]["refused" if isinstance(reason, Wrong) else "missing"] = in_short(reason)
    return runners, lines


def checked(contestant: Contestant, runner: Runner, problem: Problem) -> records.Line:
    runner.fresh()
    out = runner.forward()
    runner.backward(out)
    if problem.case.work == "select":
        if not selects_the_largest(problem, *out):
            raise Wrong("not the largest of each row")
        return {}
    gradients = runner.results()
    off = error(problem, contestant.objective, out.detach(), gradients)
    tolerance = TOLERANCE[problem.case.dtype]
    if not off <= tolerance:
        raise Wrong(f"off by {off:.1e} of the largest value, of which {tolerance:.0e} are allowed")
    line: records.Line = {"objective": contestant.objective, "error": float(f"{off:.1e}")}
    if len(gradients) == 2:
        line["head_gradient"] = "sparse" if gradients[1].is_sparse else "dense"
    return line


def memory(runner: Runner, problem: Problem, peak: int | None) -> records.Line:
    found: dict[str, Any] = {}
    if problem.case.work != "select":
        found["retained_bytes"] = retained_bytes(runner, problem)
    if problem.device == "cuda":
        peak = peak_on_gpu(runner)
    return found if peak is None else {**found, "peak_bytes": peak}


def ratio(times: dict[str, records.Line], name: str, other: str) -> float:
    return round(times[name]["median_ms"] / times[other]["median_ms"], 3)

"""Time and memory of contestants that take turns in one process.

A contestant runs once untimed before every timed call, so it finds the memory that it freed itself. The caches are then
filled with other data, so a call reads from memory. `start_anew` keeps glibc's malloc from giving memory back to the
system, which would charge page faults to the next contestant.
"""

import ctypes
import gc
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Moved
from benchmarks.contestants import Runner, taking_part
from benchmarks.problems import Problem

MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


class Passes(NamedTuple):
    """Seconds."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def start_anew() -> None:
    """Runs the same command with an allocator that keeps what it has, which glibc reads when a process starts."""
    if sys.platform == "linux" and not MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **MALLOC})


class Floor(Runner):
    """Moves as many bytes as must be moved: what is read and written is copied, the rest only read or only written."""

    def __init__(self, forward: Moved, backward: Moved, device: str) -> None:
        # Numbers, since a page that was never written may be one page of zeros however often it is read.
        self.source, self.target = (torch.randn(max(forward[i], backward[i]) // 4 + 1, device=device) for i in range(2))
        self.of_backward = backward
        super().__init__(lambda: self.move(forward))

    def move(self, moved: Moved) -> None:
        read, written = (count // 4 for count in moved)
        both = min(read, written)
        if both:
            self.target[:both].copy_(self.source[:both])
        if read > both:
            self.source[both:read].sum()
        if written > both:
            self.target[both:written].zero_()

    def backward(self, _: Any, /) -> None:
        self.move(self.of_backward)


def largest_cache(device: str) -> int:
    """Bytes."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.strip().removesuffix("K")) << 10 for size in sizes), default=0)


class Stage:
    """Where contestants are timed."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.other_data = torch.randn(max(256 << 20, 4 * largest_cache(device)) // 4, device=device)

    def passes(self, runner: Runner) -> Passes:
        runner.fresh()
        runner.backward(runner.forward())
        runner.fresh()
        self.other_data.sum()
        passes = self._on_gpu(runner) if self.device == "cuda" else self._on_cpu(runner)
        runner.fresh()
        return passes

    def _on_cpu(self, runner: Runner) -> Passes:
        start = time.perf_counter()
        out = runner.forward()
        between = time.perf_counter()
        runner.backward(out)
        return Passes(between - start, time.perf_counter() - between)

    def _on_gpu(self, runner: Runner) -> Passes:
        """The GPU's own time: it is kept busy until the calls are queued."""
        torch.cuda._sleep(2_000_000)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        out = runner.forward()
        marks[1].record()
        runner.backward(out)
        marks[2].record()
        marks[2].synchronize()
        return Passes(*(a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)))


def contest(turns: dict[str, Callable[[], Passes]], rounds: int, seconds: float) -> dict[str, list[Passes]]:
    """Contestants take turns. One that has spent its seconds sits out the later rounds, after three at least."""
    times: dict[str, list[Passes]] = {name: [] for name in turns}
    spent = dict.fromkeys(turns, 0.0)
    for done in range(rounds):
        for name, turn in turns.items():
            if done < 3 or spent[name] < seconds:
                start = time.perf_counter()
                times[name].append(turn())
                spent[name] += time.perf_counter() - start
    return times


def summary(times: list[Passes]) -> dict[str, object]:
    """Medians in ms, and the quartiles of both passes together."""
    both = [t.both for t in times]
    quartiles = statistics.quantiles(both, n=4)[::2]
    return {
        "forward_ms": ms(statistics.median(t.forward for t in times)),
        "backward_ms": ms(statistics.median(t.backward for t in times)),
        "median_ms": ms(statistics.median(both)),
        "quartiles_ms": [ms(t) for t in quartiles],
        "rounds": len(times),
    }


def ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)


def retained_bytes(runner: Runner, problem: Problem) -> int:
    """The bytes that autograd keeps between the passes, without the inputs.

    Found by walking the graph: hooks for saved tensors and torch.func exclude each other.
    """
    runner.fresh()
    out = runner.forward()
    kept: dict[int, int] = {}
    nodes, seen = [out.grad_fn], {None}
    while nodes:
        if (node := nodes.pop()) not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            for x in saved(node):
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    given = tensors([runner.leaves, *vars(problem).values()])
    return sum(kept[address] for address in kept.keys() - {x.untyped_storage().data_ptr() for x in given})


def saved(node: Any) -> list[Tensor]:
    """A Function in Python saves tensors as `saved_tensors`, one in C++ as `_saved_` and the name of an argument."""
    names = [name for name in dir(node) if name == "saved_tensors" or name.startswith("_saved_")]
    return tensors([getattr(node, name) for name in names])


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def peak_on_gpu(runner: Runner) -> int:
    """The peak beyond what was held before. The gradients that the call leaves are part of it."""
    runner.fresh()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner.backward(runner.forward())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peaks_on_cpu(case: Case, names: list[str]) -> dict[str, int]:
    """The peak of each contestant, in a process that runs nothing else, with the allocator that users have."""
    ours = {name: os.environ.pop(name) for name in MALLOC if name in os.environ}
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(_peaks, case, names, torch.get_num_threads()).result()
    finally:
        os.environ.update(ours)


def _peaks(case: Case, names: list[str], threads: int) -> dict[str, int]:
    """The largest resident memory during one call (VmHWM of Linux, reset just before it) less that before it."""
    torch.set_num_threads(threads)
    problem = Problem(case, "cpu")
    peaks = {}
    for contestant in taking_part(case, "cpu"):
        if contestant.name not in names:
            continue
        runner = contestant.build(problem)
        for _ in range(2):  # the first also loads what is loaded once
            runner.fresh()
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            runner.backward(runner.forward())
            peaks[contestant.name] = _status("VmHWM") - before
        runner.fresh()
    return peaks


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10

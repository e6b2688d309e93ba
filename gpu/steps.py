"""Runs steps one after another within one total of seconds; each is a process group that ends with its step."""

import contextlib
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from gpu.keeper import Keeper, kill_group
from gpu.lines import Line, append

GRACE = 8.0  # seconds to sum up in, between the interrupt and the kill
LEAST = 5.0  # seconds; with fewer left no step begins


@dataclass(frozen=True)
class Step:
    name: str
    limit: float  # seconds
    command: tuple[str, ...]
    file: str = "output.txt"  # what the step prints is appended to it
    tries: int = 1  # a step that a fault ends begins again within its limit, up to so often

    @property
    def kind(self) -> str:
        """What `--steps` calls it."""
        return self.name.split()[0]


@dataclass
class Job:
    step: Step
    process: subprocess.Popen[bytes]
    began: float
    limit: float


class Run:
    """The steps of one call, with lines about each in steps.jsonl. No process of theirs outlives the `with` block."""

    def __init__(self, total: float, out: Path, root: Path, environment: dict[str, str]) -> None:
        self.start, self.total = time.monotonic(), total
        self.out, self.root, self.environment = out, root, environment
        self.outcomes: list[Line] = []
        out.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Run":
        self.keeper = Keeper(str(self.root))
        return self

    def __exit__(self, *_: object) -> None:
        self.keeper.close()

    def spent(self) -> float:
        return time.monotonic() - self.start

    def step(self, step: Step) -> bool:
        """Whether it ended well. Exit code 1 says that all of it was tried and some failed; others, that it was cut."""
        until = self.spent() + step.limit
        for attempt in range(step.tries):
            left = until - self.spent()
            if attempt and left < LEAST:
                break
            job = self.begin(step, left)
            if job is None or self.end(job) or self.outcomes[-1]["exit"] == 1:
                break
        return self.outcomes[-1]["exit"] == 0

    def begin(self, step: Step, limit: float | None = None) -> Job | None:
        """Starts it and comes back; None where too little of the total is left."""
        room = self.total - self.spent() - GRACE
        if room < LEAST:
            self.leave_out(step.name, f"{self.spent():.0f} of LIMIT={self.total:g} seconds are spent")
            return None
        began, limit = self.spent(), min(step.limit if limit is None else limit, room)
        self._say({"step": step.name, "begins": round(began, 1), "limit": round(limit, 1)})
        with (self.out / step.file).open("ab") as output:
            process = subprocess.Popen(
                step.command,
                cwd=self.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.keeper.keep(process.pid)
        return Job(step, process, began, limit)

    def end(self, job: Job) -> bool:
        """Waits for it up to its limit, then kills whatever of it is left. Whether it ended well."""
        stopped = False
        try:
            job.process.wait(max(0.0, job.began + job.limit - self.spent()))
        except subprocess.TimeoutExpired:
            stopped = True
            job.process.send_signal(signal.SIGINT)  # at which pytest sums up
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(GRACE)
        kill_group(job.process.pid)
        code = job.process.wait()
        self.keeper.release(job.process.pid)
        line = {"step": job.step.name, "start": round(job.began, 1), "seconds": round(self.spent() - job.began, 1)}
        line |= {"limit": round(job.limit, 1), "exit": code or int(stopped), "stopped": stopped}
        self._ended(line)
        return line["exit"] == 0

    def leave_out(self, name: str, reason: str) -> None:
        self._ended({"step": name, "left_out": reason, "exit": 1})

    def _ended(self, line: Line) -> None:
        self.outcomes.append(line)
        self._say(line)

    def _say(self, line: Line) -> None:
        append(self.out / "steps.jsonl", line)
        print(f"{self.spent():5.0f} s  {in_words(line)}", flush=True)


def in_words(line: Line) -> str:
    """A line of steps.jsonl."""
    if "begins" in line:
        return f"{line['step']}: at most {line['limit']:.0f} s"
    if "left_out" in line:
        return f"{line['step']}: LEFT OUT, {line['left_out']}"
    how = "ok" if line["exit"] == 0 else "STOPPED at its limit" if line["stopped"] else f"FAILED with {line['exit']}"
    return f"{line['step']}: {how} after {line['seconds']:.1f} s"

"""Each kernel at sizes that matter, before anything longer is tried: a line a check, ok or FAIL.

python -m gpu.smoke triton --out smoke.jsonl                  every group, each in a process of its own
python -m gpu.smoke triton --out smoke.jsonl --group head     one group, in this process
"""

import argparse
import contextlib
import faulthandler
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO

from gpu.faults import lost
from gpu.lines import Line, append

ROOT = Path(__file__).parent.parent
TOGETHER = min(8, os.cpu_count() or 1)  # processes
SAID = 600  # characters of an error
SELECTIONS = ("selection bfloat16", "selection float16", "selection float32")
OF_BOTH = (*SELECTIONS, "loss", "scatter", "head", "stress", "graph", "slabs")
GROUPS = {"triton": (*OF_BOTH, "mass"), "cuda": (*OF_BOTH, "threads")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=GROUPS)
    parser.add_argument("--out", type=Path, required=True, help="the file that lines are appended to")
    parser.add_argument("--limit", type=float, default=45, help="seconds of a group")
    parser.add_argument("--small", action="store_true", help="sizes that the interpreter can take")
    parser.add_argument("--group", action="append", help="only these; one alone runs in this process")
    options = parser.parse_args()
    if options.group and len(options.group) == 1:
        return group_here(options.group[0], options)
    return groups(options)


def group_here(name: str, options: argparse.Namespace) -> int:
    faulthandler.dump_traceback_later(0.9 * options.limit)  # where it hangs is part of the finding
    import torch

    from gpu.checks import GROUPS as checks

    torch.manual_seed(0)
    bad = 0
    for check, call in checks[name](options.backend, options.small):
        line: Line = {"backend": options.backend, "group": name, "check": check}
        print(f"{check} ...", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            call()
        except Exception as error:  # the next check may still be right
            line |= {"outcome": "FAIL", "error": in_words(error)}
            bad += 1
        else:
            line |= {"outcome": "ok"}
        append(options.out, {**line, "seconds": round(time.monotonic() - start, 2)})
        if lost(line.get("error", "")):
            rest = {"check": "the rest of the group", "error": "not tried, as the GPU is lost to this process"}
            append(options.out, {**line, **rest})
            break
    faulthandler.cancel_dump_traceback_later()
    return 1 if bad else 0


def in_words(error: Exception) -> str:
    """With the last line of ours that was reached, as a bare assertion says nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = [frame for frame in frames if Path(frame.filename).parent.parent == ROOT or frame is frames[0]][-1]
    return f"{type(error).__name__}: {str(error)[:SAID]} at {Path(frame.filename).name}:{frame.lineno}: {frame.line}"


def groups(options: argparse.Namespace) -> int:
    """Some at a time. A group that hangs or crashes costs no other, and is a line too."""
    waiting = list(options.group or GROUPS[options.backend])
    running: list[Running] = []
    bad = 0
    try:
        while waiting or running:
            while waiting and len(running) < TOGETHER:
                running.append(Running(waiting.pop(0), options))
            for one in list(running):
                if one.over():
                    running.remove(one)
                    bad += one.failed()
            time.sleep(0.05)
    except KeyboardInterrupt:  # the limit of the whole step
        for one in running:
            one.fail("stopped with the step")
        for group in waiting:
            append(options.out, the_group(group, options, "not begun when the step was stopped"))
        return 1
    return 1 if bad else 0


def the_group(group: str, options: argparse.Namespace, error: str) -> Line:
    return {"backend": options.backend, "group": group, "check": "the group", "outcome": "FAIL", "error": error}


class Running:
    """The process of one group."""

    def __init__(self, group: str, options: argparse.Namespace) -> None:
        self.group, self.options = group, options
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - nameless, so that a kill leaves none
        command = [sys.executable, "-m", "gpu.smoke", options.backend, "--out", options.out, "--group", group]
        command += ["--limit", str(options.limit), *(["--small"] if options.small else [])]
        self.until = time.monotonic() + options.limit
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def over(self) -> bool:
        return self.process.poll() is not None or time.monotonic() > self.until

    def failed(self) -> bool:
        """Of a group that is over. What no line of its own says becomes one."""
        code = self.process.poll()
        if code is None:
            self.fail(f"did not end in {self.options.limit:g} s")
        elif code not in (0, 1) or (code == 1 and b"Traceback" in self.said()):
            self.fail(f"exit {code}")
        return code != 0

    def fail(self, how: str) -> None:
        self.process.kill()
        self.process.wait()
        said = self.said().decode(errors="replace")[-2 * SAID :].strip()
        append(self.options.out, the_group(self.group, self.options, f"{how}: {said}"))

    def said(self) -> bytes:
        self.log.seek(0)
        return self.log.read()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())

"""Kills what a killed process leaves behind."""

import contextlib
import os
import signal
import subprocess
import sys

CODE = """
import sys
from gpu.keeper import kill_group
kept = set()
for line in sys.stdin:  # it ends with the process that writes it
    (kept.add if line[0] == "+" else kept.discard)(int(line[1:]))
for group in kept:
    kill_group(group)
"""


def kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


class Keeper:
    """A process that outlives this one, however it ends, and then kills the process groups still kept."""

    def __init__(self, root: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    def keep(self, group: int) -> None:
        self._tell(f"+{group}\n")

    def release(self, group: int) -> None:
        self._tell(f"-{group}\n")

    def close(self) -> None:
        self.process.communicate()

    def _tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

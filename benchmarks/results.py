"""Results as JSON lines, each with the device, the versions, the commit and the date."""

import contextlib
import datetime
import importlib
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton

from topk_rkl import backends

FOLDER = Path(__file__).parent / "results"

Line = dict[str, Any]


def setting(device: str) -> Line:
    # What is measured anew is no change.
    changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    shared: Line = {
        "date": datetime.date.today().isoformat(),
        "commit": (git("rev-parse", "HEAD") or "unknown") + ("-dirty" if changed else ""),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if device == "cpu" and backends.unavailable("native") is None:
        native = importlib.import_module("topk_rkl._native")
        shared |= {"build": native.BUILD, "isa": native.isa()}
    return shared


def git(*arguments: str) -> str:
    """What it says, or nothing outside a repository."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=FOLDER).stdout.strip()


def cpu_name() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = f"{names[0]}, {len(names)} cores" if names else name
    return f"{name}, {torch.get_num_threads()} threads"


def append(line: Line, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def load(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text().splitlines()]

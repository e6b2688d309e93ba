"""Results as JSON lines, each with the device, the versions, the commit and the date.

The environment variable COMMIT names the commit where the repository did not come along, or is behind.
"""

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

from gpu.commit import commit
from topk_rkl import backends

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "results"

Line = dict[str, Any]


def setting(device: str) -> Line:
    shared: Line = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(ROOT),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if device == "cuda":
        shared |= {"cuda": torch.version.cuda, "driver": driver()}
    if device == "cpu" and backends.unavailable("native") is None:
        native = importlib.import_module("topk_rkl._native")
        shared |= {"build": native.BUILD, "isa": native.isa()}
    return shared


def is_clean(commit: str) -> bool:
    """Whether it names a state that can be checked out."""
    return re.fullmatch(r"[0-9a-f]{7,40}", commit) is not None


def driver() -> str:
    """That of the first GPU, as in "580.65.06"."""
    found = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return found[0] if found else "unknown"


def said(*command: str) -> str:
    """What the command prints; nothing where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""


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

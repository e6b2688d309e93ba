"""What this machine is: the card and its driver, versions, tools. One JSON line; exit 1 where torch cannot use a GPU.

python -m gpu.card FILE [--small]    with --small, in a rehearsal, no GPU is asked for
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from gpu.lines import Line, append

QUERY = "name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.mem"
PACKAGES = (
    "torch", "triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "pybind11", "cmake", "ninja",
)  # fmt: skip
TOOLS = {
    "nvidia-smi": ("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"),
    "nvcc": ("nvcc", "--version"),
    "ncu": ("ncu", "--version"),
    "compute-sanitizer": ("compute-sanitizer", "--version"),
}


def tool(*command: str) -> str:
    """The last line that it prints, or why there is none."""
    if not shutil.which(command[0]):
        return "not installed"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return "did not answer"
    return ((done.stdout + done.stderr).strip().splitlines() or [f"exit {done.returncode}"])[-1]


def package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def capability() -> str | None:
    """Such as "9.0", by the driver."""
    found = tool(*TOOLS["nvidia-smi"]).split(", ")
    return found[2] if len(found) == QUERY.count(",") + 1 else None


def card() -> Line:
    """What torch says of the GPU, with nothing where it has none."""
    try:
        import torch

        if not torch.cuda.is_available():
            return {}
        properties = torch.cuda.get_device_properties(0)
        torch.ones(1, device="cuda").sum().item()
    except Exception as error:  # a card that is there and does not work
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "name": properties.name,
        "cores": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
    }


def main() -> int:
    found = {
        "card": card(),
        "commit": os.environ.get("COMMIT", "unknown"),
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "processors": os.cpu_count(),
        **{name: tool(*command) for name, command in TOOLS.items()},
        **{name: package(name) for name in PACKAGES},
    }
    append(Path(sys.argv[1]), found)
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n", flush=True)
    return 0 if "cores" in found["card"] or "--small" in sys.argv else 1


if __name__ == "__main__":
    sys.exit(main())

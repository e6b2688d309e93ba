"""`python -m gpu.items`: every item in the order of its worth, or seven launches for a profiler."""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import records
from gpu.items.inputs import FULL, PROFILED, SMALL, Inputs
from gpu.items.records import FLOORS, Records
from gpu.items.registry import profiled, registry
from gpu.items.runner import run, unable
from gpu.items.timing import Clock


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu.items", description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="the file that lines are appended to; without it they are printed alone"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="the items whose name contains it, and the floors")
    parser.add_argument("--skip-done", action="store_true", help="go on after what is in the file")
    parser.add_argument("--small", action="store_true", help="small sizes, for a rehearsal on a CPU")
    parser.add_argument("--rounds", type=int, help="turns that each form takes: 12, and with --small 1")
    parser.add_argument("--ncu", action="store_true", help="seven launches, and nothing else")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        parser.error("torch finds no GPU; pass --small and set TRITON_INTERPRET=1 to rehearse on a CPU")
    if options.ncu:
        return profile(Inputs(SMALL if options.small else PROFILED, device))
    items = registry(Inputs(SMALL if options.small else FULL, device))
    chosen = [item for item in items if options.only in item.name or item.name in FLOORS]
    clock = Clock(device, options.rounds or (1 if options.small else 12))
    return run(chosen, Records(options.out, records.setting(device)), clock, options.skip_done)


def profile(inputs: Inputs) -> int:
    """Exit code 1 if a backend could not run: there are fewer launches then."""
    failed = 0
    for backend, item in profiled(inputs):
        form = item.forms[backend]
        if reason := unable(form):
            print(f"left out {item.name} {backend}: {reason}", file=sys.stderr)
            failed = 1
        else:
            form.call(0)
    if inputs.device == "cuda":
        torch.cuda.synchronize()
    return failed


if __name__ == "__main__":
    sys.exit(main())

"""Every proof that needs a GPU, in one time-boxed command: python3 -m gpu first, then second, then beside.

Environment: LIMIT, seconds in all (480); OUT, the folder of the results (out); COMMIT, before what git says.
The exit code is 1 if a step failed, was stopped or was left out. Every step is tried all the same.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from gpu import extension, plan
from gpu.commit import commit
from gpu.steps import Run, Step
from gpu.summary import summary

ROOT = Path(__file__).parent.parent
LIMIT = 480


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored, which children inherit
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(prog="python3 -m gpu", description=__doc__.splitlines()[0])
    parser.add_argument("plan", choices=("first", "second", "beside"))
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="only these, such as: smoke tests")
    parser.add_argument("--small", action="store_true", help="a rehearsal on a CPU, in the interpreter, at small sizes")
    options = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / "out").resolve()
    steps = plan.steps(options.plan, out, options.small)
    kinds = list(dict.fromkeys(step.kind for step in steps))
    if unknown := set(options.steps or ()) - set(kinds):
        parser.error(f"--steps: {options.plan} has no {', '.join(sorted(unknown))}; use some of {', '.join(kinds)}")
    return perform([step for step in steps if step.kind in (options.steps or kinds)], out, options.small)


def perform(steps: list[Step], out: Path, small: bool) -> int:
    sha = commit(ROOT)
    with Run(float(os.environ.get("LIMIT") or LIMIT), out, ROOT, plan.environment(ROOT, sha, small)) as run:
        run.step(plan.card(out, small))
        built = small and extension.is_taken()
        building = None if small else run.begin(plan.made())
        for step in steps:
            if building and step.name != plan.BESIDE:
                built, building = run.end(building), None
            if step.name in plan.NEED_EXTENSION and not built:
                run.leave_out(step.name, "NO EXTENSION, see output.txt")
            else:
                run.step(step)
        if building:
            run.end(building)
    print(summary(out, run.outcomes, sha))
    return 1 if any(line["exit"] for line in run.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())

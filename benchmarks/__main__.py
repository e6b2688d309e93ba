"""`python -m benchmarks run` and `scaling` measure, `collect` takes in a GPU's results, `report` tells."""

import argparse
import os
from pathlib import Path

from benchmarks.cases import SUITES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="time and memory beside others, as JSON lines under benchmarks/results")
    run.add_argument("--suite", choices=SUITES, default="cpu")
    names = dict.fromkeys(case.name for cases in SUITES.values() for case in cases)
    run.add_argument("--case", action="append", choices=names, help="only these; `tiny` ends in seconds")
    run.add_argument("--against", metavar="GITREF", help="also this package as it was at that commit")
    run.add_argument("--only-ours", action="store_true", help="without other projects and torch.compile")
    run.add_argument("--rounds", type=int, default=15)
    run.add_argument("--seconds", type=float, default=2.5, help="a contestant's time for a case, past three rounds")
    run.add_argument("--threads", type=int, default=os.cpu_count(), help="of a CPU")
    run.add_argument("--out", type=Path, help="the file that lines are appended to")
    report = commands.add_parser("report", help="tables and plots from benchmarks/results")
    report.add_argument(
        "files", type=Path, nargs="*", help="files whose marked tables alone are written; else all, and plots"
    )
    collect = commands.add_parser("collect", help="results of the GPU kit into benchmarks/results")
    collect.add_argument("folder", type=Path, help="what the kit calls OUT")
    scaling = commands.add_parser("scaling", help="the model of docs/scaling.md beside 1 to 4 processes with gloo")
    scaling.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4], choices=range(1, 5))
    scaling.add_argument("--rounds", type=int, default=15)
    scaling.add_argument("--tiny", action="store_true", help="small sizes, to check the harness")
    scaling.add_argument("--out", type=Path, help="the file that is written anew")
    options = parser.parse_args()
    # Imported when asked for: the process that measures starts anew first.
    if options.command == "run":
        from benchmarks import measure

        measure.start_anew()
        from benchmarks.run import run as command
    elif options.command == "collect":
        from benchmarks.collect import collect as command
    elif options.command == "scaling":
        from benchmarks.scaling.gloo import measure as command
    else:
        from benchmarks.report import report as command
    command(options)


if __name__ == "__main__":
    main()

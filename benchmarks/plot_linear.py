"""`python -m benchmarks.plot_linear RESULTS OUT.png`: the scaling that `benchmarks.linear_cpu --out RESULTS` measured.

A panel for each size, with every time measured and the line that least squares put through the logarithms.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

AXES = {"n": "positions N", "k": "tokens a position K", "h": "hidden size H", "v": "vocabulary V"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.results.read_text().splitlines()]
    lines = [line for line in lines if line["work"] == "scaling"]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        sizes, times = zip(*((line[axis], line["median_ms"]) for line in lines if line["axis"] == axis), strict=True)
        slope, start = statistics.linear_regression([math.log(x) for x in sizes], [math.log(x) for x in times])
        ends = min(sizes), max(sizes)
        panel.plot(ends, [math.exp(start) * x**slope for x in ends], color="0.6", linewidth=1)
        panel.plot(sizes, times, "o", markersize=5)
        panel.set(xscale="log", yscale="log", xlabel=label, title=f"time ~ ${axis.upper()}^{{{slope:.2f}}}$")
        ticks = sorted(set(sizes))
        panel.set_xticks(ticks, [f"{x:,}" for x in ticks], rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        panel.xaxis.minorticks_off()
        panel.grid(color="0.9")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panels[0].yaxis.minorticks_off()
    panels[0].set_ylabel("forward and backward, ms")
    figure.align_xlabels()
    figure.suptitle(
        f"{lines[0]['dtype']}, frozen head, {lines[0]['backend']} backend, {lines[0]['device']}", fontsize=9
    )
    figure.savefig(options.out, dpi=150)


if __name__ == "__main__":
    main()

"""The picture of the study `control`, from its record alone."""

import statistics
from typing import TYPE_CHECKING

from examples.paper.control.experiment import GAMMAS, RATE
from examples.paper.control.page import curves
from examples.paper.study import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLACES = (-30, -10, -3, 0, 3, 10, 30)  # named on the axis of positions
STYLES = ("-", "--", ":", "-.")  # of the learning rates


def draw(record: Record) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colours = dict(zip(GAMMAS, ("tab:blue", "tab:cyan", "tab:green", "tab:orange", "tab:red")))
    for positions in record["teacher"]["path"].values():
        right.plot(positions, color="0.75", linewidth=6)
    styles = STYLES[: len(record["rates"])]
    for rate, style in zip(map(float, record["rates"]), styles, strict=True):
        found = record["rates"][str(rate)]
        for gamma in map(float, found["gammas"]):
            for axes, name in ((left, "variance"), (middle, "kl")):
                medians = [statistics.median(values) for values in zip(*curves(record, gamma, name, rate))]
                label = f"gamma {gamma:g}" if rate == RATE else None
                axes.plot(found["iterations"], medians, style, color=colours[gamma], label=label)
        for gamma, tasks in found["paths"].items():
            for task, positions in tasks.items():
                label = f"lr {rate:g}" if gamma == "0.0" and task == "left" else None
                right.plot(positions, style, color=colours[float(gamma)], label=label)
    left.set(yscale="log", xlabel="iteration", ylabel="E|g - mean|^2, output layer", title="variance, median of seeds")
    middle.set(
        yscale="log", xlabel="iteration", ylabel="nats per step", title="KL(student || teacher), median of seeds"
    )
    right.set_yscale("symlog", linthresh=6, linscale=2)  # drifted walks lead far away
    right.set_yticks(PLACES, map(str, PLACES))
    right.set(xlabel="time (steps)", ylabel="mean position")
    right.set_title(f"paths, seed {record['seeds'][0]} (grey: teachers)")
    right.legend(fontsize=8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(GAMMAS))
    return figure

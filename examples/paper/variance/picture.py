"""The picture of the study `variance`, from its record alone."""

import statistics
from typing import TYPE_CHECKING

from examples.paper.study import Record
from examples.paper.variance.experiment import CASES, ESTIMATORS, GAMMAS
from examples.paper.variance.page import biases, squared_error, variances

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = dict(zip(ESTIMATORS, ("tab:blue", "tab:cyan", "tab:green", "tab:orange", "tab:red")))
SHADES = {0.25: "0.7", 0.75: "0.4"} | {gamma: COLOURS[name] for name, gamma in ESTIMATORS.items()}  # by gamma


def draw(record: Record) -> "Figure":
    from matplotlib.figure import Figure

    lengths, runs = record["size"]["lengths"], record["runs"]
    figure = Figure(figsize=(10.5, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, colour in COLOURS.items():
        for case, style in zip(CASES, ("-", ":")):
            medians = [statistics.median(variances(record, case, name, at)) for at in range(len(lengths))]
            left.plot(lengths, medians, style, color=colour, label=name if case == "mixing" else None)
    left.set(xscale="log", yscale="log", xlabel="T (tokens)", ylabel="E|g - mean|^2")
    left.set_title("variance (dotted: chain of halves)")
    for gamma in GAMMAS[:-1]:
        medians = [statistics.median(biases(record, gamma, at)) for at in range(len(lengths))]
        middle.plot(lengths, medians, marker=".", color=SHADES[gamma], label=f"gamma {gamma:g}")
    middle.set(xscale="log", xlabel="T (tokens)", ylabel="|bias| / |gradient|", ylim=(0, None), title="bias")
    middle.legend(fontsize=8)
    sequences = [2.0**power for power in range(17)]
    for name, colour in COLOURS.items():
        errors = [squared_error(record, name, -1, n) for n in sequences]
        right.plot(sequences, errors, color=colour)
    right.set(xscale="log", yscale="log", xlabel="sequences in the mean", ylabel="E|mean - gradient|^2 / |gradient|^2")
    right.set_title(f"error at T = {lengths[-1]}, median of {len(runs)} seeds")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS))
    return figure

"""The picture of the study `method`, from its record alone."""

from typing import TYPE_CHECKING

from examples.paper.method.experiment import METHOD
from examples.paper.method.page import outcome
from examples.paper.method.task import VOCAB
from examples.paper.method.training import SAMPLERS
from examples.paper.study import Record
from examples.paper.summary import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BY_K = {1: "K = 1", 4: "K = 4", 8: "K = 8", 12: "K = 12", 16: "K = 16", 32: METHOD, 48: "K = 48", VOCAB: "K = V"}
BY_TOP_P = {0.8: "top-p = 0.8", 0.9: METHOD, 1.0: "top-K"}
COLOURS = {"sampled + mask": "tab:orange", METHOD: "tab:blue", "not renormalised": "tab:red", "tail": "tab:green"}


def draw(record: Record) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.8, 5.4), layout="constrained")
    axes = figure.subplot_mosaic([["score", "mass", "norm"], ["score", "k", "top_p"]], width_ratios=[1.25, 1, 1])
    draw_scores(axes["score"], record)
    for place, what, title in (
        ("mass", "mass", "P_S: mass on the top 32"),
        ("norm", "grad_norm", "gradient norm, nats"),
    ):
        for name, colour in COLOURS.items():
            curves = record["runs"][name]["curves"]
            axes[place].plot(curves["step"], curves[what], color=colour, label=name, linewidth=2)
        axes[place].set(xlabel="step", title=title)
    axes["mass"].set(ylim=(0, 1.05))
    axes["mass"].legend(loc="center right")
    axes["norm"].set(yscale="log")
    axes["norm"].tick_params(which="minor", labelleft=False)
    draw_setting(axes["k"], record, BY_K, "K")
    draw_setting(axes["top_p"], record, BY_TOP_P, "top-p")
    axes["k"].set(ylabel="exact answers, %")
    axes["top_p"].legend(title="answers sampled at", loc="lower left")
    for each in axes.values():
        each.spines[["top", "right"]].set_visible(False)
    return figure


def draw_scores(axes: "Axes", record: Record) -> None:
    """The methods from top to bottom, and where teacher and student are."""
    names = [name for name in record["runs"] if not name.startswith(("K = ", "top-p = "))]
    means, halves = zip(*(interval([100 * x for x in outcome(record, name)["score"]]) for name in names))
    colours = [COLOURS.get(name, "0.7") for name in names]
    axes.barh(names, means, xerr=halves, color=colours, error_kw={"elinewidth": 1.2, "capsize": 3})
    for name, style in (("student", ":"), ("teacher", "--")):
        mean, _ = interval(outcome(record, name)["score"])
        axes.axvline(100 * mean, color="black", linestyle=style)
        axes.text(100 * mean, -0.7, f" {name} ", ha="right" if mean > 0.5 else "left")
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="exact answers, %", title="score, with 95 % intervals")


def draw_setting(axes: "Axes", record: Record, runs: dict, label: str) -> None:
    """The method with another K, or another top-p."""
    places = [str(value) for value in runs]
    for sampler, style in (("nucleus", "s--"), ("score", "o-")):
        means, halves = zip(*(interval([100 * x for x in outcome(record, name)[sampler]]) for name in runs.values()))
        drawn = f"top-p {SAMPLERS[sampler]:g}"
        axes.errorbar(places, means, halves, fmt=style, color=COLOURS[METHOD], capsize=3, label=drawn)
    axes.set(ylim=(0, 100), xlabel=f"{label} of the training", title=f"score by {label}")

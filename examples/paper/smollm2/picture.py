"""The picture of the study `smollm2`, from its record alone."""

import statistics
from typing import TYPE_CHECKING

from examples.paper.smollm2.page import after, part_seconds, runs
from examples.paper.study import Record
from examples.paper.summary import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(record: Record) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 6.6), layout="constrained")
    (divergence, right), (mass, time) = figure.subplots(2, 2)
    colours = {name: f"C{place}" for place, name in enumerate(record["size"]["objectives"])}
    for name, colour in colours.items():
        curve(divergence, record, "text", name, "full", colour)
        curve(mass, record, "questions", name, "student_mass", colour)
    divergence.set(title="open text, a step's own answers", xlabel="step", ylabel="full reverse KL, nats")
    mass.set(title="questions, a step's own answers", xlabel="step", ylabel="student's mass on S")
    scores(right, record, colours)
    parts(time, record)
    handles, labels = divergence.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5), title="objective")
    return figure


def curve(axes: "Axes", record: Record, task: str, objective: str, field: str, colour: str) -> None:
    """The mean over seeds."""
    found = runs(record, task, objective)
    means = [statistics.fmean(column) for column in zip(*(run["curves"][field] for run in found))]
    axes.plot(found[0]["steps"], means, marker=".", color=colour, label=objective)


def scores(axes: "Axes", record: Record, colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        values = after(record, "questions", name, "score")
        mean, half = interval(values)
        axes.barh(name, mean, color=colour, height=0.6)
        if len(values) > 1:
            axes.errorbar(mean, name, xerr=half, color="0.2", capsize=4)
    levels = {"teacher": record["questions"]["teacher"], "before": record["questions"]["before"]["score"]}
    for (name, level), style in zip(levels.items(), ("--", ":")):
        axes.axvline(level, color="0.3", linestyle=style, label=name)
    axes.invert_yaxis()
    asked, seeds = record["questions"]["asked"], len(record["questions"]["seeds"])
    axes.set(
        title=f"{asked} held-back questions", xlabel=f"share right, 95 % intervals, seeds: {seeds}", xlim=(-0.02, 1)
    )
    axes.legend(fontsize="small")


def parts(axes: "Axes", record: Record) -> None:
    names, objectives = list(record["questions"]["runs"][0]["seconds"]), record["size"]["objectives"]
    left = [0.0] * len(objectives)
    for place, part in enumerate(names):
        widths = [part_seconds(record, "questions", objective)[part] for objective in objectives]
        axes.barh(objectives, widths, left=left, color=f"C{place + 3}", label=part, height=0.6)
        left = [a + b for a, b in zip(left, widths)]
    axes.invert_yaxis()
    axes.set(title="questions, a step's parts", xlabel="seconds, medians")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.22), ncols=3, fontsize="small")

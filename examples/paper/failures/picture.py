"""The picture of the study `failures`, from its record alone."""

import statistics
from typing import TYPE_CHECKING

from examples.paper.failures.page import FIVE_PERCENT, by_position, endings, ends, of_runs
from examples.paper.study import Record
from examples.paper.summary import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(record: Record) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.2), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for axes, panel in zip(panels, (draw_rewards, draw_positions, draw_loops, draw_ends)):
        panel(axes, record)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def draw_rewards(axes: "Axes", record: Record) -> None:
    histogram = record["histogram"]
    for name, colour, label in (
        ("reward", "tab:orange", "reward of the sampled token"),
        ("exact mean", "tab:blue", "its exact mean, -KL"),
    ):
        total = sum(histogram[name])
        axes.stairs([x / total for x in histogram[name]], histogram["edges"], color=colour, label=label)
    axes.axvline(0, color="0.7", linewidth=0.8)
    axes.set(
        yscale="log", xlabel="log q - log p, nats", ylabel="share of tokens", title="rewards", xticks=range(-15, 6, 5)
    )


def draw_positions(axes: "Axes", record: Record) -> None:
    """Means over seeds, with their confidence intervals."""
    size = record["size"]
    middle = [(b + 0.5) * size["length"] / size["buckets"] for b in range(size["buckets"])]
    for index, colour, label in (
        (3, "0.3", "median"),
        (2, "tab:green", "25 %"),
        (1, "tab:orange", "5 %"),
        (0, "tab:red", "1 %"),
    ):
        lines = [[bucket[index] for bucket in run["quantiles"]] for run in by_position(record, "positions")]
        draw_mean(axes, middle, lines, colour, label)
    lines = [[bucket[FIVE_PERCENT] for bucket in run["quantiles"]] for run in by_position(record, "nearer")]
    if lines:
        mean = [statistics.fmean(x) for x in zip(*lines)]
        axes.plot(middle, mean, linestyle="--", color="tab:orange", label=f"5 %, student of {size['nearer']} layers")
    axes.set(xlabel="position in the answer, tokens", ylabel="log q - log p, nats", title="quantiles of the reward")


def draw_loops(axes: "Axes", record: Record) -> None:
    """Means over seeds, with their confidence intervals."""
    for name, colour in {"teacher": "tab:blue", "student": "tab:orange"}.items():
        lines = of_runs(record, "loops", name)
        draw_mean(axes, list(range(len(lines[0]))), lines, colour, name)
    axes.set(xlabel="copies of the phrase before", ylabel="mean probability per token", title="loops", ylim=(0, 1))


def draw_mean(axes: "Axes", where: list[float], lines: list[list[float]], colour: str, label: str) -> None:
    if not lines:
        return
    mean, half = zip(*map(interval, zip(*lines)))
    axes.errorbar(where, mean, half if len(lines) > 1 else None, marker=".", color=colour, label=label, elinewidth=0.8)


def draw_ends(axes: "Axes", record: Record) -> None:
    """Means over seeds."""
    axes.set(ylabel="part of the answer's sum", title="the token that ends an answer")
    if not endings(record):
        return
    groups = [(teacher, "share") for teacher in ("matched", "spelled", "renamed")] + [("renamed", "masked share")]
    for place, (loss, colour, label) in enumerate(
        (
            ("reward", "tab:red", "abs(reward)"),
            ("sampled", "tab:orange", "squared gradient, sampled token"),
            ("topk", "tab:blue", "squared gradient, top-K loss"),
        )
    ):
        heights = [statistics.fmean(ends(record, teacher, name, loss)) for teacher, name in groups]
        where = [x + 0.27 * (place - 1) for x in range(len(groups))]
        axes.bar_label(axes.bar(where, heights, 0.25, color=colour, label=label), fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(groups)))
    axes.set_xticklabels(["matched", "spelled", "renamed", "renamed,\nmasked"])
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend

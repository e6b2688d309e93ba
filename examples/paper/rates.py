"""The learning rates of the study `method`: each run that has a rate of its own, at each rate, on seeds of its own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from examples.paper.method.experiment import FULL, RATES, RUNS
from examples.paper.method.training import Size, base, distil, judge
from examples.paper.study import Claim, Record, bar
from examples.paper.summary import Rows, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FULL", "SEEDS", "Size", "claims", "draw", "measure", "tables"]

SEEDS = (100, 101, 102)  # none of those of `method`
SWEPT = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def measure(size: Size, seeds: Sequence[int]) -> Record:
    models = base(size, seeds)
    scores: dict[str, list[list[float]]] = {name: [] for name in RATES}  # of a run: by rate, then by seed
    for name, rate in bar([(name, rate) for name in RATES for rate in SWEPT], "rates"):
        student, _ = distil(models, RUNS[name], rate, size, seeds)
        scores[name].append(judge(student, models.teacher, size, seeds)["score"])
    return {"rates": list(SWEPT), "scores": scores}


def means(record: Record, name: str) -> list[float]:
    """The score of a run at each rate."""
    return [interval(score)[0] for score in record["scores"][name]]


def best(record: Record, name: str) -> float:
    """The rate of the highest mean score, the smallest of equals."""
    scores = means(record, name)
    return record["rates"][scores.index(max(scores))]


def tables(record: Record) -> dict[str, Rows]:
    heading = ["exact, %, at a rate of", *(f"{rate:g}" for rate in record["rates"]), "best rate"]
    rows = [
        [name, *(f"{100 * mean:.1f}" for mean in means(record, name)), f"{best(record, name):g}"]
        for name in record["scores"]
    ]
    return {"scores": [heading, *rows]}


def claims(_: Record) -> list[Claim]:
    """None: this study only chooses."""
    return []


def draw(record: Record) -> "Figure":
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(record["scores"]):
        colour, style = colormaps["tab10"](index % 10), "-" if index < 10 else "--"
        scores = [100 * mean for mean in means(record, name)]
        axes.plot(record["rates"], scores, color=colour, linestyle=style, marker=".", label=name)
    axes.set(xscale="log", xlabel="learning rate", ylabel="exact answers, %", title="score by learning rate")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure

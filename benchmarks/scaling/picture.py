"""The picture of docs/scaling.md, an SVG: how far each step scales, and how long each design takes."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from benchmarks.plots import saved
from benchmarks.records import FOLDER
from benchmarks.scaling.collectives import designs
from benchmarks.scaling.cost import RANKS
from benchmarks.scaling.model import LINKS, STEPS, design_seconds, efficiency, overlapped, scaling, seconds
from benchmarks.scaling.tables import PUBLISHED, TARGETS, VOCAB, K

FILE = FOLDER / "scaling.svg"
COLOURS = {"heads": "tab:blue", "loss": "tab:cyan"}
DASHES = {"NVLink": "-", "InfiniBand": "--"}
NAMES = {"heads": "both heads and the loss", "loss": "the loss alone, from logits"}
GREYS = ("0.7", "0.55", "0.4", "0.55", "0.0", "0.3")
MARKS = (".-", "s--", "^-", "v--", "x-", "d--")


def draw() -> None:
    FILE.write_bytes(svg())


def svg() -> bytes:
    return saved(figure)


def figure() -> Figure:
    drawn = Figure(figsize=(13, 4.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    efficiencies(left)
    times(right)
    for panel in (left, right):
        panel.set(xscale="log", xlabel="ranks that share the vocabulary")
        panel.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
        panel.xaxis.minorticks_off()
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return drawn


def efficiencies(panel: Axes) -> None:
    step, nvlink = STEPS["heads"], LINKS["NVLink"]
    alone = seconds(step, VOCAB, 1, K, nvlink)
    hidden = [efficiency(alone, overlapped(step, VOCAB, ranks, K, nvlink), ranks) for ranks in RANKS]
    label = "both heads and the loss, NVLink,\nhidden gradient overlapped"
    panel.plot(RANKS, hidden, ":", color=COLOURS["heads"], label=label)
    for name, colour in COLOURS.items():
        for link_name, link in LINKS.items():
            shares = [scaling(STEPS[name], VOCAB, ranks, K, link) for ranks in RANKS]
            panel.plot(RANKS, shares, DASHES[link_name], color=colour, label=f"{NAMES[name]}, {link_name}")
    panel.plot(*points(PUBLISHED), "s:", color="0.5", label="Liger, head and cross-entropy,\nas reported")
    panel.plot(*points(TARGETS), "k_", markersize=14, label="target")
    panel.set(ylim=(0, 1.15))
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    panel.set_title("scaling efficiency T(1) / (w T(w)), predicted for H100", fontsize=9, loc="left")


def points(shares: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(shares), list(shares.values())


def times(panel: Axes) -> None:
    link = LINKS["NVLink"]
    for i, design in enumerate(designs(2, K, VOCAB)):
        took = [1e3 * design_seconds(designs(ranks, K, VOCAB)[i], VOCAB, ranks, link) for ranks in RANKS]
        colour = "tab:blue" if i == 0 else GREYS[i - 1]
        panel.plot(RANKS, took, "o-" if i == 0 else MARKS[i - 1], color=colour, label=design.name.replace("`", ""))
    panel.set(yscale="log")
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.set_title("the student's loss and gradient, ms, by each design over NVLink", fontsize=9, loc="left")

"""The picture of docs/scaling.md, an SVG: how far each step scales, and how long each design takes."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from benchmarks.plots import saved
from benchmarks.records import FOLDER
from benchmarks.scaling.collectives import designs
from benchmarks.scaling.cost import RANKS
from benchmarks.scaling.model import LINKS, STEPS, design_seconds, scaling
from benchmarks.scaling.tables import PUBLISHED, TARGETS, VOCAB, K

FILE = FOLDER / "scaling.svg"
COLOURS = {"heads": "tab:blue", "loss": "tab:cyan"}
DASHES = {"NVLink": "-", "InfiniBand": "--"}
NAMES = {"heads": "both heads and the loss", "loss": "the loss alone, from logits"}
GREYS = ("0.75", "0.6", "0.45", "0.3", "0.15", "0.0")


def draw() -> None:
    FILE.write_bytes(svg())


def svg() -> bytes:
    return saved(figure)


def figure() -> Figure:
    drawn = Figure(figsize=(12, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    efficiencies(left)
    times(right)
    for panel in (left, right):
        panel.set(xscale="log", xlabel="ranks that share the vocabulary")
        panel.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
        panel.xaxis.minorticks_off()
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    return drawn


def efficiencies(panel: Axes) -> None:
    for name, colour in COLOURS.items():
        for link_name, link in LINKS.items():
            shares = [scaling(STEPS[name], VOCAB, ranks, K, link) for ranks in RANKS]
            panel.plot(RANKS, shares, DASHES[link_name], color=colour, label=f"{NAMES[name]}, {link_name}")
    reported = {"color": "0.5", "label": "Liger, head and cross-entropy, as reported"}
    panel.plot(*zip(*PUBLISHED.items(), strict=True), "s:", **reported)
    panel.plot(*zip(*TARGETS.items(), strict=True), "k_", markersize=14, label="target")
    panel.set(ylim=(0, 1.15))
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    panel.set_title("scaling efficiency T(1) / (w T(w)), predicted for H100", fontsize=9, loc="left")


def times(panel: Axes) -> None:
    link = LINKS["NVLink"]
    for i, design in enumerate(designs(2, K, VOCAB)):
        took = [1e3 * design_seconds(designs(ranks, K, VOCAB)[i], VOCAB, ranks, link) for ranks in RANKS]
        colour = "tab:blue" if i == 0 else GREYS[i - 1]
        panel.plot(RANKS, took, "o-" if i == 0 else ".-", color=colour, label=design.name.replace("`", ""))
    panel.set(yscale="log")
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.set_title("the student's loss and gradient, ms, by each design over NVLink", fontsize=9, loc="left")

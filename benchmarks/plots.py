"""The pictures of a suite's results: time against each size, memory against positions, share of the floor."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from benchmarks.fit import line, points
from benchmarks.records import FOLDER
from benchmarks.summaries import NAMES, contests, label, middle

AXES = {"n": "positions N", "k": "tokens a position K", "v": "vocabulary V", "h": "hidden size H"}
COLOURS = {"topk_rkl": "tab:blue", "plain": "tab:orange"}
WORKS = {"loss": "from logits", "linear": "from hidden states, frozen head"}


def draw(suite: str) -> None:
    scaling = contests(suite, ["scaling"])
    if scaling:
        growth(scaling).savefig(FOLDER / f"{suite}_scaling.png", dpi=150)
        memory(scaling).savefig(FOLDER / f"{suite}_memory.png", dpi=150)
    floors(suite).savefig(FOLDER / f"{suite}_floor.png", dpi=150)


def growth(scaling: list) -> Figure:
    """A panel for each work and size, with every time measured and the line that least squares put through them."""
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    panels = figure.subplots(len(WORKS), len(AXES), sharey="row")
    for (work, name, axis), times in points(scaling).items():
        panel = panels[list(WORKS).index(work)][list(AXES).index(axis)]
        slope, factor = line(times)
        sizes = sorted(times)
        ends = sizes[0], sizes[-1]
        panel.plot(ends, [factor * x**slope for x in ends], color=COLOURS[name], linewidth=1)
        panel.plot(
            sizes,
            [times[x] for x in sizes],
            "o",
            color=COLOURS[name],
            label=f"{NAMES[name]}, ${axis.upper()}^{{{slope:.2f}}}$",
        )
        panel.set(xscale="log", yscale="log")
        mark_sizes(panel, axis, sizes)
    for panel in panels.flat:
        panel.set_visible(panel.has_data())
    for row, title in zip(panels, WORKS.values(), strict=True):
        mark_values(row[0])
        row[0].set_ylabel(f"{title}\nforward and backward, ms")
    figure.suptitle(setting(scaling), fontsize=9)
    return figure


def memory(scaling: list) -> Figure:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for panel, (work, title) in zip(figure.subplots(1, len(WORKS)), WORKS.items(), strict=True):
        found = [(case, contest) for case, contest in scaling if (case["axis"], case["work"]) == ("n", work)]
        sizes = [case["n"] for case, _ in found]
        for name, colour in COLOURS.items():
            peaks = [middle(contest[name], "peak_bytes") / 2**20 for _, contest in found]
            panel.plot(sizes, peaks, "o-", linewidth=1, color=colour, label=NAMES[name])
        panel.set(title=title, ylabel="peak beyond the inputs, MiB", xscale="log", yscale="log")
        mark_sizes(panel, "n", sizes)
        mark_values(panel)
    figure.suptitle(setting(scaling), fontsize=9)
    return figure


def mark_sizes(panel: Axes, axis: str, sizes: list[int]) -> None:
    panel.set_xticks(sizes, [f"{x:,}" for x in sizes], rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    panel.xaxis.minorticks_off()
    panel.set_xlabel(AXES[axis])
    panel.grid(color="0.9")
    panel.legend(fontsize=8)


def mark_values(panel: Axes) -> None:
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.minorticks_off()


def floors(suite: str) -> Figure:
    """How near this package and the fastest rival come to only moving the bytes."""
    found = contests(suite, ["select", "loss", "loss on ids", "linear", "linear memory", "small N"])
    figure = Figure(figsize=(9, 0.6 + 0.42 * len(found)), layout="constrained")
    panel = figure.subplots()
    for place, (_, contest) in enumerate(reversed(found)):
        shares = {name: 1 / middle(lines, "over_floor") for name, lines in contest.items() if "over_floor" in lines[-1]}
        rivals = {name: s for name, s in shares.items() if name != "floor" and not name.startswith("topk_rkl")}
        panel.barh(place + 0.2, shares.get("topk_rkl", 0), 0.36, color=COLOURS["topk_rkl"])
        if rivals:
            best = max(rivals, key=rivals.get)
            bar = panel.barh(place - 0.2, rivals[best], 0.36, color="0.7")
            panel.bar_label(bar, [NAMES.get(best, best).replace("`", "")], fontsize=7, padding=3)
    panel.axvline(1, color="0.4", linewidth=1)
    names = [
        f"{label(case).replace('`', '')}\nN {case['n']:,}, V {case['v']:,}, K {case['k']}, {case['dtype']}"
        for case, _ in found
    ]
    panel.set_yticks(range(len(found)), reversed(names), fontsize=7)
    panel.set(xlabel="share of the floor: 1 is only moving the bytes that must move; grey is the fastest rival")
    figure.suptitle(setting(found), fontsize=9)
    return figure


def setting(found: list) -> str:
    last = found[-1][1]["topk_rkl"][-1]
    return f"{last['device']}, torch {last['torch']}"

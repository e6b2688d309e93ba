"""The pictures of a suite's results.

    SUITE_linear.svg     the README's: time and memory of the loss from hidden states beside others
    SUITE_scaling.png    time against each size
    SUITE_memory.png     memory against the number of positions
    SUITE_floor.png      share of the floor

Equal results give equal files under one version of matplotlib.
"""

from collections.abc import Callable
from io import BytesIO

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, StrMethodFormatter

from benchmarks.fit import line, points
from benchmarks.records import FOLDER
from benchmarks.summaries import NAMES, NOTES, PYTORCH_ALONE, Bar, contests, label, median_of, picture, sizes

AXES = {"n": "positions N", "k": "tokens a position K", "v": "vocabulary V", "h": "hidden size H"}
COLOURS = {"topk_rkl": "tab:blue", "plain": "tab:orange"}
OWNERS = {"this package": "tab:blue", "PyTorch alone": "tab:orange", "another project": "0.65"}
WORKS = {"loss": "from logits", "linear": "from hidden states, frozen head"}


# The text of an SVG file stays text, and its ids do not change from run to run.
SVG = {"svg.fonttype": "none", "svg.hashsalt": "topk_rkl", "font.family": "sans-serif"}


def draw(suite: str) -> None:
    if contests(suite, ["linear memory"]):
        (FOLDER / f"{suite}_linear.svg").write_bytes(svg(suite))
    scaling = contests(suite, ["scaling"])
    if scaling:
        growth(scaling).savefig(FOLDER / f"{suite}_scaling.png", dpi=150)
        memory(scaling).savefig(FOLDER / f"{suite}_memory.png", dpi=150)
    floors(suite).savefig(FOLDER / f"{suite}_floor.png", dpi=150)


def svg(suite: str) -> bytes:
    return saved(lambda: beside_others(suite))


def saved(figure: Callable[[], Figure]) -> bytes:
    """As SVG; what it draws falls under the settings above."""
    file = BytesIO()
    with rc_context(SVG):
        figure().savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def beside_others(suite: str) -> Figure:
    """Two panels of horizontal bars on logarithmic axes, shortest first, and a legend below the second."""
    panels = picture(suite)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    places = [len(bars) for _, bars in panels.values()]
    grid = figure.add_gridspec(2, 2, height_ratios=(places[1] + 1, places[0] - places[1]))
    titles = {"time": "time, ms", "memory": "peak memory beyond the inputs, MiB"}
    for place, (name, (case, bars)) in zip((grid[:, 0], grid[0, 1]), panels.items(), strict=True):
        panel = figure.add_subplot(place)
        draw_bars(panel, bars)
        panel.set_title(f"{titles[name]}\n{sizes(case)}", fontsize=9, loc="left")
    legend = figure.add_subplot(grid[1, 1])
    legend.set_axis_off()
    patches = [Patch(color=colour, label=label) for label, colour in OWNERS.items()]
    notes = [Patch(alpha=0, label=f"{mark} {note}") for mark, note in NOTES.items()]
    # Where the names of the bars above begin.
    legend.legend(
        handles=patches + notes, loc="lower left", bbox_to_anchor=(-0.6, 0), frameon=False, fontsize=9, handlelength=1
    )
    return figure


def draw_bars(panel: Axes, bars: list[Bar]) -> None:
    values = [bar.value for bar in bars]
    start = min(values) / 2
    colours = [OWNERS[owner(bar.contestant)] for bar in bars]
    drawn = panel.barh(range(len(bars)), [value - start for value in values], 0.7, start, color=colours)
    panel.bar_label(drawn, [bar.text for bar in bars], padding=3, fontsize=9)
    panel.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=9)
    panel.set(xscale="log", xlim=(start, max(values) * 8), ylim=(len(bars) - 0.4, -0.6))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    panel.xaxis.minorticks_off()
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)


def owner(contestant: str) -> str:
    if contestant.startswith("topk_rkl"):
        return "this package"
    return "PyTorch alone" if contestant in PYTORCH_ALONE else "another project"


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
            peaks = [median_of(contest[name], "peak_bytes") / 2**20 for _, contest in found]
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
        shares = {
            name: 1 / median_of(lines, "over_floor") for name, lines in contest.items() if "over_floor" in lines[-1]
        }
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

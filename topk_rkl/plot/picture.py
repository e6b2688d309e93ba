"""A report as a PNG: the coloured text, and below it both distributions at some positions."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from topk_rkl import checks
from topk_rkl.plot import colours
from topk_rkl.plot.page import LEGEND, require_path
from topk_rkl.plot.report import Position, TokenReport, require_report

WIDTH, DPI = 11.0, 150  # inches, dots per inch
HEAD, MARGIN, LINE, HEADING = 0.85, 0.35, 0.25, 0.36  # inches: the title, the border, lines of text and of a heading
PANEL, GAP = 2.5, 0.014  # inches: a row of charts, between tokens
COLUMNS, SHOWN = 3, 3  # charts per row, and charts by default
BARS = 8  # slots per chart
LINES = 80  # of text; those far from the positions are left out, and said to be
SIZE = 9.5  # points
FAINT = "#5c6470"
MONOSPACE = ("DejaVu Sans Mono", "monospace")


class Word(NamedTuple):
    """What is drawn at once: a token, or the heading of a sequence."""

    text: str
    sequence: int
    position: int | None  # None where none that counts predicts it
    x: float  # inches from the left
    width: float  # inches; 0 of a heading


def save_png(report: TokenReport, path: str | Path, positions: Sequence[Position] | None = None) -> None:
    """Draws the text with the loss of each token, and below it p and q on S at some positions.

    The text is that of the sequences in which the positions are; `save_html` shows all. 80 lines of it are drawn, those
    around the first position of each sequence; the picture says how many tokens are left out. Characters that the font
    of matplotlib lacks are boxes.

    Args:
        report: what `token_report` gives.
        path: of the file, which is written anew as a PNG. Its folder must exist.
        positions: (sequence, position) pairs, each with a chart of the 8 tokens that are largest there. None takes the
            worst 3.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing has been written.
        ModuleNotFoundError: matplotlib is missing; pip install 'topk-rkl[plot]'.
    """
    require_report(report)
    chosen = report.worst(SHOWN) if positions is None else _require_positions(positions, report)
    path = require_path(path)
    matplotlib = _matplotlib()
    settings = {"font.family": ["DejaVu Sans", "sans-serif"], "text.parse_math": False}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        _figure(report, chosen).savefig(path, format="png", dpi=DPI, facecolor=colours.PAPER[0])


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"save_png needs {missing.name}; run pip install 'topk-rkl[plot]', or use save_html, which needs nothing",
            name=missing.name,
        ) from None
    return matplotlib


def _require_positions(positions: object, report: TokenReport) -> list[Position]:
    if isinstance(positions, (str, bytes)) or not isinstance(positions, Sequence):
        raise TypeError(f"positions is {checks.seen(positions)}; it must be a list of (sequence, position) pairs")
    found = []
    for i, pair in enumerate(positions):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"positions[{i}] is {checks.seen(pair)}; it must be a (sequence, position) pair")
        at = tuple(checks.require_integer(f"positions[{i}]", x) for x in pair)
        for name, value, size in zip(("sequence", "position"), at, report.loss.shape):
            if not 0 <= value < size:
                raise ValueError(f"positions[{i}] is {at}; its {name} must be from 0 to {size - 1}")
        if not report.counted[at]:
            raise ValueError(f"positions[{i}] is {at}, whose weight is 0; use one that counts, such as of report.worst")
        found.append((at[0], at[1]))
    return found


def _figure(report: TokenReport, chosen: list[Position]) -> Any:
    """Lengths are inches, from the upper left corner."""
    from matplotlib.figure import Figure

    lines, left_out = _lines(report, chosen)
    middles = list(accumulate([LINE if line[0].width else HEADING for line in lines], initial=HEAD))[1:]
    top = middles[-1] + LINE * (left_out > 0) + MARGIN  # of the charts
    height = top + PANEL * -(-len(chosen) // COLUMNS) + MARGIN / 2
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0), frameon=False, xticks=[], yticks=[])
    _head(axes, report, len(_drawn(report, chosen)))
    for line, y in zip(lines, middles):
        for word in line:
            _draw(axes, report, word, y, chosen)
    if left_out:
        axes.text(
            MARGIN, top - MARGIN, f"… and {left_out:,} tokens before and after", va="center", color=FAINT, size=SIZE
        )
    pitch = (WIDTH - 2 * MARGIN) / COLUMNS
    for number, at in enumerate(chosen):
        row, column = divmod(number, COLUMNS)
        x, y, w, h = MARGIN + pitch * column + 1.0, top + PANEL * row + 0.55, pitch - 1.4, PANEL - 0.9
        inside = figure.add_axes((x / WIDTH, 1 - (y + h) / height, w / WIDTH, h / height))
        _chart(inside, report, at, number + 1)
    return figure


def _lines(report: TokenReport, chosen: list[Position]) -> tuple[list[list[Word]], int]:
    """Of each sequence its heading and its text, or an equal part of LINES; and how many tokens are left out."""
    width_of, lines, left_out = _ruler(), [], 0
    texts = {i: list(_flowed(report.cells(i), i, width_of)) for i in _drawn(report, chosen)}
    room = LINES if sum(map(len, texts.values())) <= LINES else max(LINES // len(texts), 1)
    for i, text in texts.items():
        first = next((n for n, line in enumerate(text) if any((i, word.position) in chosen for word in line)), 0)
        start = max(0, min(first - room // 2, len(text) - room))
        lines += [[Word(f"Sequence {i}:  {report.summary(i)}", i, None, MARGIN, 0)], *text[start : start + room]]
        left_out += sum(map(len, text[:start] + text[start + room :]))
    return lines, left_out


def _drawn(report: TokenReport, chosen: list[Position]) -> list[int]:
    """The sequences of the positions, and the worst one where there is none."""
    return list(dict.fromkeys(sequence for sequence, _ in chosen)) or report.sequences()[:1]


def _ruler() -> Callable[[str], float]:
    """The width of a text in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    renderer = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()
    font = FontProperties(family=MONOSPACE, size=SIZE)
    return cache(lambda text: renderer.get_text_width_height_descent(text, font, ismath=False)[0] / DPI)


def _flowed(
    cells: list[tuple[str, int | None]], sequence: int, width_of: Callable[[str], float]
) -> Iterator[list[Word]]:
    """Lines that end where the next word would not fit, and after a line end. A word begins with a space."""
    line: list[Word] = []
    x = MARGIN
    for i, (text, position) in enumerate(cells):
        rest = takewhile(lambda cell: not cell[0].startswith("·"), cells[i + 1 : i + 8])
        text = text if width_of(text) < WIDTH - 2 * MARGIN else text[:40] + "…"
        word = sum(width_of(cell) for cell, _ in rest) + width_of(text) if text.startswith("·") else width_of(text)
        if line and x + min(word, WIDTH / 3) > WIDTH - MARGIN:
            yield line
            line, x = [], MARGIN
        line.append(Word(text, sequence, position, x, width_of(text)))
        x += width_of(text) + GAP
        if "↵" in text:
            yield line
            line, x = [], MARGIN
    if line:
        yield line


def _head(axes: Any, report: TokenReport, drawn: int) -> None:
    """The title, and a patch per level with the losses of some below, where there is any loss."""
    axes.text(MARGIN, 0.42, "Where the student errs", size=15, weight="bold", color=colours.INK[0], va="center")
    said = f"Reverse KL in nats on the teacher's top {report.ids.shape[-1]}; each token has the loss of predicting it"
    said += f"; {drawn} of {len(report)} sequences." if drawn < len(report) else "."
    axes.text(MARGIN, 0.72, said, size=9, color=FAINT, va="center")
    if not report.largest:
        return
    patch, left = 0.17, WIDTH - MARGIN - 0.17 * colours.LEVELS
    for level, colour in enumerate(colours.RAMPS[0]):
        _patch(axes, left + patch * level, 0.36, patch, 0.16, colour)
        if level in LEGEND:
            loss = f"{colours.loss_at(level, report.largest):.2g}"
            axes.text(left + patch * (level + 0.5), 0.66, loss, size=8, color=FAINT, ha="center", va="center")
    axes.text(left - 0.12, 0.45, "loss, nats", size=8, color=FAINT, ha="right", va="center")


def _draw(axes: Any, report: TokenReport, word: Word, y: float, chosen: list[Position]) -> None:
    if not word.width:
        axes.text(word.x, y + 0.02, word.text, size=SIZE, weight="bold", color=colours.INK[0], va="center")
        return
    ink = FAINT
    if word.position is not None:
        at = word.sequence, word.position
        level = colours.level(float(report.loss[at]), report.largest)
        ink = colours.INK[0] if level is not None else "white"
        colour = colours.NOT_A_NUMBER if level is None else colours.RAMPS[0][level]
        _patch(axes, word.x, y - 0.1, word.width, 0.2, colour)
        if at in chosen:
            _patch(axes, word.x, y - 0.1, word.width, 0.2, "none", edgecolor=colours.INK[0], linewidth=1.2, zorder=3)
            number = chosen.index(at) + 1
            axes.text(
                word.x + word.width, y - 0.1, f" {number}", size=6.5, weight="bold", color=colours.INK[0], va="center"
            )
    axes.text(word.x, y + 0.05, word.text, size=SIZE, family=MONOSPACE, color=ink, va="baseline")


def _patch(axes: Any, x: float, y: float, width: float, height: float, colour: str, **options: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, **options))


def _chart(axes: Any, report: TokenReport, at: Position, number: int) -> None:
    """p above q for each of the tokens that are largest there, in the teacher's order."""
    both = report.p[at].fmax(report.q[at]).masked_fill(report.ids[at] < 0, -1)  # q alone where p is NaN
    largest = both.sort(descending=True, stable=True).indices[:BARS].sort().values
    slots = [i for i in largest.tolist() if report.ids[at][i] >= 0]
    rows = range(len(slots))
    for shift, values, colour, side in (
        (-0.2, report.p, colours.STUDENT[0], "student"),
        (0.2, report.q, colours.TEACHER[0], "teacher"),
    ):
        heights = values[at][slots].nan_to_num(0).tolist()
        axes.barh([row + shift for row in rows], heights, 0.38, color=colour, label=side)
    axes.set(xlim=(0, 1), ylim=(BARS - 0.4, -0.6), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"], yticks=list(rows))
    axes.set_yticklabels([_short(report.names[i]) for i in report.ids[at][slots].tolist()], family=MONOSPACE, size=8)
    for row, slot in enumerate(slots):
        axes.get_yticklabels()[row].set_weight("bold" if slot == int(report.place[at]) else "normal")
    axes.tick_params(length=0, labelsize=8, labelcolor=colours.INK[0])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="0.9")
    axes.set_title(
        f"{number}.  {_short(report.context(at, 3), tail=True)} [{_short(report.token(at))}]\n"
        f"loss {report.loss_text(at)},  sequence {at[0]}, position {at[1]}",
        loc="left", x=-0.42, size=8.5, color=colours.INK[0],
    )  # fmt: skip
    if number == 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=8, frameon=False)


def _short(text: str, tail: bool = False) -> str:
    most = 22 if tail else 12
    if len(text) <= most:
        return text
    return "…" + text[1 - most :] if tail else text[: most - 1] + "…"

"""A report as one HTML file that needs nothing else: what a browser shows is in it, and it may load nothing."""

import json
import math
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor

from topk_rkl import checks
from topk_rkl.plot import colours
from topk_rkl.plot.report import Position, TokenReport, require_report

LISTED = 24  # positions in the list of the worst
CONTEXT = 6  # tokens before each
LEGEND = (0, 5, 10, 15)  # levels of which the legend tells the loss
NOTHING = "<li>None: the weight of every position is 0.</li>"
SUBTITLE = "Reverse KL from student to teacher, in nats, on the {k} tokens that the teacher ranks highest"


def save_html(report: TokenReport, path: str | Path, *, title: str = "Where the student errs") -> None:
    """Writes the report as one HTML file, which loads nothing: no script, font or picture from elsewhere.

    The text is coloured by loss, the sequence with the largest mean first. A click, the pointer or the arrow keys
    choose a position, whose two distributions on S stand beside the text. A fragment does so too: `errors.html#2.17` is
    position 17 of sequence 2, marked at the token after it.

    K ids and 2 K probabilities of 4 significant digits are kept per position that counts: at most 29 bytes per slot.

    Args:
        report: what `token_report` gives.
        path: of the file, which is written anew. Its folder must exist.
        title: of the page.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing has been written.
    """
    require_report(report)
    if not isinstance(title, str):
        raise TypeError(f"title is {checks.seen(title)}; it must be a str")
    path = require_path(path)
    path.write_text(page(report, title), encoding="utf-8")


def require_path(path: object) -> Path:
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path is {checks.seen(path)}; it must be a str or a pathlib.Path")
    found = Path(path)
    if not found.parent.is_dir():
        raise ValueError(f"path is {str(path)!r}, whose folder does not exist; make it: mkdir -p {found.parent}")
    if found.is_dir():
        raise ValueError(f"path is {str(path)!r}, a folder; it must be a file in a folder")
    return found


def page(report: TokenReport, title: str) -> str:
    template = Template(files("topk_rkl.plot").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        subtitle=SUBTITLE.format(k=report.ids.shape[-1]),
        summary=_summary(report),
        light=_variables(0),
        dark=_variables(1),
        levels="\n".join(f".c{i} {{ background: var(--c{i}) }}" for i in range(colours.LEVELS)),
        legend=_legend(report.largest),
        worst="\n".join(_listed(report, at) for at in report.worst(LISTED)) or NOTHING,
        text="\n".join(_sequence(report, i) for i in report.sequences()),
        data=_embedded({"names": report.names, "k": report.ids.shape[-1], "at": _positions(report)}),
    )


def _variables(scheme: int) -> str:
    named = {
        "ink": colours.INK, "paper": colours.PAPER, "student": colours.STUDENT, "teacher": colours.TEACHER,
    }  # fmt: skip
    found = {name: pair[scheme] for name, pair in named.items()}
    found |= {f"c{i}": colour for i, colour in enumerate(colours.RAMPS[scheme])}
    return " ".join(f"--{name}: {colour};" for name, colour in found.items())


def _summary(report: TokenReport) -> str:
    return f"{len(report):,} sequence{'s' * (len(report) != 1)}, {report.summary()}"


def _legend(largest: float) -> str:
    """A patch per level, with the loss of some of them below; nothing where every loss is 0."""
    if not largest:
        return ""
    patches = "".join(f'<i class="c{i}"></i>' for i in range(colours.LEVELS))
    losses = "".join(f"<span>{colours.loss_at(i, largest):.2g}</span>" for i in LEGEND)
    return f"loss, nats<div>{patches}</div><div>{losses}</div>"


def _listed(report: TokenReport, at: Position) -> str:
    before = escape(report.context(at, CONTEXT))
    token = f'<mark class="{_class(report, at)}">{_marked(report.token(at))}</mark>'
    return f'<li><a href="#{at[0]}.{at[1]}"><b>{report.loss_text(at)}</b> <span>{before}</span>{token}</a></li>'


def _sequence(report: TokenReport, i: int) -> str:
    tokens = "".join(_token(report, i, text, t) for text, t in report.cells(i))
    heading = f"<h2>Sequence {i}<small>{report.summary(i)}</small></h2>"
    return f'<section>{heading}<p class="text">{tokens}</p></section>'


def _token(report: TokenReport, sequence: int, text: str, t: int | None) -> str:
    """May be broken before a space, and ends its line where the token has a line end."""
    before, after = "<wbr>" * text.startswith("·"), "<br>" * ("↵" in text)
    if t is None:
        return f'{before}<span class="out">{_marked(text)}</span>{after}'
    at = f"{sequence}.{t}"
    kind = _class(report, (sequence, t))
    return f'{before}<a id="p{at}" class="{kind}" href="#{at}" tabindex="-1">{_marked(text)}</a>{after}'


def _class(report: TokenReport, at: Position) -> str:
    level = colours.level(float(report.loss[at]), report.largest)
    return "nan" if level is None else f"c{level}"


def _marked(text: str) -> str:
    """Escaped, the marks of what would not be seen in a paler tone."""
    text = escape(text)
    for mark in "·↵⇥":
        text = text.replace(mark, f"<i>{mark}</i>")
    return text


def _positions(report: TokenReport) -> dict[str, list[Any]]:
    """What the script reads of each position that counts, the empty slots left out."""
    found = {}
    for sequence, t in report.counted.nonzero().tolist():
        at = sequence, t
        size = int((report.ids[at] >= 0).sum())
        mass = None if report.teacher_mass is None else _rounded(report.teacher_mass[at])
        slots = [report.ids[at][:size].tolist(), _rounded(report.p[at][:size]), _rounded(report.q[at][:size])]
        numbers = [_rounded(report.loss[at]), _rounded(report.student_mass[at]), mass, _rounded(report.next_prob[at])]
        found[f"{sequence}.{t}"] = [
            *numbers,
            int(report.place[at]),
            int(report.input_ids[sequence, report.lead + t]),
            *slots,
        ]
    return found


def _rounded(
    x: Tensor,  # () or (n,)
) -> Any:
    """To 4 significant digits; None where it is no finite number, for which JSON has no word."""
    found = [float(f"{v:.4g}") if math.isfinite(v) else None for v in x.reshape(-1).tolist()]
    return found if x.dim() else found[0]


def _embedded(data: dict[str, Any]) -> str:
    """JSON that no HTML parser takes for anything else: neither `</script>` nor `<!--` can stand in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")

"""Tables of the study `mass`, from its record alone."""

import statistics
from collections.abc import Sequence

from examples.paper.study import Record
from examples.paper.summary import Rows, reach, shown

ALARM = 0.05  # docs/paper.md warns where the teacher's mass on S less the student's is so much above its first value
FORMS = {
    "renormalized": "renormalised",
    "raw": "raw",
    "raw_stop_grad": "raw, stop-gradient",
    "blend": "0.9 renormalised + 0.1 tail",
    "tail": "tail class",
    "full": "full reverse KL",
}
WATCHED = {"student_mass": "mass outside S", "student_entropy": "entropy", "full": "full reverse KL"}


def tables(record: Record) -> dict[str, Rows]:
    return {
        "forms": forms(record),
        "settings": settings(record),
        "alarm": alarms(record),
        "free logits": free_logits(record),
        "variance": one_position(record),
    }


def forms(record: Record) -> Rows:
    heading = ["loss", *WATCHED.values(), "worst context outside S", "renormalised loss", "best token agrees"]
    names = (*WATCHED, "worst", "renormalized", "top1_agreement")
    teacher = record["teacher"] | {"worst": None, "full": None, "renormalized": None, "top1_agreement": None}
    rows = [["before training", *(cell(name, record["start"][name]) for name in names)]]
    rows += [
        [label, *(cell(name, record["runs"][form]["end"][name]) for name in names)] for form, label in FORMS.items()
    ]
    return [heading, *rows, ["the teacher", *(cell(name, teacher[name]) for name in names)]]


def settings(record: Record) -> Rows:
    columns = [(name, when) for name in ("student_mass", "full") for when in ("start", "renormalized", "tail")]
    said = {"start": "before", "renormalized": "renormalised", "tail": "tail class"}
    heading = ["setting", *(f"{WATCHED[name]}, {said[when]}" for name, when in columns)]
    rows = record["settings"].items()
    return [heading, *([title, *(cell(name, found[when][name]) for name, when in columns)] for title, found in rows)]


def alarms(record: Record) -> Rows:
    """Of each seed on its own: the median and the range of steps, the mean of the full reverse KL."""
    rows = [["loss", "first alarm, step", "full reverse KL then", "lowest", "lowest at step", "at the end"]]
    for form, label in FORMS.items():
        steps, curves = record["runs"][form]["steps"], record["runs"][form]["curves"]
        found = [alarm(*masses) for masses in zip(curves["student_mass"], curves["teacher_mass"])]
        then = [curve[at] for curve, at in zip(curves["full"], found) if at is not None]
        lowest, last = [min(curve) for curve in curves["full"]], [curve[-1] for curve in curves["full"]]
        best = [curve.index(x) for curve, x in zip(curves["full"], lowest)]
        rows.append([label, told_steps(steps, found), shown(then, 2) if then else ""])
        rows[-1] += [shown(lowest, 2), told_steps(steps, best), shown(last, 2)]
    return rows


def alarm(student: Sequence[float], teacher: Sequence[float]) -> int | None:
    """The place of the first step at which the student's mass has fallen too far below the teacher's."""
    gaps = [y - x for x, y in zip(student, teacher)]
    return next((i for i, gap in enumerate(gaps) if gap > gaps[0] + ALARM), None)


def told_steps(steps: Sequence[int], places: Sequence[int | None]) -> str:
    found = [steps[at] for at in places if at is not None]
    few = f", none in {len(places) - len(found)} of {len(places)} seeds" if len(found) < len(places) else ""
    return reach(found, ",.0f") + few if found else "none"


def free_logits(record: Record) -> Rows:
    free = record["free"]
    rows = [["loss", "mass on S", "closed form", "largest difference in a context"]]
    for form, found in free["forms"].items():
        rows.append([FORMS[form], shown(found["mass"]), shown(found["expected"]), f"{found['error']:.1e}"])
    return [
        *rows,
        ["before training", shown(free["start"]), "", ""],
        ["the teacher", shown(free["teacher"]), "", ""],
    ]


def one_position(record: Record) -> Rows:
    over = "over its squared mean"
    rows = [["one position", "variance of the loss", over, "variance of its gradient", over]]
    for name in record["position"]:
        label = {"sampled": "sampled token"}.get(name) or FORMS[name]
        cells = [shown(variances(record, name, "loss")), shown(relative_variances(record, name, "loss"), 2)]
        cells += [shown(variances(record, name, "gradient")), shown(relative_variances(record, name, "gradient"), 0)]
        rows.append([label, *cells])
    return rows


def variances(record: Record, form: str, part: str) -> list[float]:
    found: list[float] = record["position"][form][part]["variance"]
    return found


def relative_variances(record: Record, form: str, part: str) -> list[float]:
    """The variance over the squared mean, which does not change where the loss is scaled."""
    return [x / mean for x, mean in zip(variances(record, form, part), record["position"][form][part]["squared mean"])]


def mean_curve(run: Record, name: str) -> list[float]:
    """Over the seeds, at each step that was looked at."""
    return [statistics.fmean(values) for values in zip(*run["curves"][name])]


def outside(values: Sequence[float]) -> list[float]:
    return [1 - x for x in values]


def cell(name: str, values: Sequence[float] | None) -> str:
    """A mean and half its interval; masses are told as what is outside S."""
    if values is None:
        return ""
    return shown(outside(values) if name in ("student_mass", "worst") else values)

"""Tables and claims of the study `mass`, from its record alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from examples.paper.study import PAPER, Claim, Record
from examples.paper.summary import Rows, above, interval, shown

if TYPE_CHECKING:
    pass

LEAK, BIASED, ENTROPY = "2608.14728", "2605.11182", "2610.03529"
ALARM = 0.05  # docs/paper.md warns where the teacher's mass on S less the student's is so much above its first value
EARLY = 100  # steps within which a collapse is rapid
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
        "variance": variances(record),
    }


def forms(record: Record) -> Rows:
    heading = ["loss", *WATCHED.values(), "worst context outside S", "renormalised loss", "best token agrees"]
    names = (*WATCHED, "worst", "renormalized", "top1_agreement")
    teacher = record["teacher"] | {"worst": None, "full": None, "renormalized": None, "top1_agreement": None}
    rows = [["before training", *(named(name, record["start"][name]) for name in names)]]
    rows += [
        [label, *(named(name, record["runs"][form]["end"][name]) for name in names)] for form, label in FORMS.items()
    ]
    return [heading, *rows, ["the teacher", *(named(name, teacher[name]) for name in names)]]


def settings(record: Record) -> Rows:
    columns = [(name, when) for name in ("student_mass", "full") for when in ("start", "renormalized", "tail")]
    said = {"start": "before", "renormalized": "renormalised", "tail": "tail class"}
    heading = ["setting", *(f"{WATCHED[name]}, {said[when]}" for name, when in columns)]
    every = record["settings"].items()
    return [heading, *([title, *(named(name, found[when][name]) for name, when in columns)] for title, found in every)]


def alarms(record: Record) -> Rows:
    rows = [["loss", "first alarm, step", "full reverse KL then", "lowest, at step", "at the end"]]
    for form, label in FORMS.items():
        run = record["runs"][form]
        full, at = run["curves"]["full"], alarm(run)
        best = min(range(len(full)), key=full.__getitem__)
        then = ["none", ""] if at is None else [f"{run['steps'][at]:,}", f"{full[at]:.2f}"]
        rows.append([label, *then, f"{full[best]:.2f}, at {run['steps'][best]:,}", f"{full[-1]:.2f}"])
    return rows


def alarm(run: Record) -> int | None:
    """The place of the first step at which the student's mass has fallen too far below the teacher's."""
    gaps = [x - y for x, y in zip(*(run["curves"][f"{who}_mass"] for who in ("teacher", "student")))]
    return next((i for i, gap in enumerate(gaps) if gap > gaps[0] + ALARM), None)


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


def variances(record: Record) -> Rows:
    rows = [["one position", "variance of the loss", "of its gradient", "of the sampled token's gradient"]]
    for name, found in record["spread"].items():
        label = {"sampled": "sampled token"}.get(name) or FORMS[name]
        part = [x / y for x, y in zip(found["gradient"], record["spread"]["sampled"]["gradient"])]
        share = f"{100 * interval(part)[0]:.1f} %"
        rows.append([label, shown(found["loss"]), shown(found["gradient"]), share])
    return rows


def outside(values: Sequence[float]) -> list[float]:
    return [1 - x for x in values]


def named(name: str, values: Sequence[float] | None) -> str:
    """A mean and half its interval; masses are told as what is outside S."""
    if values is None:
        return ""
    return shown(outside(values) if name in ("student_mass", "worst") else values)


def change(record: Record, form: str, name: str) -> list[float]:
    """The end less the start, per seed."""
    run = record["runs"][form]
    return [end - start for start, end in zip(run["start"][name], run["end"][name])]


def rises(values: Sequence[float]) -> bool:
    return above(values) is True


def falls(values: Sequence[float]) -> bool:
    return above(values) is False


def told(record: Record, form: str, name: str) -> str:
    run = record["runs"][form]
    return f"{WATCHED[name]} {named(name, run['start'][name])} to {named(name, run['end'][name])}"


def claims(record: Record) -> list[Claim]:
    return [*of_critics(record), *of_raw(record), *of_the_loss(record)]


def of_critics(record: Record) -> list[Claim]:
    steps = f"{record['runs']['renormalized']['steps'][-1]:,} steps"
    leaked = outside(record["runs"]["renormalized"]["end"]["student_mass"])
    stays = record["settings"]["as many features as ranks"]
    gap = [
        abs(x - y) for x, y in zip(*(record["runs"]["tail"]["end"][f"{who}_mass"] for who in ("student", "teacher")))
    ]
    tail = falls(change(record, "renormalized", "student_mass")) and rises(change(record, "tail", "student_mass"))
    gone = [1 - x / y for x, y in zip(*(record["spread"][name]["loss"] for name in ("renormalized", "sampled")))]
    of_gradient = [1 - x / y for x, y in zip(*(record["spread"][x]["gradient"] for x in ("renormalized", "sampled")))]
    apart = [rises(change(record, "renormalized", "student_entropy")), falls(change(record, "tail", "student_entropy"))]
    return [
        Claim(
            LEAK,
            "The renormalised loss lets probability leak out of S during training.",
            f"{steps}: {told(record, 'renormalized', 'student_mass')}. As many features as ranks: "
            f"{named('student_mass', stays['start']['student_mass'])} to "
            f"{named('student_mass', stays['renormalized']['student_mass'])}",
            falls(change(record, "renormalized", "student_mass")),
        ),
        Claim(
            LEAK,
            "Half of the probability and more ends outside S.",
            f"{shown(leaked)} after {steps}",
            interval(leaked)[0] >= 0.5,
        ),
        Claim(
            LEAK,
            "The student's entropy rises meanwhile.",
            told(record, "renormalized", "student_entropy"),
            rises(change(record, "renormalized", "student_entropy")),
        ),
        Claim(
            LEAK,
            "A tail class cures the leak.",
            f"{told(record, 'tail', 'student_mass')}, {shown(gap)} from the teacher's; {told(record, 'tail', 'full')}",
            tail and falls(change(record, "tail", "full")),
        ),
        Claim(
            f"{PAPER}, a small replication",
            "The top-K loss has at most a third of the variance of the sampled-token loss.",
            f"{shown(gone)} of the loss's variance is gone, and {shown(of_gradient)} of the gradient's",
            interval(gone)[0] > 2 / 3,
        ),
        Claim(
            ENTROPY,
            "A linear-softmax student shows what a loss does to entropy: here, renormalised raises it, tail lowers it.",
            f"{told(record, 'renormalized', 'student_entropy')}; tail class, {told(record, 'tail', 'student_entropy')}",
            all(apart),
        ),
    ]


def of_raw(record: Record) -> list[Claim]:
    identity, raw = record["identity"], record["free"]["forms"]["raw"]
    curves = {form: record["runs"][form]["curves"]["student_mass"] for form in ("raw", "renormalized")}
    early = max(i for i, step in enumerate(record["runs"]["raw"]["steps"]) if step <= EARLY)
    reached = record["runs"]["raw"]["steps"][early]
    lost = {form: curve[0] - curve[early] for form, curve in curves.items()}
    rapid = lost["raw"] > 0.5 * (curves["raw"][0] - curves["raw"][-1]) and lost["raw"] > 2 * lost["renormalized"]
    return [
        Claim(
            f"{PAPER}, section 5",
            "Without renormalisation, training collapses within few steps, and the entropy rises.",
            f"{told(record, 'raw', 'student_mass')}, {lost['raw']:.3f} of which in {reached} steps (renormalised: "
            f"{lost['renormalized']:.3f}); {told(record, 'raw', 'student_entropy')}; {told(record, 'raw', 'full')}",
            rapid and rises(change(record, "raw", "student_entropy")) and rises(change(record, "raw", "full")),
        ),
        Claim(
            BIASED,
            'The raw gradient has a "+ 1" too many: the gradient of the student\'s mass on S.',
            f"raw less stop-gradient is that gradient within {identity['difference']:.1e} of {identity['P']:.2f}; "
            f"a student equal to the teacher is pushed by {identity['raw at the teacher']:.2f}, "
            f"and by {identity['raw_stop_grad at the teacher']:.0e} with stop-gradient",
            identity["difference"] < 1e-9 * identity["P"] < identity["raw at the teacher"],
        ),
        Claim(
            BIASED,
            "Stop-gradient weights repair the raw loss.",
            f"{told(record, 'raw_stop_grad', 'student_mass')}; {told(record, 'raw_stop_grad', 'full')}",
            rises(change(record, "raw_stop_grad", "student_mass")) and falls(change(record, "raw_stop_grad", "full")),
        ),
        Claim(
            BIASED,
            "Renormalisation repairs the raw loss.",
            f"{told(record, 'renormalized', 'full')}; raw, {told(record, 'raw', 'full')}",
            falls(change(record, "renormalized", "full")),
        ),
        Claim(
            "verl, pull request 5041",
            "The raw loss is least where the student's mass on S has shrunk.",
            f"free logits: {shown(raw['mass'])}, the teacher's over e is {shown(raw['expected'])}",
            raw["error"] < 0.01,
        ),
    ]


def of_the_loss(record: Record) -> list[Claim]:
    free = record["free"]["forms"]["renormalized"]
    return [
        Claim(
            f"{PAPER}, section 3.2",
            "A softmax over S alone gives tokens outside S no gradient; free logits then cannot leak on.",
            f"logits outside S moved by {free['outside moved']:.0e}, the sum over S by {free['sum over S moved']:.0e}; "
            f"the mass on S ended at {shown(free['mass'])}, known beforehand within {free['error']:.0e}",
            free["outside moved"] == 0 and free["sum over S moved"] < 1e-9 and free["error"] < 0.01,
        )
    ]

"""Claims of the study `mass`, from its record alone."""

from collections.abc import Callable

from examples.paper.mass.experiment import EARLY
from examples.paper.mass.page import FORMS, WATCHED, cell, mean_curve, outside, relative_variances, variances
from examples.paper.study import OURSELVES, PAPER, Claim, Record
from examples.paper.summary import above, every, shown

LEAK, BIASED, ENTROPY, REPLICATION = "2608.14728", "2605.11182", "2610.03529", "a small replication"
EXACT = 1e-9  # a gradient below this part of another counts as 0
CLOSE = 0.01  # masses that differ by less agree


def claims(record: Record) -> list[Claim]:
    said = [*of_the_leak(record), replication(record), entropy(record), *of_raw(record), *of_the_plus_one(record)]
    return [*said, *of_smaller_students(record), scope(record)]


def rise(record: Record, form: str, name: str) -> list[float]:
    """The end less the start, per seed."""
    run = record["runs"][form]
    return [end - start for start, end in zip(run["start"][name], run["end"][name])]


def fall(record: Record, form: str, name: str) -> list[float]:
    return [-x for x in rise(record, form, name)]


def told(record: Record, form: str, name: str) -> str:
    run = record["runs"][form]
    return f"{WATCHED[name]} {cell(name, run['start'][name])} to {cell(name, run['end'][name])}"


def half_passed(run: Record) -> str:
    """When the mean over seeds first has more than half of the probability outside S."""
    step = next((step for step, mass in zip(run["steps"], mean_curve(run, "student_mass")) if mass < 0.5), None)
    return "half is not passed in the mean" if step is None else f"the mean first passes half at step {step:,}"


def of_the_leak(record: Record) -> list[Claim]:
    run, representable = record["runs"]["renormalized"], record["settings"]["as many features as ranks"]
    steps, leaked = f"{run['steps'][-1]:,} steps", outside(run["end"]["student_mass"])
    ends = record["runs"]["tail"]["end"]
    gap = [abs(x - y) for x, y in zip(ends["student_mass"], ends["teacher_mass"])]
    cured = [rise(record, "tail", "student_mass"), fall(record, "tail", "full")]
    return [
        Claim(
            LEAK,
            "The renormalised loss lets probability leak out of S during training.",
            f"{steps}: {told(record, 'renormalized', 'student_mass')}. As many features as ranks: "
            f"{cell('student_mass', representable['start']['student_mass'])} to "
            f"{cell('student_mass', representable['renormalized']['student_mass'])}",
            above(fall(record, "renormalized", "student_mass")),
        ),
        Claim(
            LEAK,
            "Half of the probability and more ends outside S.",
            f"{shown(leaked)} after {steps}; {half_passed(run)}",
            above(leaked, 0.5),
        ),
        Claim(
            LEAK,
            "The student's entropy rises meanwhile.",
            told(record, "renormalized", "student_entropy"),
            above(rise(record, "renormalized", "student_entropy")),
        ),
        Claim(
            LEAK,
            "A tail class cures the leak.",
            f"{told(record, 'tail', 'student_mass')}, {shown(gap)} from the teacher's; {told(record, 'tail', 'full')}",
            every([above(fall(record, "renormalized", "student_mass")), *map(above, cured)]),
        ),
    ]


def gone(record: Record, part: str, of: Callable[[Record, str, str], list[float]] = variances) -> list[float]:
    """What the renormalised loss takes off the sampled token's variance, as a part of it."""
    return [1 - x / y for x, y in zip(of(record, "renormalized", part), of(record, "sampled", part))]


def replication(record: Record) -> Claim:
    return Claim(
        REPLICATION,
        "The top-K loss has at most a third of the variance of the sampled-token loss.",
        f"{shown(gone(record, 'loss'))} of the loss's variance is gone, and {shown(gone(record, 'gradient'))} of the "
        f"gradient's; over the squared mean, {shown(gone(record, 'loss', relative_variances))} and "
        f"{shown(gone(record, 'gradient', relative_variances))}",
        above(gone(record, "loss"), 2 / 3),
    )


def entropy(record: Record) -> Claim:
    name = "student_entropy"
    ends = {label: record["runs"][form]["end"][name] for form, label in FORMS.items()}
    apart = [x - y for x, y in zip(rise(record, "renormalized", name), rise(record, "tail", name))]
    return Claim(
        ENTROPY,
        "A linear-softmax student shows what a loss does to entropy.",
        f"entropy before training {shown(record['start'][name])}; at the end "
        + ", ".join(f"{label} {shown(values)}" for label, values in ends.items()),
        above(apart),
    )


def lost_early(record: Record, form: str) -> list[float]:
    """The mass on S that is gone after EARLY steps, per seed."""
    run = record["runs"][form]
    at = run["steps"].index(EARLY)
    return [curve[0] - curve[at] for curve in run["curves"]["student_mass"]]


def of_raw(record: Record) -> list[Claim]:
    free, (raw, renormalised) = record["free"], (lost_early(record, form) for form in ("raw", "renormalized"))
    at_e = free["forms"]["raw"]
    more = [x - y for x, y in zip(raw, renormalised)]
    rises = [rise(record, "raw", name) for name in ("student_entropy", "full")]
    return [
        Claim(
            PAPER,
            f"Training without renormalisation collapses: S loses more mass within {EARLY} steps than with it; entropy "
            "and full reverse KL rise.",
            f"mass lost in {EARLY} steps {shown(raw)}, renormalised {shown(renormalised)}; "
            f"{', '.join(told(record, 'raw', name) for name in WATCHED)}",
            every([above(more), *map(above, rises)]),
        ),
        Claim(
            "verl, pull request 5041",
            "The raw loss is least where the student's mass on S has shrunk.",
            f"free logits: {shown(free['start'])} to {shown(at_e['mass'])}; the teacher's over e is "
            f"{shown(at_e['expected'])}",
            every([at_e["error"] < CLOSE, above([x - y for x, y in zip(free["start"], at_e["mass"])])]),
        ),
    ]


def of_the_plus_one(record: Record) -> list[Claim]:
    found = record["identity"]
    pushed = {form: found[f"{form} at the teacher"] for form in ("raw", "raw_stop_grad", "renormalized")}
    names = {"raw_stop_grad": "Stop-gradient weights remove", "renormalized": "Renormalisation removes"}
    return [
        Claim(
            BIASED,
            'The raw gradient has a "+ 1" too many: the gradient of the student\'s mass on S.',
            f"raw less stop-gradient is that gradient within {found['difference']:.1e} of {found['P']:.2f}; "
            f"a student equal to the teacher is pushed by {pushed['raw']:.2f}",
            all([found["difference"] < EXACT * found["P"], pushed["raw"] > EXACT * found["P"]]),
        ),
        *(
            Claim(
                BIASED,
                f'{name} the "+ 1": a student equal to the teacher gets no gradient.',
                f"largest gradient {pushed[form]:.0e}, of the raw loss {pushed['raw']:.2f}",
                pushed[form] < EXACT * pushed["raw"],
            )
            for form, name in names.items()
        ),
    ]


def of_smaller_students(record: Record) -> list[Claim]:
    names = {"raw_stop_grad": "raw loss with stop-gradient weights", "renormalized": "renormalised loss"}
    return [
        Claim(
            OURSELVES,
            f"A smaller student comes nearer to the teacher under the {name}, in full reverse KL.",
            f"{told(record, form, 'full')}; raw, {told(record, 'raw', 'full')}; {told(record, form, 'student_mass')}",
            above(fall(record, form, "full")),
        )
        for form, name in names.items()
    ]


def scope(record: Record) -> Claim:
    free = record["free"]
    found = free["forms"]["renormalized"]
    return Claim(
        f"{PAPER}, section 3.2",
        "A softmax over S alone gives logits outside S no gradient.",
        f"free logits outside S moved by {found['outside moved']:.0e}; the mass on S still went from "
        f"{shown(free['start'])} to {shown(found['mass'])}",
        found["outside moved"] == 0,
    )

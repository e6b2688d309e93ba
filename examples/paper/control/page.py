"""Tables and claims of the study `control`, from its record alone."""

import math
import statistics
from itertools import pairwise

from examples.paper.control.experiment import ENDS, GAMMAS, RATE
from examples.paper.control.walkers import TASKS
from examples.paper.study import PAPER, Claim, Record
from examples.paper.summary import Rows, above, every, reach

LATE = 0.25  # the last part of training, where students are judged
DRIFT = 2.0  # times the KL at gamma = 0; the paper has no number
ORDER = 10.0  # one order of magnitude


def curves(record: Record, gamma: float, name: str, rate: float = RATE) -> list[list[float]]:
    """Over the measurements, for each seed."""
    found: list[list[float]] = record["rates"][str(rate)]["gammas"][str(gamma)][name]
    return found


def late(record: Record, gamma: float, name: str, rate: float = RATE) -> list[float]:
    """The mean over the last part of training, for each seed."""
    runs = curves(record, gamma, name, rate)
    return [statistics.fmean(run[-math.ceil(LATE * len(run)) :]) for run in runs]


def ratios(record: Record, gamma: float, name: str, rate: float = RATE) -> list[float]:
    """Variance over that of gamma = 0 at the same moment, the median over training, for each seed."""
    pairs = zip(curves(record, gamma, name, rate), curves(record, 0.0, name, rate))
    return [statistics.median(x / zero for x, zero in zip(*pair)) for pair in pairs]


def at_start(record: Record, gamma: float) -> list[float]:
    """The same for the untrained students, which do not depend on gamma."""
    pairs = zip(curves(record, gamma, "same"), curves(record, 0.0, "same"))
    return [one[0] / zero[0] for one, zero in pairs]


def rise(record: Record, gamma: float, rate: float) -> list[float]:
    """The late KL over the lowest one, for each seed."""
    runs = curves(record, gamma, "kl", rate)
    return [end / min(run) for end, run in zip(late(record, gamma, "kl", rate), runs)]


def excess(record: Record, rate: float) -> list[float]:
    """The late KL at gamma = 1 over that at gamma = 0, for each seed."""
    return [one / zero for one, zero in zip(*(late(record, gamma, "kl", rate) for gamma in (1.0, 0.0)))]


def tables(record: Record) -> dict[str, Rows]:
    noisy = [["gamma", "variance", "over gamma 0", "over gamma 0, the same students", "over gamma 0, untrained"]]
    for gamma in GAMMAS:
        typical = statistics.median(x for run in curves(record, gamma, "variance") for x in run)
        found = (ratios(record, gamma, "variance"), ratios(record, gamma, "same"), at_start(record, gamma))
        noisy.append([f"{gamma:g}", f"{typical:.3g}", *map(reach, found)])
    students = [["learning rate", "gamma", "late KL per step", "late / lowest KL", "late distance to the target"]]
    for rate in map(float, record["rates"]):
        for gamma in map(float, record["rates"][str(rate)]["gammas"]):
            found = (late(record, gamma, "kl", rate), rise(record, gamma, rate), late(record, gamma, "distance", rate))
            students.append([f"{rate:g}", f"{gamma:g}", *map(reach, found)])
    seeds, teacher = len(record["seeds"]), record["teacher"]
    taught = [["teacher", "distance to the target", "std of a move"]]
    for i, task in enumerate(TASKS):
        taught.append([task, *(reach(teacher[x][i * seeds : (i + 1) * seeds]) for x in ("distance", "std"))])
    return {"variance": noisy, "students": students, "teachers": taught}


def claims(record: Record) -> list[Claim]:
    rates = [float(rate) for rate in record["rates"]]
    return [ordered(record), *(magnitude(record, rate) for rate in rates), *(drifts(record, rate) for rate in rates)]


def beyond(values: list[float], limit: float) -> bool | None:
    """Whether positive values are above the limit, judged by their logarithms."""
    return above([math.log(x / limit) for x in values])


def ordered(record: Record) -> Claim:
    found = [ratios(record, gamma, "variance") for gamma in GAMMAS]  # for each gamma and seed
    steps = [[high / low for low, high in zip(*pair)] for pair in pairwise(found)]
    rising = sum(all(step > 1 for step in run) for run in zip(*steps))
    medians = ", ".join(f"{statistics.median(values):.3g}" for values in found)
    return Claim(
        f"{PAPER}, appendix E",
        "A larger gamma has a larger gradient variance.",
        f"rising with every gamma in {rising} of {len(found[0])} seeds; variance over that of gamma 0: {medians}",
        every([beyond(step, 1.0) for step in steps]),
    )


def magnitude(record: Record, rate: float) -> Claim:
    found = ratios(record, 1.0, "variance", rate)
    return Claim(
        f"{PAPER}, appendix E",
        f"The variance at gamma = 1 is one to several orders of magnitude above gamma = 0. Learning rate {rate:g}.",
        f"{reach(found)} times, {math.log10(statistics.median(found)):.1f} orders; for the untrained students "
        f"{reach(at_start(record, 1.0))} times",
        beyond(found, ORDER),
    )


def drifts(record: Record, rate: float) -> Claim:
    """Judged by the KL; the distance to the target is also that of the teachers."""
    found = excess(record, rate)
    drifted = sum(x >= DRIFT for x in found)
    zero, one = (reach(late(record, gamma, "distance", rate)) for gamma in ENDS)
    return Claim(
        f"{PAPER}, appendix E",
        f"Students of gamma = 1 end at least {DRIFT:g} times as far from their teachers, in KL, as those of gamma = 0. "
        f"Learning rate {rate:g}.",
        f"the late KL is {reach(found)} times that at gamma 0, at least {DRIFT:g} times in {drifted} of {len(found)} "
        f"seeds; late distance to the target {one}, at gamma 0 {zero}",
        beyond(found, DRIFT),
    )

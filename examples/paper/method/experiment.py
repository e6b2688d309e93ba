"""The paper's comparison on small transformers: sampled token against top-K, masks, top-p, K, variants, and the mass.

Teacher and student walk rooks over a board (see `task`). Each seed has its own teacher, student, problems and rollouts,
which all runs of that seed share. The score is the share of held-back problems answered right by plain samples, at
temperature 1 and top-p 1: the model as it is, with no sampler to help it. Each loss has the learning rate that a sweep
found best. Every K and every top-p takes the one found for top-K at 32 and 0.9. Rates fall to 0 along a run.
"""

import statistics
from collections.abc import Sequence

from examples.paper.method.costs import costs
from examples.paper.method.task import VOCAB
from examples.paper.method.training import Run, Size, base, distil, judge
from examples.paper.objectives import LOSSES
from examples.paper.study import Record, bar

FULL = Size(teacher_steps=3000, student_steps=400, steps=1200, held_back=1024, sweep=True)
SEEDS = (0, 1, 2, 3, 4)
SWEPT = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SWEPT_SEEDS = (100, 101, 102)
# The best score of a coarse sweep at the default size: runs with the mask, on SWEPT_SEEDS, at SWEPT, of which some were
# left out once a loss had become worse. A smaller rate than 3e-4 leaves the student as it is.
RATES = {
    "sampled": 1e-3,
    "top-K": 3e-2,
    "V2": 3e-2,
    "V3": 3e-2,
    "V4": 3e-2,
    "V5": 3e-4,
    "raw": 3e-4,
    "raw, stop-gradient": 1e-3,
    "tail": 3e-2,
}
METHOD = "top-K + top-p"
RUNS = {
    "sampled": Run("sampled", top_p=1.0, mask=False),
    "sampled + mask": Run("sampled", top_p=1.0),
    "sampled + mask + top-p": Run("sampled"),
    "top-K": Run("top-K", top_p=1.0),
    METHOD: Run("top-K"),
    "top-K + top-p, no mask": Run("top-K", mask=False),
    "V2: student's top K, y": Run("V2"),
    "V3: teacher's top K, y": Run("V3"),
    "V4: EMA-PG, student's top K": Run("V4"),
    "V5: EMA-PG, teacher's top K": Run("V5"),
    "not renormalised": Run("raw", rate_of="top-K"),
    "not renormalised, own rate": Run("raw"),
    "stop-gradient": Run("raw, stop-gradient", rate_of="top-K"),
    "stop-gradient, own rate": Run("raw, stop-gradient"),
    "tail": Run("tail"),
    "K = 1": Run("top-K", k=1),
    "K = 4": Run("top-K", k=4),
    "K = 16": Run("top-K", k=16),
    "K = 48": Run("top-K", k=48),
    "K = V": Run("top-K", k=VOCAB),
    "top-p = 0.8": Run("top-K", top_p=0.8),
}


def measure(size: Size, seeds: Sequence[int]) -> Record:
    swept = sweep(size) if size.sweep else None
    rates = {loss: max(scores, key=scores.get) for loss, scores in swept.items()} if swept else RATES
    models = base(size, seeds)
    record: Record = {"rates": rates, "swept": swept, "costs": costs(models, size, seeds), "runs": {}}
    record["teacher"] = judge(models.teacher, models.teacher, size, seeds)
    record["student"] = judge(models.student, models.teacher, size, seeds)
    for name, run in bar(RUNS.items(), "method"):
        rate = rates[run.rate_of or run.loss]
        student, history = distil(models, run, rate, size, seeds)
        came_to = judge(student, models.teacher, size, seeds)
        record["runs"][name] = {"loss": run.loss, "rate": rate, **history, **came_to}
    return record


def sweep(size: Size) -> dict[str, dict[float, float]]:
    """The mean score of each loss at each learning rate, on seeds of its own."""
    models = base(size, SWEPT_SEEDS)
    swept: dict[str, dict[float, float]] = {loss: {} for loss in LOSSES}
    for loss, rate in bar([(loss, rate) for loss in LOSSES for rate in SWEPT], "sweep"):
        run = Run(loss, top_p=1.0 if loss == "sampled" else 0.9)
        student, _ = distil(models, run, rate, size, SWEPT_SEEDS)
        swept[loss][rate] = statistics.fmean(judge(student, models.teacher, size, SWEPT_SEEDS)["score"])
    return swept

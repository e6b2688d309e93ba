"""The paper's comparison on small transformers: sampled token against top-K, masks, top-p, K, variants, and the mass.

Teacher and student walk rooks over a board (see `task`). Each seed has its own teacher, student, problems and random
numbers, which all runs of that seed share. Their rollouts differ after the first step. The score is the share of
held-back problems answered right by plain samples, at temperature 1 and top-p 1: the model as it is, with no sampler to
help it. The runs in RATES have the learning rate that the study `rates` found best for each of them. All others take
the rate of the method, whatever would be best for them. Rates fall to 0 along a run.
"""

from collections.abc import Sequence

from examples.paper.method.costs import costs
from examples.paper.method.task import VOCAB
from examples.paper.method.training import Run, Size, base, distil, judge
from examples.paper.study import Record, bar

FULL = Size(teacher_steps=3000, student_steps=400, steps=1200, held_back=1024)
SEEDS = (0, 1, 2, 3, 4)
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
    "V5 corrected": Run("V5, corrected"),
    "V5, plain rollouts": Run("V5", top_p=1.0),
    "not renormalised": Run("raw"),
    "not renormalised, own rate": Run("raw"),
    "stop-gradient": Run("raw, stop-gradient"),
    "stop-gradient, own rate": Run("raw, stop-gradient"),
    "tail": Run("tail"),
    "K = 1": Run("top-K", k=1),
    "K = 4": Run("top-K", k=4),
    "K = 8": Run("top-K", k=8),
    "K = 12": Run("top-K", k=12),
    "K = 16": Run("top-K", k=16),
    "K = 48": Run("top-K", k=48),
    "K = V": Run("top-K", k=VOCAB),
    "top-p = 0.8": Run("top-K", top_p=0.8),
}
# The best of examples/paper/results/rates.md, which has the default size; FULL takes them too.
RATES = {
    "sampled": 1e-2,
    "sampled + mask": 1e-3,
    "sampled + mask + top-p": 3e-4,
    "top-K": 3e-2,
    METHOD: 3e-2,
    "V2: student's top K, y": 3e-2,
    "V3: teacher's top K, y": 3e-2,
    "V4: EMA-PG, student's top K": 3e-2,
    "V5: EMA-PG, teacher's top K": 3e-4,
    "V5 corrected": 1e-2,
    "V5, plain rollouts": 1e-3,
    "not renormalised, own rate": 3e-4,
    "stop-gradient, own rate": 1e-3,
    "tail": 3e-2,
}


def measure(size: Size, seeds: Sequence[int]) -> Record:
    models = base(size, seeds)
    record: Record = {"costs": costs(models, size, seeds), "runs": {}}
    record["teacher"] = judge(models.teacher, models.teacher, size, seeds)
    record["student"] = judge(models.student, models.teacher, size, seeds)
    for name, run in bar(RUNS.items(), "method"):
        rate = RATES.get(name, RATES[METHOD])
        student, history = distil(models, run, rate, size, seeds)
        came_to = judge(student, models.teacher, size, seeds)
        record["runs"][name] = {"loss": run.loss, "rate": rate, **history, **came_to}
    return record

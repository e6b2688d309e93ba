"""The study `mass` in a short form, and what docs/paper.md says of it."""

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from examples.paper import mass, study
from examples.paper.mass import experiment, verdicts as words
from examples.paper.mass.linear_softmax import language, shares
from examples.paper.mass.page import alarm, told_steps
from examples.paper.summary import interval, rounded
from topk_rkl.loss import teacher_topk, topk_divergence

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2, 3)
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("mass")]
SMALL = mass.Size(
    vocab=32, k=4, rank=16, length=8, pretraining=120, lr=0.03, steps=250, short=40, free_steps=400, contexts=4
)
CHECK = (ROOT / "docs/paper.md").read_text().split("\n### The check\n")[1]
BLOCK = re.search(r"```python\n(.*?)```", CHECK, re.DOTALL)[1]


@pytest.fixture(scope="module")
def record() -> study.Record:
    made = {"size": SMALL._asdict(), "seeds": list(SEEDS), "torch": "", "threads": 1, "seconds": 1.0}
    return json.loads(json.dumps(made | rounded(mass.measure(SMALL, SEEDS)), allow_nan=False))


def end(record: study.Record, form: str, name: str) -> float:
    return interval(record["runs"][form]["end"][name])[0]


def start(record: study.Record, name: str) -> float:
    return interval(record["start"][name])[0]


def verdicts(record: study.Record) -> list[bool | None]:
    return [claim.held for claim in mass.claims(record)]


def doctored(record: study.Record, sign: float, differ: float) -> study.Record:
    """What is compared changes by this sign, as the critics say where it is 1; seeds differ around it."""
    found = copy.deepcopy(record)
    runs, free, along = found["runs"], found["free"], [sign + differ * (-1) ** i for i in range(len(SEEDS))]
    changes = {"renormalized": (-0.2, 0.5, 1), "raw": (-0.4, 0.8, 2), "tail": (0.1, -0.3, -0.5)}
    for form, change in (changes | {"raw_stop_grad": (0.1, -0.3, -0.4)}).items():
        for name, size in zip(("student_mass", "student_entropy", "full"), change):
            runs[form]["start"][name], runs[form]["end"][name] = [0.5] * len(SEEDS), [0.5 + size * x for x in along]
            runs[form]["curves"][name] = [[0.5, *[0.5 + size * x] * (len(runs[form]["steps"]) - 1)] for x in along]
    found["position"]["sampled"]["loss"]["variance"] = [1.0] * len(SEEDS)
    found["position"]["renormalized"]["loss"]["variance"] = [1 / 3 - 0.2 * x for x in along]
    free["start"], free["forms"]["raw"]["mass"] = [0.6] * len(SEEDS), [0.6 - 0.2 * x for x in along]
    free["forms"]["raw"]["error"] = 0.0
    return found


@pytest.mark.slow
def test_the_renormalised_loss_leaks_while_it_falls(record: study.Record) -> None:
    leaked = [x - y for x, y in zip(*(record["runs"]["renormalized"][w]["student_mass"] for w in ("start", "end")))]
    assert min(leaked) > 0.03 and sum(leaked) / len(leaked) > 0.08
    assert end(record, "renormalized", "renormalized") < 0.2 * start(record, "renormalized")
    assert end(record, "renormalized", "full") > 1.2 * start(record, "full")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tail", "raw_stop_grad", "full"])
def test_a_loss_that_sees_the_mass_brings_it_back(record: study.Record, form: str) -> None:
    assert end(record, form, "student_mass") > start(record, "student_mass") + 0.06
    assert end(record, form, "full") < 0.85 * start(record, "full")


@pytest.mark.slow
def test_the_forms_stand_in_order(record: study.Record) -> None:
    good, bad = ("full", "tail", "raw_stop_grad"), ("renormalized", "raw")
    found = [end(record, form, "full") for form in good]
    assert found == sorted(found) and found[-1] + 0.5 < min(end(record, form, "full") for form in bad)
    entropies = {form: end(record, form, "student_entropy") for form in (*good, *bad)}
    assert max(entropies[form] for form in good) + 0.1 < entropies["renormalized"] < entropies["raw"] - 0.1
    assert end(record, "raw_stop_grad", "student_mass") > end(record, "blend", "student_mass")
    assert end(record, "blend", "student_mass") > end(record, "renormalized", "student_mass") + 0.06


@pytest.mark.slow
def test_the_gradient_at_the_teacher_is_that_of_the_plus_one(record: study.Record) -> None:
    found = record["identity"]
    assert found["raw at the teacher"] > 0.05
    for form in ("raw_stop_grad", "renormalized", "tail"):
        assert found[f"{form} at the teacher"] < 1e-12


@pytest.mark.slow
def test_the_raw_loss_collapses_to_the_teachers_mass_over_e(record: study.Record) -> None:
    assert end(record, "raw", "student_mass") == pytest.approx(0.92 / torch.e, abs=0.06)
    raw = record["free"]["forms"]["raw"]
    teachers = interval(record["free"]["teacher"])[0]
    assert interval(raw["expected"])[0] == pytest.approx(teachers / 2.718281828, rel=1e-4)
    assert interval(raw["mass"])[0] == pytest.approx(teachers / 2.718281828, abs=0.08)


@pytest.mark.slow
def test_free_logits_end_where_the_closed_form_says(record: study.Record) -> None:
    free = record["free"]["forms"]
    assert free["renormalized"]["outside moved"] == 0
    assert free["renormalized"]["sum over S moved"] < 1e-9
    assert free["renormalized"]["error"] < 0.01
    assert free["tail"]["error"] < 0.01
    assert free["raw_stop_grad"]["error"] < 0.03
    assert max(record["free"]["teacher"]) < 1 and free["tail"]["expected"] == record["free"]["teacher"]
    # Without a look at the start, the teacher's mass would be the guess: the student stays away from it.
    assert max(abs(x - y) for x, y in zip(free["renormalized"]["mass"], record["free"]["teacher"])) > 0.01


@pytest.mark.slow
def test_a_student_that_can_represent_the_teacher_hardly_leaks(record: study.Record) -> None:
    lost = {}
    for name, found in record["settings"].items():
        before, after = (interval(found[when]["student_mass"])[0] for when in ("start", "renormalized"))
        lost[name] = before - after
    assert lost["as above"] > lost["as many features as ranks"] + 0.005
    assert lost["no noise: learnt from the teacher"] > 0.01
    assert abs(lost["free logits"]) < 0.02
    assert lost["a tenth of the learning rate"] < lost["as above"]
    tail = {name: found["tail"]["student_mass"] for name, found in record["settings"].items()}
    assert all(min(x) > min(record["settings"][name]["renormalized"]["student_mass"]) for name, x in tail.items())


@pytest.mark.slow
def test_the_sampled_token_is_nearly_all_of_the_variance(record: study.Record) -> None:
    found = record["position"]
    for part in ("loss", "gradient"):
        mean = {form: interval(x[part]["variance"])[0] for form, x in found.items()}
        assert mean["renormalized"] < 0.1 * mean["sampled"] and mean["full"] < 0.3 * mean["sampled"]
        assert found["full"][part]["squared mean"] == pytest.approx(found["sampled"][part]["squared mean"], rel=1e-3)
    assert found["raw"]["loss"] == found["raw_stop_grad"]["loss"]


def test_the_variance_over_sampled_tokens_is_that_of_samples() -> None:
    """One context's share of the variance, beside ten thousand tokens that are really drawn."""
    size, source = SMALL._replace(vocab=8, k=2, pretraining=20), torch.Generator().manual_seed(0)
    task = language(8, 4, 3, 1.0, 20, (0,))
    logits = task.features @ task.head  # (1, 8, 8)
    contexts = torch.multinomial(shares(logits, size.length)[0], 200_000, True, generator=source)  # (n,)
    log_p, log_q = logits[0].log_softmax(-1), task.teacher[0].log_softmax(-1)
    tokens = torch.multinomial(log_p.exp()[contexts], 1, generator=source).squeeze(-1)  # (n,)
    ratio = (log_p - log_q)[contexts, tokens]  # (n,)
    slope = torch.eye(8)[tokens] - log_p.exp()[contexts]  # (n, V)
    gradients = ratio[:, None, None] * task.features[0, contexts, :, None] * slope[:, None]  # (n, H, V)
    found = experiment.one_position(task, size)["sampled"]
    assert found["loss"]["variance"][0] == pytest.approx(float(ratio.var()), rel=0.05)
    assert found["loss"]["squared mean"][0] == pytest.approx(float(ratio.mean().square()), rel=0.05)
    assert found["gradient"]["variance"][0] == pytest.approx(float(gradients.flatten(1).var(0).sum()), rel=0.05)
    assert found["gradient"]["squared mean"][0] == pytest.approx(float(gradients.mean(0).square().sum()), rel=0.05)


@pytest.mark.parametrize("at_teacher", [False, True])
def test_the_raw_gradient_is_that_of_stop_gradient_and_of_the_mass(at_teacher: bool) -> None:
    task = language(8, 4, None, 1.0, 0, (0, 1))
    teacher = task.teacher.double()
    start = teacher if at_teacher else task.head.double()  # (R, V, V)
    best = teacher_topk(teacher, 3, normalize=True)
    grads = []
    for form in ("raw", "raw_stop_grad"):
        z = start.clone().requires_grad_()
        topk_divergence(z, best, mass=form, reduction="sum").backward()
        grads.append(z.grad)
    z = start.clone().requires_grad_()
    z.softmax(-1).gather(-1, best.ids.long()).sum().backward()
    torch.testing.assert_close(grads[0] - grads[1], z.grad, rtol=0, atol=1e-14)
    assert z.grad.abs().amax() > 0.05
    assert (grads[1].abs().amax() < 1e-14) == at_teacher


def test_shares_are_those_of_an_answer_step_by_step() -> None:
    step = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    first, second = torch.tensor([0.5, 0.5]), torch.tensor([0.65, 0.35])
    third = second @ step
    torch.testing.assert_close(shares(step.log()[None], 3)[0], (first + second + third) / 3)


def test_a_run_is_the_same_beside_others() -> None:
    alone, beside = (language(8, 4, 3, 1.0, 30, seeds) for seeds in ((1,), (0, 1)))
    for x, y in zip(alone, beside):
        torch.testing.assert_close(x[0], y[1])


@pytest.mark.slow
def test_the_record_is_small_and_the_page_and_the_picture_are_made(record: study.Record, tmp_path: Path) -> None:
    assert len(json.dumps(record, indent=1)) < 150_000
    assert set(mass.tables(record)) == {"forms", "settings", "alarm", "free logits", "variance"}
    (tmp_path / "mass.json").write_text(json.dumps(record))
    study.redraw("mass", tmp_path)
    page = (tmp_path / "mass.md").read_text()
    assert all(f"\n## {title}\n" in page for title in ("Claims", *mass.tables(record)))
    assert 10_000 < (tmp_path / "mass.png").stat().st_size < 150_000


@pytest.mark.slow
class TestVerdicts:
    """Eight claims of comparisons, three equalities, two questions of our own, and the scope of the softmax."""

    def test_they_follow_the_record(self, record: study.Record) -> None:
        assert verdicts(doctored(record, 1, 0.1)) == [True] * 12 + [False, True]
        other = doctored(record, -1, 0.1)
        broken = ("difference", "raw_stop_grad at the teacher", "renormalized at the teacher")
        other["identity"] |= dict.fromkeys(broken, 0.1)
        other["free"]["forms"]["renormalized"]["outside moved"] = 0.1
        assert verdicts(other) == [False] * 12 + [True, False]

    def test_seeds_that_disagree_show_nothing(self, record: study.Record) -> None:
        assert verdicts(doctored(record, 0, 1)) == [None] * 8 + [True] * 3 + [None] * 2 + [True]

    def test_the_raw_loss_is_at_its_closed_form_or_the_claim_fails(self, record: study.Record) -> None:
        found = doctored(record, 1, 0.1)
        found["free"]["forms"]["raw"]["error"] = 0.1
        assert [i for i, held in enumerate(verdicts(found)) if not held] == [7, 12]

    def test_a_raw_loss_without_the_plus_one_is_noticed(self, record: study.Record) -> None:
        found = doctored(record, 1, 0.1)
        found["identity"]["raw at the teacher"] = 0.0
        assert verdicts(found)[8] is False


def test_half_is_passed_where_the_mean_passes_it() -> None:
    run = {"steps": [0, 10, 2000], "curves": {"student_mass": [[0.9, 0.6, 0.4], [0.9, 0.5, 0.4]]}}
    assert words.half_passed(run) == "the mean first passes half at step 2,000"
    run["curves"]["student_mass"][0] = [0.9, 0.9, 0.9]
    assert words.half_passed(run) == "half is not passed in the mean"


def test_an_alarm_is_the_first_gap_beyond_that_of_the_start() -> None:
    assert alarm([0.80, 0.79, 0.74, 0.70], [0.9] * 4) == 2
    assert alarm([0.80, 0.79, 0.76, 0.80], [0.9] * 4) is None
    assert told_steps([0, 1, 1000], [2, None, 1]) == "500 (1 to 1,000), none in 1 of 3 seeds"
    assert told_steps([0, 1, 1000], [None, None]) == "none"


def test_every_curve_is_looked_at_where_a_collapse_is_judged() -> None:
    assert experiment.EARLY in experiment.marks(8000) and experiment.marks(8000)[-1] == 8000
    assert experiment.marks(40)[-1] == 40


@pytest.mark.slow
def test_the_check_of_the_page_is_silent_at_the_start_and_warns_of_a_leak() -> None:
    size = mass.Size()._replace(pretraining=300)
    task = experiment.of_setting(experiment.Setting(), size, (0,))
    chosen = teacher_topk(task.teacher, size.k, normalize=True)
    mask = torch.ones(1, size.vocab)
    mask[:, -5:] = 0  # padding

    def checked(head: torch.Tensor, gap: float) -> tuple[list[str], float]:
        scope = {"student_logits": task.features @ head, "teacher_logits": task.teacher, "response_mask": mask}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exec(BLOCK.replace("k=32", f"k={size.k}"), scope | {"first_gap": gap}, scope)
        return [str(x.message) for x in caught], scope["teacher_mass"] - scope["student_mass"]

    silent, first_gap = checked(task.head, 1.0)
    assert silent == [] and checked(task.head, first_gap)[0] == []
    said = {}
    for form in ("renormalized", "tail"):
        heads = experiment.trained(experiment.loss_of(form, task, chosen), experiment.Setting(), task, size, [])
        *_, last = (head for _, head in zip(range(300), heads))
        said[form] = checked(last, first_gap)[0]
    assert said["tail"] == []
    assert re.fullmatch(r"mass on S: student 0\.\d\d, teacher 0\.\d\d", said["renormalized"][0])

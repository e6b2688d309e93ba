"""Walks on a line: the gradient by its formula and by the closed form of KL, then the study in a short form."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import kl_divergence

from examples.paper import control
from examples.paper.control import experiment, page as words
from examples.paper.control.walkers import STD_FLOOR, TASKS, Policy, pick, train_teachers, walk
from examples.paper.stacked import generators
from examples.paper.study import page
from examples.paper.summary import rounded

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("control")]
SHORT = control.Size(iterations=60, teacher_iterations=150, points=2, batch=32, batches=4, others=())
SEEDS = [42, 43]
LEFT, RIGHT = TASKS.values()


def pair(runs: int) -> tuple[Policy, Policy]:
    """A student and a teacher, the same in every run."""
    return Policy(generators([0] * runs)), Policy(generators([1] * runs)).requires_grad_(False)


def test_the_network_has_about_4000_parameters() -> None:
    assert sum(p.numel() for p in Policy(generators([0])).parameters()) == 4022


def test_a_walk_is_its_moves() -> None:
    made = walk(pair(2)[0], torch.tensor([LEFT, RIGHT]), generators([0, 1]), 5, 7)
    for run, (start, target) in enumerate([(2.0, -3.0), (-2.0, 3.0)]):
        position = torch.full((5,), start)
        for t in range(7):
            assert (made.inputs[run, :, t, 0] == [LEFT, RIGHT][run]).all()
            torch.testing.assert_close(made.inputs[run, :, t, 1], position)
            torch.testing.assert_close(made.inputs[run, :, t, 2], torch.full((5,), t / 7))
            position = position + made.moves[run, :, t]
            torch.testing.assert_close(made.left[run, :, t], (position - target).abs(), atol=1e-5, rtol=1e-5)


def test_moves_have_the_mean_and_the_std_of_the_policy() -> None:
    policy = pair(1)[0]
    made = walk(policy, torch.tensor([LEFT]), generators([3]), 20_000, 1)
    said = policy(made.inputs)
    z = (made.moves - said.mean) / said.stddev
    assert abs(z.mean().item()) < 0.05 and z.std().item() == pytest.approx(1, abs=0.05)
    assert said.stddev.min() > STD_FLOOR


def test_a_run_is_the_same_beside_others() -> None:
    policy = Policy(generators([5, 6, 7]))
    signs = torch.tensor([LEFT, RIGHT, LEFT])
    beside = walk(policy, signs, generators([1, 2, 3]), 4, 6)
    alone = walk(pick(policy, [1]), signs[1:2], generators([2]), 4, 6)
    torch.testing.assert_close(beside.moves[1:2], alone.moves, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_gradient_is_equation_3(gamma: float) -> None:
    """sum over t of (sum over t' >= t of gamma^(t' - t) (log p - log q)_t') grad log p_t, descended."""
    student, teacher = pair(1)
    made = walk(student, torch.tensor([LEFT]), generators([1]), 2, 3)
    got = experiment.output_gradient(student, teacher, made, [gamma])[0]  # (WIDTH + 1, 2)
    log_p = student(made.inputs).log_prob(made.moves)[0]  # (B, T)
    r = (log_p - teacher(made.inputs).log_prob(made.moves)[0]).tolist()
    formula = torch.zeros_like(got)
    for b in range(2):
        for t in range(3):
            wanted = [student.output.weight, student.output.bias]
            weight, bias = torch.autograd.grad(log_p[b, t], wanted, retain_graph=True)
            cost = sum(gamma ** (later - t) * r[b][later] for later in range(t, 3))
            formula += cost * torch.cat([weight[0], bias[0]]) / 2
    torch.testing.assert_close(got, formula, rtol=1e-4, atol=1e-4)


def test_each_run_has_its_own_gamma() -> None:
    student, teacher = pair(4)
    made = walk(student, torch.tensor([LEFT] * 4), generators([1, 2, 1, 2]), 3, 5)
    both = experiment.output_gradient(student, teacher, made, [0.0, 1.0])
    for run, gamma in enumerate([0.0, 0.0, 1.0, 1.0]):
        one = experiment.output_gradient(
            pick(student, [run]), pick(teacher, [run]), type(made)(*(x[run : run + 1] for x in made)), [gamma]
        )
        torch.testing.assert_close(both[run : run + 1], one, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[0], both[2])


def test_the_mean_gradient_of_one_step_is_that_of_the_kl() -> None:
    student, teacher = pair(1)
    made = walk(student, torch.tensor([RIGHT]), generators([4]), 50_000, 1)
    got = experiment.output_gradient(student, teacher, made, [0.0])
    start = made.inputs[:, :1]
    kl = kl_divergence(student(start), teacher(start)).sum()
    weight, bias = torch.autograd.grad(kl, [student.output.weight, student.output.bias])
    exact = torch.cat([weight, bias], 1)
    assert ((got - exact).norm() / exact.norm()).item() < 0.1


def test_variance_is_the_mean_square_from_the_mean() -> None:
    gradients = torch.tensor([[[1.0, 5.0]], [[3.0, 5.0]], [[5.0, 8.0]]])  # (M, R, 2)
    assert experiment.variance(gradients).tolist() == pytest.approx([(4 + 1 + 0 + 1 + 4 + 4) / 3])


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found = {"size": SHORT._asdict(), "seeds": SEEDS, "torch": "", "threads": 1, "seconds": 1}
    return json.loads(json.dumps(found | rounded(control.measure(SHORT, SEEDS))))


def verdicts(record: dict[str, Any]) -> list[bool | None]:
    return [claim.held for claim in control.claims(record)]


def doctored(record: dict[str, Any], power: float) -> dict[str, Any]:
    """Variance and KL are 10^(power gamma), in every seed but for 1 %: intervals have a width."""
    found = copy.deepcopy(record)
    for gamma, curves in found["rates"][str(experiment.RATE)]["gammas"].items():
        values = [10 ** (power * float(gamma)) * (1 + 0.01 * float(gamma) * seed) for seed in range(len(SEEDS))]
        for name in ("variance", "kl"):
            curves[name] = [[value] * (SHORT.points + 1) for value in values]
    return found


@pytest.mark.slow
class TestStudy:
    def test_teachers_arrive(self, record: dict[str, Any]) -> None:
        assert max(record["teacher"]["distance"]) < 0.5
        for path, (start, target) in zip(record["teacher"]["path"].values(), [(2, -3), (-2, 3)]):
            assert len(path) == SHORT.steps + 1
            assert path[0] == start and path[-1] == pytest.approx(target, abs=0.4)

    def test_students_of_a_seed_start_alike(self, record: dict[str, Any]) -> None:
        for name in ("kl", "distance"):
            starts = [[run[0] for run in words.curves(record, gamma, name)] for gamma in experiment.GAMMAS]
            assert all(start == pytest.approx(starts[0], rel=1e-3) for start in starts)

    def test_variance_rises_with_gamma_for_the_same_student(self, record: dict[str, Any]) -> None:
        for at in range(SHORT.points + 1):
            for seed in range(len(SEEDS)):
                found = [words.curves(record, gamma, "same")[seed][at] for gamma in experiment.GAMMAS]
                assert found == sorted(found) and found[-1] > 2 * found[0]

    def test_the_student_of_gamma_0_learns(self, record: dict[str, Any]) -> None:
        for run in words.curves(record, 0.0, "kl"):
            assert run[-1] < run[0] / 3
        assert max(run[-1] for run in words.curves(record, 0.0, "distance")) < 1

    def test_verdicts_follow_the_record(self, record: dict[str, Any]) -> None:
        for power, wanted in ((1.5, [True] * 3), (-1.5, [False] * 3), (0.5, [True, False, True])):
            assert verdicts(doctored(record, power)) == wanted

    def test_seeds_that_disagree_show_nothing(self, record: dict[str, Any]) -> None:
        found = doctored(record, 1.5)
        at_one = found["rates"][str(experiment.RATE)]["gammas"]["1.0"]
        at_one["kl"][0] = [1.0] * 3  # the KL of gamma = 0
        assert verdicts(found) == [True, True, None]
        at_one["variance"][0] = [1.0] * 3
        assert verdicts(found) == [None, None, None]

    def test_one_step_that_falls_is_enough(self, record: dict[str, Any]) -> None:
        found = doctored(record, 1.5)
        curves = found["rates"][str(experiment.RATE)]["gammas"]
        curves["0.5"]["variance"] = [[1.0] * 3] * len(SEEDS)
        assert verdicts(found) == [False, True, True]

    def test_other_rates_have_verdicts_of_their_own(self, record: dict[str, Any]) -> None:
        both = copy.deepcopy(record)
        both["rates"]["0.01"] = copy.deepcopy(both["rates"][str(experiment.RATE)])
        assert verdicts(both) == [verdicts(record)[i] for i in (0, 1, 1, 2, 2)]
        both["rates"]["0.01"]["gammas"]["1.0"]["kl"] = [[1e6] * 3] * len(SEEDS)
        assert verdicts(both)[-1] is True and "0.01" in control.claims(both)[-1].claim
        assert "0.01" in page("control", both)

    def test_the_page_and_the_picture(self, record: dict[str, Any], tmp_path: Path) -> None:
        assert set(control.tables(record)) == {"variance", "students", "teachers"}
        assert "learning rate" in page("control", record)
        file = tmp_path / "control.png"
        control.draw(record).savefig(file, dpi=110)
        assert 10_000 < file.stat().st_size < 150_000

    def test_no_rate_is_left_out_of_the_picture(self, record: dict[str, Any]) -> None:
        found = copy.deepcopy(record)
        for rate in range(1, 5):
            found["rates"][f"{rate}.0"] = found["rates"][str(experiment.RATE)]
        with pytest.raises(ValueError, match="zip"):
            control.draw(found)


def test_teachers_of_a_seed_are_the_same_beside_others() -> None:
    both, one = train_teachers(2, 4, 3, [1, 2]), train_teachers(2, 4, 3, [2])
    for x, y in zip(both.parameters(), one.parameters()):
        torch.testing.assert_close(x[[1, 3]], y, atol=1e-4, rtol=1e-4)

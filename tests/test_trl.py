"""TRL's trainers with the loss on the top K: real rollouts and optimizer steps, against a step worked out by hand."""

import ast
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.formulas import kl, plain
from topk_rkl.trainers import trl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("trl"),  # whose import takes seconds: one worker has it
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, about what TRL asks of it
]
PAGE = Path(__file__).parent.parent / "docs/integrations/trl.md"
K, T = 8, 0.7
SPECIAL = list(range(5, 135))  # half of all bytes, so that some occur
# What each trainer's configuration says beside COMMON, and the temperature of its loss.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "Distillation": ({"max_completion_length": 10, "temperature": T, "top_p": 0.9}, T),
    "GKD": ({"max_new_tokens": 10, "temperature": T, "lmbda": 1.0, "beta": 1.0}, 1.0),  # TRL never passes its own
    "GOLD": ({"max_completion_length": 10, "temperature": T, "lmbda": 1.0, "beta": 1.0, "top_p": 0.9}, T),
    "IWOPD": ({"max_completion_length": 10, "temperature": T, "distillation_objective": "jsd", "top_p": 0.9}, T),
    "SDPO": (
        {"max_completion_length": 10, "temperature": T, "num_generations": 2, "distillation_mode": "topk_logits",
         "top_p": 0.9}, T,
    ),
    "ServerDistillation": (
        {"max_completion_length": 10, "temperature": T, "beta": 0.0, "teacher_model_server_url": "http://localhost",
         "top_p": 0.9}, T,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module of tiny models, with the folders of a student and a teacher, and nothing to be fetched."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TQDM_DISABLE": "1"}.items():
            patch.setenv(name, value)
        module, folder = import_module("tests.tiny_trl"), tmp_path_factory.mktemp("trl")
        module.STUDENT = module.save(folder / "Qwen/Qwen3-0.6B", 0)
        module.TEACHER = module.save(folder / "Qwen/Qwen3-4B", 1, layers=2)
        module.FOLDER = folder
        patch.setattr("trl.generation.vllm_client.VLLMClient", module.server(module.TEACHER))
        yield module


def made(name: str, tiny: Any, *, stock: bool = False, settings: dict | None = None, **options: Any) -> Any:
    """A trainer of this name, ours or TRL's own."""
    from datasets import Dataset

    _, module, base = trl.TRAINERS[f"TopK{name}Trainer"]
    home = "trl" if name == "Distillation" else module
    trainer = getattr(import_module(home), base) if stock else getattr(trl, f"TopK{name}Trainer")
    common = {
        "output_dir": str(tiny.FOLDER / "out"), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_steps": 2, "logging_steps": 1, "learning_rate": 0.01, "max_grad_norm": 0.0, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "max_length": 64,
    }  # fmt: skip
    config = getattr(import_module(home), base.replace("Trainer", "Config"))
    common = {key: value for key, value in common.items() if key in config.__dataclass_fields__}
    rows: dict[str, list] = {"prompt": tiny.PROMPTS}
    if name in ("GKD", "GOLD", "IWOPD"):
        rows = {"messages": tiny.DIALOGS}
    if name == "SDPO":
        rows = {"prompt": [x[:1] for x in tiny.DIALOGS], "privileged_context": ["it is so"] * 8}
        options["reward_funcs"] = lambda completions, **_: [float(i % 2) for i in range(len(completions))]
    elif name != "ServerDistillation":
        options["teacher_model"] = tiny.load(tiny.TEACHER)
    return trainer(
        model=tiny.load(tiny.STUDENT), args=config(**{**common, **CASES[name][0], **(settings or {})}),
        train_dataset=Dataset.from_dict(rows), processing_class=tiny.tokenizer(), **options,
    )  # fmt: skip


def trained(trainer: Any) -> tuple[list[dict], list[dict], dict[str, Tensor]]:
    """Its logs, the batches of its first optimizer step with what TRL divides by, and the gradients of that step."""
    from transformers import TrainerCallback

    batches: list[dict] = []
    grads: dict[str, Tensor] = {}
    compute_loss = trainer.compute_loss

    def watched(model: Any, inputs: dict, *args: Any, **options: Any) -> Any:
        batches.append({**inputs, "items": options.get("num_items_in_batch")})
        return compute_loss(model, inputs, *args, **options)

    class First(TrainerCallback):
        def on_pre_optimizer_step(self, _: Any, state: Any, *__: Any, model: Any, **___: Any) -> None:
            if state.global_step == 0:
                grads.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.compute_loss = watched
    trainer.add_callback(First())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return logs, batches[: trainer.args.gradient_accumulation_steps], grads


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
        ids, at = w.detach().topk(K).indices, CASES[name][1]
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
def test_a_step_after_rollouts_is_the_one_worked_out_by_hand(name: str, tiny: Any) -> None:
    options: dict[str, Any] = {"top_p": 0.9} if name == "GKD" else {}
    torch.manual_seed(1)
    trainer = made(name, tiny, k=K, special_token_ids=SPECIAL, **options)
    assert trainer.generation_config.top_p == 0.9 == trainer.generation_kwargs["top_p"]
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    logs, batches, grads = trained(trainer)
    student, teacher = (
        tiny.load(folder).double() for folder in (tiny.STUDENT, tiny.STUDENT if name == "SDPO" else tiny.TEACHER)
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
    assert any(not torch.equal(before[key], p) for key, p in trainer.model.named_parameters())


@pytest.mark.parametrize("name", ["Distillation", "GKD", "GOLD", "IWOPD"])
def test_accumulated_micro_batches_give_the_step_of_one_batch(name: str, tiny: Any) -> None:
    """On rollouts that are the same whatever the batch: none, or the best token each time."""
    settings = {"top_k": 1} if name == "Distillation" else {"lmbda": 0.0}
    steps = []
    for size, times in (4, 1), (2, 2):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "max_steps": 1}
        logs, _, grads = trained(made(name, tiny, k=K, settings={**settings, **sizes}))
        steps.append((logs[0]["loss"], grads))
    (loss, grads), (accumulated, sums) = steps
    assert loss == pytest.approx(accumulated, rel=1e-5)
    for key, grad in grads.items():
        torch.testing.assert_close(sums[key], grad, rtol=1e-3, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["GOLD", "IWOPD"])
def test_trl_divides_by_too_many_tokens_which_ours_does_not(name: str, tiny: Any) -> None:
    """Once this fails, TRL has repaired it, and `TopKBuffered` has nothing left to do."""
    settings = {"lmbda": 0.0, "max_steps": 1, **({"loss_top_k": K} if name == "IWOPD" else {})}
    losses = []
    for size, times in (4, 1), (2, 2):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times}
        losses.append(trained(made(name, tiny, stock=True, settings={**settings, **sizes}))[0][0]["loss"])
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-4)


def test_gkd_divides_by_the_tokens_of_the_answers_in_the_dataset(tiny: Any) -> None:
    _, batches, _ = trained(made("GKD", tiny, k=K, settings={"max_steps": 1, "per_device_train_batch_size": 4}))
    generated = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    answers = sum(len(dialog[1]["content"]) + 1 for dialog in tiny.DIALOGS)  # and "</s>"
    assert int(batches[0]["items"]) == answers != generated


def test_the_configuration_is_followed_where_it_is_asked_for(tiny: Any) -> None:
    """Forward KL from beta = 0, on all tokens: the loss of TRL's own trainer."""
    settings = {"lmbda": 0.0, "beta": 0.0, "max_steps": 1}
    ours, _, _ = trained(made("GKD", tiny, k=tiny.VOCAB, divergence="beta", diagnostics=(), settings=settings))
    theirs, _, _ = trained(made("GKD", tiny, stock=True, settings=settings))
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5)
    assert not any(key.startswith("topk_rkl/") for key in ours[0])


def test_no_entropy_is_logged_where_none_is_asked_for(tiny: Any) -> None:
    trainer = made("Distillation", tiny, k=K, diagnostics=["student_mass"], settings={"max_steps": 1})
    logs, _, _ = trained(trainer)
    assert "entropy" not in logs[0]
    assert 0 < logs[0]["topk_rkl/student_mass"] < 1


def test_an_evaluation_logs_its_own_diagnostics(tiny: Any) -> None:
    trainer = made("Distillation", tiny, k=K, mass="tail")
    metrics = trainer.evaluate(trainer.train_dataset)
    assert metrics["eval_loss"] > 0
    assert 0 < trainer.state.log_history[-1]["eval_topk_rkl/student_mass"] < 1


def test_a_beta_that_says_another_divergence_is_told(tiny: Any) -> None:
    with pytest.warns(
        UserWarning, match=r"beta is 0\.5, but this loss is reverse KL, which is beta=1\.0; pass beta=1\.0"
    ):
        made("GKD", tiny, k=K, settings={"beta": 0.5})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="beta is")
        made("GKD", tiny, k=K, settings={"beta": 1.0})  # both remedies
        made("GKD", tiny, k=K, settings={"beta": 0.5}, divergence="beta")


@pytest.mark.parametrize(
    ("name", "settings", "options", "message"),
    [
        ("GKD", {}, {"mass": "ema_pg"}, "mass is 'ema_pg'; use one of renormalized"),
        ("GKD", {}, {"diagnostics": ["teacher_entropy"]}, "diagnostics is 'teacher_entropy'; use one of student_mass"),
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
    name: str, settings: dict, options: dict, message: str, tiny: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        made(name, tiny, settings=settings, **options)


def test_trl_is_imported_when_a_trainer_is_asked_for_and_its_module_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, topk_rkl.trainers.trl; assert not {'trl', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
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


@pytest.mark.parametrize("trainer", ["Distillation", "GKD", "function"])
def test_the_lines_of_the_page_make_a_training_step(trainer: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models stand where the hub's names lead, and rollouts are cut short."""
    from datasets import Dataset
    from transformers import GenerationMixin
    from trl.experimental.gkd import GKDTrainer

    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    code = dict(zip(["Distillation", "GKD", "function"], blocks, strict=True))[trainer]
    assert len(ast.parse(code).body) <= 5
    generate = GenerationMixin.generate

    def short(self: Any, *args: Any, generation_config: Any, **options: Any) -> Any:
        generation_config.max_new_tokens = 4
        return generate(self, *args, generation_config=generation_config, **options)

    monkeypatch.setattr(GenerationMixin, "generate", short)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # TRL's default: bf16
    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(GKDTrainer.generalized_jsd_loss))
    monkeypatch.chdir(tiny.FOLDER)
    scope: dict[str, Any] = {"dataset": Dataset.from_dict({"messages": tiny.DIALOGS})}
    if trainer == "Distillation":
        scope = {"dataset": Dataset.from_dict({"prompt": tiny.PROMPTS})}
    exec(code, scope)
    if trainer == "function":  # of which a trainer of TRL's own makes the step of ours
        settings = {"lmbda": 0.0, "max_steps": 1}
        scope["trainer"] = made("GKD", tiny, stock=True, settings=settings)
        (log,), (wanted,) = (trained(x)[0] for x in (scope["trainer"], made("GKD", tiny, k=32, settings=settings)))
        assert log["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert scope["trainer"].state.global_step > 0

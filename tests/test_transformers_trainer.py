"""The Trainer of transformers with our loss has, at its optimiser, the gradient of the formula in float64."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from tests.ranks import WORLD, on_ranks, together
from tests.sharded_model import whole
from tests.tiny_models import FAMILIES, K, V, collate, distance, formula, inputs_of, rows, tiny
from topk_rkl.loss import ForwardKL, Support, teacher_topk
from topk_rkl.trainers.head_loss import HeadLoss, HeadTopK
from topk_rkl.trainers.transformers import Distillation, distill

ROUNDING = 1e-6  # of a gradient in float32, relative
PAGES = Path(__file__).parent.parent / "docs/integrations"
ENTRIES = ("hidden", "logits")
ROWS = rows()
BATCH = collate(ROWS)


class Gradients(TrainerCallback):
    """Those that the optimiser is given at its last step."""

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        self.last = {re.sub(r"^(_orig_mod|module)\.", "", name): p.grad.clone() for name, p in trained}


Train = Callable[..., tuple[dict[str, Tensor], Trainer]]


def run(
    folder: Path,
    student: Any,
    loss: Any,
    size: int = 8,
    accumulated: int = 1,
    data: Any = ROWS,
    collator: Any = collate,
    **options: Any,
) -> tuple[dict[str, Tensor], Trainer]:
    """The last gradients of a Trainer that runs, by default, for one step on all rows in one batch."""
    given = {
        "output_dir": str(folder), "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated,
        "max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "remove_unused_columns": False, "train_sampling_strategy": "sequential",
    } | options  # fmt: skip
    seen = Gradients()
    trainer = Trainer(
        student, TrainingArguments(**given), train_dataset=data, eval_dataset=ROWS, data_collator=collator,
        compute_loss_func=loss, callbacks=[seen],
    )  # fmt: skip
    trainer.train()
    return seen.last, trainer


@pytest.fixture
def train(tmp_path: Path) -> Train:
    return partial(run, tmp_path)


def logged(trainer: Trainer, name: str = "loss") -> float:
    return next(line[name] for line in trainer.state.log_history if name in line)


def teacher_of(family: str = "llama") -> PreTrainedModel:
    return tiny(family, seed=1, layers=2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_big_batch_and_accumulated_ones_have_the_gradient_of_the_formula(
    train: Train, family: str, entry: str
) -> None:
    teacher = teacher_of(family)
    value, want = formula(tiny(family), teacher, BATCH)
    found = []
    for size, accumulated in ((8, 1), (2, 4)):
        student = tiny(family)
        gradients, trainer = train(student, distill(student, teacher, k=K, entry=entry), size, accumulated)
        assert logged(trainer) == pytest.approx(value, rel=ROUNDING)
        assert distance(gradients, want) < ROUNDING
        found.append(gradients)
    assert distance(*found) < ROUNDING


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("how", ["gradient_checkpointing", pytest.param("torch_compile", marks=pytest.mark.slow)])
def test_it_is_the_same_gradient(train: Train, how: str, entry: str) -> None:
    student, teacher = tiny(), teacher_of()
    options = {"torch_compile_backend": "eager"} if how == "torch_compile" else {}
    gradients, _ = train(student, distill(student, teacher, k=K, entry=entry), 4, 2, **{how: True}, **options)
    assert distance(gradients, formula(tiny(), teacher, BATCH)[1]) < ROUNDING


@pytest.mark.parametrize("entry", ENTRIES)
def test_autocast_rounds_as_much_as_it_rounds_the_formula(train: Train, entry: str) -> None:
    student, teacher = tiny(), teacher_of()
    gradients, _ = train(student, distill(student, teacher, k=K, entry=entry), bf16=True)
    want = formula(tiny(), teacher, BATCH)[1]
    rounded = distance(formula(tiny(), teacher, BATCH, autocast=torch.bfloat16)[1], want)
    assert 1e-3 < distance(gradients, want) < 1.1 * rounded


def lora(**options: Any) -> PeftModel:
    """Adapters that are not 0, as they are after some steps."""
    given = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    student = get_peft_model(tiny(), LoraConfig(**given))
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return student


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["body", "head saved whole"])
def test_lora(train: Train, options: dict[str, Any], entry: str) -> None:
    student, teacher = lora(**options), teacher_of()
    want = formula(student, teacher, BATCH)[1]
    gradients, _ = train(student, distill(student, teacher, k=K, entry=entry), 2, 4)
    assert distance(gradients, want) < ROUNDING
    assert any("lora_A" in name for name in want) and ("lm_head" in str([*want])) == bool(options)


def test_an_adapter_on_the_head_is_refused_and_the_named_entry_has_it(train: Train) -> None:
    student, teacher = lora(target_modules=["q_proj", "lm_head"]), teacher_of()
    with pytest.raises(TypeError, match=re.escape("the adapter 'default', which its weight lacks")) as refusal:
        distill(student, teacher, k=K)
    assert str(refusal.value).endswith("distill(student, teacher, entry='logits')")
    want = formula(student, teacher, BATCH)[1]
    gradients, _ = train(student, distill(student, teacher, k=K, entry="logits"))
    assert any("lm_head.lora_B" in name for name in want) and distance(gradients, want) < ROUNDING


def test_an_adapter_that_comes_after_the_loss_is_refused_too(train: Train) -> None:
    loss = distill(student := tiny(), teacher_of(), k=K)
    with pytest.raises(TypeError, match="which its weight lacks"):
        train(get_peft_model(student, LoraConfig(target_modules=["lm_head"])), loss)


def test_an_adapter_on_the_head_of_the_teacher_is_refused_and_the_named_call_has_it(train: Train) -> None:
    student, teacher, seen = tiny(), lora(target_modules=["lm_head"]), []
    with pytest.raises(TypeError, match=re.escape("distill(student, lambda inputs: teacher(**inputs).logits, k=...)")):
        distill(student, teacher, k=K)
    gradients, _ = train(
        student, distill(student, lambda inputs: seen.append([*inputs]) or teacher(**inputs).logits, k=K)
    )
    assert distance(gradients, formula(tiny(), teacher, BATCH)[1]) < ROUNDING
    assert seen == [[*inputs_of(BATCH)]]


def test_evaluation_and_generation_see_the_head_as_it_is(train: Train) -> None:
    student, teacher, asked = tiny(), teacher_of(), []
    teacher.register_forward_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    distilled = distill(student, teacher, k=K)
    _, trainer = train(student, distilled, 4, 2, per_device_eval_batch_size=8, eval_strategy="steps", eval_steps=1)
    assert asked == [False] * 3 and not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert logged(trainer, "eval_loss") == pytest.approx(formula(student, teacher, BATCH)[0], rel=ROUNDING)
    made = trainer.predict(datasets.Dataset.from_list(ROWS))
    asked.clear()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(made.predictions), student(**inputs_of(BATCH)).logits)
    prompt = BATCH["input_ids"][:2, :4]
    found = student.generate(prompt, max_new_tokens=5, do_sample=False)
    fresh = tiny()
    fresh.load_state_dict(student.state_dict())
    assert torch.equal(found, fresh.generate(prompt, max_new_tokens=5, do_sample=False)) and asked == []


def test_sft_trainer_of_trl_takes_the_function(tmp_path: Path) -> None:
    words = WordLevel({str(token): token for token in range(V)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0", bos_token="1", eos_token="2")
    student, teacher, data, seen = tiny(), teacher_of(), datasets.Dataset.from_list(ROWS), Gradients()
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_grad_norm": 0.0}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    SFTTrainer(
        student, SFTConfig(str(tmp_path), gradient_checkpointing=False, **options, **quiet), train_dataset=data,
        processing_class=tokenizer, callbacks=[seen], compute_loss_func=distill(student, teacher, k=K),
    ).train()  # fmt: skip
    assert distance(seen.last, formula(tiny(), teacher, BATCH)[1]) < ROUNDING


def stored(teacher: PreTrainedModel) -> list[dict[str, list]]:
    """The rows with the teacher's K tokens."""
    made = []
    for row in ROWS:
        with torch.no_grad():
            ids, log_probs = teacher_topk(teacher(torch.tensor([row["input_ids"]])).logits[0], K).tensors
        made.append(row | {"teacher_ids": ids.tolist(), "teacher_log_probs": log_probs.tolist()})
    return made


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_stored_teacher(train: Train, entry: str) -> None:
    student, teacher = tiny(), teacher_of()
    data = datasets.Dataset.from_list(stored(teacher))
    gradients, _ = train(student, distill(student, entry=entry), 2, 4, data=data)
    assert distance(gradients, formula(tiny(), teacher, BATCH)[1]) < ROUNDING


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_support_in_the_batch(train: Train, entry: str) -> None:
    student, teacher = tiny(), teacher_of()
    supports = [Support.from_dict({name: torch.tensor(x) for name, x in row.items()}) for row in stored(teacher)]

    def stacked(batch: list[dict]) -> dict:
        plain = collate([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in batch])
        return plain | {"teacher": Support.stack([row["teacher"].pad(plain["labels"].shape[1]) for row in batch])}

    data = [row | {"teacher": support} for row, support in zip(ROWS, supports)]
    distilled = distill(student, lambda inputs: inputs["teacher"], entry=entry)
    gradients, _ = train(student, distilled, 2, 4, data=data, collator=stacked)
    assert distance(gradients, formula(tiny(), teacher, BATCH)[1]) < ROUNDING


def test_dropped_columns_are_named(train: Train) -> None:
    data = datasets.Dataset.from_list(stored(teacher_of()))
    with pytest.raises(ValueError, match=r"must have teacher_ids, .*remove_unused_columns=False"):
        train(student := tiny(), distill(student), data=data, remove_unused_columns=True)


def loss_of(student: PreTrainedModel, distilled: Distillation, labels: Tensor = BATCH["labels"]) -> Tensor:
    """As the Trainer calls them."""
    return distilled(student.train()(**inputs_of(BATCH)), labels, (labels[:, 1:] != -100).sum())


def gradients_of(student: PreTrainedModel, *teacher: Any, **options: Any) -> dict[str, Tensor]:
    loss = loss_of(student, distill(student, *teacher, **options))
    return dict(zip(dict(student.named_parameters()), torch.autograd.grad(loss, [*student.parameters()])))


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_teacher_may_be_a_function_of_the_inputs(entry: str) -> None:
    teacher, want = teacher_of(), formula(tiny(), teacher_of(), BATCH)[1]

    def logits(inputs: dict[str, Tensor]) -> Tensor:
        assert inputs.keys() == inputs_of(BATCH).keys() and not torch.is_grad_enabled()
        return teacher(**inputs).logits

    functions = [
        (logits, K),
        (lambda inputs: teacher_topk(logits(inputs), K), None),
        (lambda inputs: teacher_topk(logits(inputs), K)[:, :-1], None),
    ]
    for function, k in functions:
        assert distance(gradients_of(tiny(), function, k=k, entry=entry), want) < ROUNDING


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_options_of_the_loss_reach_it(entry: str) -> None:
    teacher = teacher_of()
    found = gradients_of(tiny(), teacher, k=K, temperature=2.0, entry=entry)
    assert distance(found, formula(tiny(), teacher, BATCH, temperature=2.0)[1]) < ROUNDING
    found = gradients_of(tiny(), teacher, k=K, divergence=ForwardKL(), mass="tail", entry=entry)
    assert distance(found, with_tail(tiny(), teacher)) < ROUNDING


def with_tail(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, Tensor]:
    """The gradient of the forward KL over the K tokens and one class for all others, in float64."""
    labels, log = BATCH["labels"][:, 1:], []
    q = teacher(**inputs_of(BATCH)).logits[:, :-1].detach().double().softmax(-1)
    p = student(**inputs_of(BATCH)).logits[:, :-1].double().softmax(-1)
    ids = q.topk(K).indices
    for x in (q, p):
        inside = x.gather(-1, ids)
        log.append(torch.cat([inside, 1 - inside.sum(-1, keepdim=True)], -1).log())
    per_token = (log[0].exp() * (log[0] - log[1])).sum(-1)[labels != -100]
    return dict(zip(dict(student.named_parameters()), torch.autograd.grad(per_token.mean(), [*student.parameters()])))


@pytest.mark.parametrize("entry", ENTRIES)
def test_weights_are_factors_of_the_labels(entry: str) -> None:
    teacher, factors = teacher_of(), torch.rand(BATCH["labels"].shape)
    found = gradients_of(tiny(), teacher, k=K, entry=entry, weights=lambda _: factors)
    assert distance(found, formula(tiny(), teacher, BATCH, factors=factors)[1]) < ROUNDING


def test_the_trap_of_a_forgotten_shift_is_shut() -> None:
    """The labels come as the collator made them; those that are shifted already are refused."""
    teacher, student = teacher_of(), tiny()
    unshifted = BATCH | {"labels": torch.nn.functional.pad(BATCH["labels"][:, :-1], (1, 0), value=-100)}
    assert distance(formula(tiny(), teacher, unshifted)[1], gradients_of(tiny(), teacher, k=K)) > 0.1
    distill(student, teacher, k=K)
    with pytest.raises(ValueError, match="the batch has shift_labels"):
        student(**inputs_of(BATCH), shift_labels=BATCH["labels"])


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["labels", "attention_mask"])
def test_the_traps_of_labels_and_attention_masks_for_weights_are_shut(name: str, entry: str) -> None:
    student = tiny()
    with pytest.raises(TypeError, match=r"weights is torch.int64; it must be bool or float"):
        loss_of(student, distill(student, teacher_of(), k=K, entry=entry, weights=lambda _: BATCH[name]))


def test_the_trap_of_an_ignored_count_is_that_of_other_functions(train: Train) -> None:
    """Without the count of all micro-batches, 4 of them give a gradient about 4 times too large."""
    student, teacher = tiny(), teacher_of()
    distilled = distill(student, teacher, k=K)
    gradients, _ = train(student, lambda outputs, labels, **_: distilled(outputs, labels), 2, 4)
    assert distance(gradients, formula(tiny(), teacher, BATCH)[1]) == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_trap_of_a_part_of_the_student_is_shut(entry: str) -> None:
    """The backbone called for its hidden states, past DDP, leaves its gradients on their rank."""
    student = tiny()
    distilled = distill(student, teacher_of(), k=K, entry=entry)
    outputs = student.train().model(**inputs_of(BATCH))
    with pytest.raises(RuntimeError, match=r"has not run without labels.* call that whole model, not a part of it"):
        distilled(outputs, BATCH["labels"])
    loss_of(student, distilled)


def test_a_student_that_is_not_trained_is_told() -> None:
    distilled = distill(tiny(), teacher_of(), k=K)
    with pytest.raises(RuntimeError, match="give distill the model that the Trainer trains"):
        loss_of(tiny(), distilled)


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_loss_is_of_one_call(entry: str) -> None:
    student = tiny()
    distilled = distill(student, teacher_of(), k=K, entry=entry)
    outputs = student.train()(**inputs_of(BATCH))
    distilled(outputs, BATCH["labels"])
    with pytest.raises(RuntimeError, match="has not run without labels since the last loss"):
        distilled(outputs, BATCH["labels"])


def test_labels_in_the_call_leave_the_student_its_own_loss() -> None:
    student = tiny().train()
    want = student(**BATCH).loss
    distill(student, teacher_of(), k=K)
    assert torch.equal(student(**BATCH).loss, want)


@pytest.mark.parametrize(("training", "grad"), [(True, False), (False, True)])
def test_the_head_gives_logits_but_in_a_training_step(training: bool, grad: bool) -> None:
    student = tiny()
    distill(student, teacher_of(), k=K)
    with torch.set_grad_enabled(grad):
        assert torch.equal(student.train(training)(**inputs_of(BATCH)).logits, tiny()(**inputs_of(BATCH)).logits)


def test_the_head_is_its_own_again_after_an_error() -> None:
    student = tiny().train()
    want = student(**inputs_of(BATCH)).logits
    distill(student, lambda _: torch.zeros(8, 3, 96), k=K)
    with pytest.raises(ValueError, match="teacher has shape"):
        student(**inputs_of(BATCH))
    assert torch.equal(student.eval()(**inputs_of(BATCH)).logits, want)


def test_a_second_call_replaces_the_first() -> None:
    student, teacher, asked = tiny(), teacher_of(), []
    first = distill(student, lambda _: asked.append(1), k=K)
    second = distill(student, teacher, k=K)
    loss_of(student, second)
    assert asked == []
    with pytest.raises(RuntimeError, match="has not run"):
        loss_of(student, first)


def test_a_head_whose_logits_are_not_told_is_refused_at_the_first_step() -> None:
    student = tiny("cohere")
    distilled = distill(student, teacher_of("cohere"), k=K)
    student.logit_scale = 0.5  # which the forward reads, and its config does not
    with pytest.raises(RuntimeError, match=r"not those of logit_scale=0.25 and softcap=None, but up to"):
        loss_of(student, distilled)


def test_a_replica_is_refused() -> None:
    student = tiny()
    distill(student, teacher_of(), k=K)
    with pytest.raises(RuntimeError, match=r"torch.nn.DataParallel.*start a process per GPU"):
        student._replicate_for_data_parallel()(**inputs_of(BATCH))


def test_a_teacher_follows_the_inputs_to_their_device() -> None:
    student, teacher = tiny().to("meta"), teacher_of()
    distill(student, teacher, k=K)
    with suppress(RuntimeError):  # "meta" has no values, which a first call compares
        student.train()(input_ids=BATCH["input_ids"].to("meta"))
    assert teacher.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": None}, "k is None with a model for teacher; .* such as k=32"),
        ({"k": K, "entry": "head"}, "entry is 'head'; use one of hidden, logits"),
        ({"k": K, "mass": "all"}, "mass is 'all'"),
        ({"k": K, "divergence": "forward"}, "divergence is"),
        ({"k": K, "teacher": 3}, "teacher is a int; it must be a model, a function of its inputs, or None"),
        ({"k": K, "teacher": None}, "k is 8 without a teacher"),
    ],
)
def test_arguments_are_refused_before_a_trainer_starts(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        distill(tiny(), **{"teacher": teacher_of(), **arguments})


def test_an_encoder_decoder_is_refused() -> None:
    student = tiny()
    student.config.is_encoder_decoder = True
    with pytest.raises(TypeError, match="student is an encoder-decoder, whose labels are not shifted"):
        distill(student, teacher_of(), k=K)


def test_a_batch_without_labels_is_refused() -> None:
    student = tiny()
    distilled = distill(student, teacher_of(), k=K)
    with pytest.raises(ValueError, match="the batch has no labels"):
        distilled(student(**inputs_of(BATCH)), None)


def trained_together(group: Any, folder: Path, entry: str, averaged: bool) -> tuple[dict[str, Tensor], str, float]:
    """The gradients of a Trainer on this rank, which has rows `rank` and `rank + 4`, the model's wrapper, the loss."""
    given = {
        "RANK": group.rank(),
        "LOCAL_RANK": group.rank(),
        "WORLD_SIZE": WORLD,
        "MASTER_ADDR": "x",
        "MASTER_PORT": 1,
    }
    try:
        os.environ |= {name: str(value) for name, value in given.items()}  # as torchrun does
        student = tiny()
        distilled = distill(student, teacher_of(), k=K, entry=entry)
        gradients, trainer = run(folder, student, distilled, 1, 2, average_tokens_across_devices=averaged)
        return gradients, type(trainer.model_wrapped).__name__, logged(trainer)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in given:
            os.environ.pop(name)


@together
@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
def test_ranks_have_the_gradient_of_one_process(tmp_path: Path, entry: str) -> None:
    value, want = formula(tiny(), teacher_of(), BATCH)
    for gradients, wrapper, loss in on_ranks(WORLD, trained_together, tmp_path, entry, True):
        assert distance(gradients, want) < ROUNDING
        assert wrapper == "DistributedDataParallel" and loss == pytest.approx(value, rel=ROUNDING)


@together
@pytest.mark.slow
def test_ranks_that_count_by_themselves_have_the_mean_of_their_means(tmp_path: Path) -> None:
    results = on_ranks(WORLD, trained_together, tmp_path, "hidden", False)
    parts = [formula(tiny(), teacher_of(), collate(ROWS[rank::WORLD]))[1] for rank in range(WORLD)]
    want = {name: sum(part[name] for part in parts) / WORLD for name in parts[0]}
    assert distance(results[0][0], want) < ROUNDING
    assert distance(want, formula(tiny(), teacher_of(), BATCH)[1]) > 0.01


def wrapped_gradients(group: Any, how: str, entry: str) -> dict[str, Tensor]:
    """Of this rank, which has rows rank, rank + 2 and so on, with the loss that the Trainer multiplies by the ranks."""
    student, mesh = tiny(), DeviceMesh.from_group(group, "cpu")
    names = [name for name, _ in student.named_parameters()]
    distilled = distill(student, teacher_of(), k=K, entry=entry)
    wrapped: nn.Module = student
    if how.startswith("DDP"):
        wrapped = DistributedDataParallel(student, process_group=group, static_graph=how.endswith("static"))
    if how.startswith("FSDP1"):
        unit = student.model.layers[0] if how.endswith("root") else student.lm_head
        wrapped = FullyShardedDataParallel(
            student, process_group=group, use_orig_params=True, device_id=torch.device("cpu"),
            auto_wrap_policy=lambda module, recurse, **_: recurse or module is unit,
        )  # fmt: skip
    if how == "FSDP2":
        for unit in (student.model.layers[0], student.lm_head, student):
            fully_shard(unit, mesh=mesh)
    batch = collate(ROWS[group.rank() :: group.size()])
    loss = distilled(wrapped.train()(**inputs_of(batch)), batch["labels"], (BATCH["labels"][:, 1:] != -100).sum())
    (loss * group.size()).backward()
    if how.startswith("FSDP1"):
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            return dict(zip(names, [p.grad.clone() for p in wrapped.parameters()]))
    return dict(zip(names, [whole(p.grad) for p in wrapped.parameters()]))


@together
@pytest.mark.slow
@pytest.mark.parametrize("how", ["DDP", "DDP, static", "FSDP1", "FSDP1, head in the root", "FSDP2"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_wrappers_have_the_gradient_of_one_process(how: str, entry: str) -> None:
    want = formula(tiny(), teacher_of(), BATCH)[1]
    for gradients in on_ranks(2, wrapped_gradients, how, entry):
        assert distance(gradients, want) < ROUNDING


def dtypes_of_stored(group: Any) -> list[torch.dtype]:
    """Of the log-probs of a batch, within students that FSDP2 runs in bfloat16 and whose inputs it casts, or not."""
    batch, seen, mesh = collate(ROWS), [], DeviceMesh.from_group(group, "cpu")
    teacher = teacher_topk(torch.randn(*batch["labels"].shape, V), K)
    for cast in (True, False):
        student = tiny()
        distilled = distill(student, lambda inputs: seen.append(inputs["teacher"]) or seen[-1], entry="logits")
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=cast)
        fully_shard(student, mesh=mesh, mp_policy=policy)
        distilled(student.train()(**inputs_of(batch), teacher=teacher), batch["labels"])
    return [support.log_probs.dtype for support in seen]


@together
@pytest.mark.slow
def test_fsdp_rounds_a_teacher_in_the_batch_unless_it_casts_no_input() -> None:
    assert on_ranks(2, dtypes_of_stored) == [[torch.bfloat16, torch.float32]] * 2


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)


def lines(block: str) -> int:
    return len([line for line in block.splitlines() if line])


def test_the_page_of_the_trainer_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"Qwen/Qwen3-0.6B": tiny("qwen3"), "Qwen/Qwen3-4B": teacher_of("qwen3")}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", models.__getitem__)
    monkeypatch.chdir(tmp_path)
    first, weighted = blocks("transformers.md")
    scope = {
        "collator": collate,
        "data": datasets.Dataset.from_list(ROWS),
        "tokenizer": SimpleNamespace(eos_token_id=2),
    }
    exec(first, scope)
    student, teacher = models.values()
    value, _ = formula(student.eval(), teacher, BATCH, 32)  # whose head is as it is
    assert value < formula(tiny("qwen3"), teacher, BATCH, 32)[0]
    assert loss_of(student, scope["loss"]).item() == pytest.approx(value, rel=ROUNDING)
    assert lines(first) <= 5
    exec(weighted, scope)
    labels = torch.where(torch.arange(BATCH["labels"].shape[1]) == 6, 2, BATCH["labels"])
    want, _ = formula(student.eval(), teacher, BATCH | {"labels": labels}, 32, factors=labels != 2)
    assert loss_of(student, scope["loss"], labels).item() == pytest.approx(want, rel=ROUNDING)


def test_the_page_of_the_loop_trains() -> None:
    student, teacher = tiny().train(), teacher_of()
    optimizer = torch.optim.SGD(student.parameters(), 1.0)
    scope = {"student": student, "teacher": teacher, "batch": {**BATCH}, "optimizer": optimizer, "torch": torch}
    first, _, from_logits = blocks("loop.md")
    exec(first, scope)
    want = formula(tiny(), teacher, BATCH, 32)[1]
    assert distance({name: p.grad for name, p in student.named_parameters()}, want) < ROUNDING
    assert lines(first) <= 5
    before = dict(tiny().named_parameters())
    for name, p in student.named_parameters():
        torch.testing.assert_close(p, before[name] - p.grad)
    exec(from_logits, scope)
    fresh = tiny()
    scope["from_logits"](fresh, teacher, BATCH["labels"], **inputs_of(BATCH)).backward()
    assert distance({name: p.grad for name, p in fresh.named_parameters()}, want) < ROUNDING


def looped(group: Any) -> dict[str, Tensor]:
    """The gradients of the page's loop under DDP, with two micro-batches on each rank."""
    scope: dict[str, Any] = {}
    exec(blocks("loop.md")[1], scope)
    student, micro_batches = tiny().train(), [collate([row]) for row in ROWS[group.rank() :: WORLD]]
    head_loss = HeadLoss(DistributedDataParallel(student, process_group=group))
    scope["gradients"](HeadTopK(teacher_of(), K), head_loss, micro_batches, WORLD)
    return {name: p.grad for name, p in student.named_parameters()}


@together
@pytest.mark.slow
def test_the_loop_of_the_page_has_the_gradient_of_one_process_on_every_rank() -> None:
    for gradients in on_ranks(WORLD, looped):
        assert distance(gradients, formula(tiny(), teacher_of(), BATCH)[1]) < ROUNDING

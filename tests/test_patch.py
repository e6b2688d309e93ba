"""`topk_rkl.patch`: which trainers it knows, what it prints, and that it changes nothing where it refuses."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import topk_rkl
from tests.tiny_models import K, collate, distance, formula, rows, tiny
from topk_rkl.trainers.transformers import Distillation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("trl"),  # whose import takes seconds: one worker has it
]


def arguments(folder: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1, learning_rate=1.0,
        optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", report_to="none", save_strategy="no",
        use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip


def test_the_trainer_of_transformers_takes_the_step_of_the_formula(tmp_path, capsys) -> None:
    student, teacher, data = tiny(), tiny(seed=1), rows(8)
    _, want = formula(student, teacher, collate(data))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer = Trainer(student, arguments(tmp_path), train_dataset=data, data_collator=collate)
    assert topk_rkl.patch(trainer, k=K, teacher=teacher) is trainer
    assert isinstance(trainer.compute_loss_func, Distillation)
    assert f"asks distill for its loss: the teacher's top {K}, within the student's head" in capsys.readouterr().out
    trainer.train()
    assert distance({name: before[name] - p.detach() for name, p in student.named_parameters()}, want) < 1e-5


def test_a_stored_teacher_and_logits_are_said(tmp_path, capsys) -> None:
    trainer = Trainer(tiny(), arguments(tmp_path), train_dataset=rows(8), data_collator=collate)
    topk_rkl.patch(trainer, entry="logits")
    assert "the batch's teacher_ids and teacher_log_probs, the student's logits" in capsys.readouterr().out


class Own(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def test_what_it_does_not_know_is_refused_and_left_alone(tmp_path) -> None:
    with pytest.raises(
        TypeError, match=r"trainer is a \S*Own; it must be the Trainer.*SFTTrainer.*GKDTrainer.*HeadLoss"
    ):
        topk_rkl.patch(Own(tiny(), arguments(tmp_path)), teacher=tiny(seed=1))
    with pytest.raises(TypeError, match=r"trainer is a torch.nn.modules.linear.Linear"):
        topk_rkl.patch(nn.Linear(2, 3))
    trainer = Trainer(tiny(), arguments(tmp_path), compute_loss_func=torch.sum)
    with pytest.raises(ValueError, match=r"trainer has a compute_loss_func.*compute_loss_func = None first"):
        topk_rkl.patch(trainer, teacher=tiny(seed=1))
    trainer.compute_loss_func = None  # the remedy
    topk_rkl.patch(trainer, teacher=tiny(seed=1))
    assert isinstance(trainer.compute_loss_func, Distillation)

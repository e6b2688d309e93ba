"""Lightning: the module of its page, in each precision."""

import copy
import logging

import pytest
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from tests.trainers.pages import scope_of
from tests.trainers.small import formula, rows, tiny
from topk_rkl import Support, causal_topk_reverse_kl, teacher_topk

PROJECT = "lightning"
LENGTHS = (9, 14, 6, 11)

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's own: few workers, no checkpoints


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_module_of_the_page_trains(precision: str) -> None:
    """the LightningModule of the page, in precision {precision}"""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    student, teacher, batch = tiny(0), tiny(1), rows(*LENGTHS)
    truth = formula(student, teacher, batch, 32).detach()
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    seen = []

    class Recorded(scope_of("lightning.md")["Distil"]):
        def training_step(self, batch: dict, index: int) -> torch.Tensor:
            assert self.student.training and not self.teacher.training
            seen.append(super().training_step(batch, index))
            return seen[-1]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = super().configure_optimizers()
            optimizer.param_groups[0]["lr"] = 1e-2  # 1e-5 is less than half a step of bfloat16
            return optimizer

    module = Recorded(student, teacher)
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = [{name: x[i] for name, x in batch.items()} for i in range(len(LENGTHS))]
    trainer.fit(module, DataLoader(data, batch_size=len(LENGTHS)))
    assert len(seen) == 3 and truth > 0.01
    by = 1e-5 if precision == "32-true" else 5e-2
    torch.testing.assert_close(seen[0].detach().double(), truth, rtol=by, atol=0)
    assert seen[2] < seen[0] and float(trainer.callback_metrics["loss"]) == pytest.approx(float(seen[2]))
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert all((p != before[0][name].to(dtype)).any() for name, p in module.student.named_parameters())
    for name, p in module.teacher.named_parameters():
        assert torch.equal(p, before[1][name].to(dtype)), name


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_support_in_the_batch_is_moved_and_trained_by(precision: str) -> None:
    """a Support in the batch, in precision {precision}"""
    student, teacher, batch = tiny(0), tiny(1), rows(*LENGTHS)
    truth = formula(student, teacher, batch, 32).detach()
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        support = teacher_topk(teacher(**inputs).logits, 32)
    seen = []

    class Stored(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student = student

        def training_step(self, batch: dict, index: int) -> torch.Tensor:  # noqa: ARG002
            assert isinstance(batch["teacher"], Support) and not batch["teacher"].normalized
            logits = self.student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            seen.append(causal_topk_reverse_kl(logits, batch["teacher"], batch["labels"]))
            self.log("loss", seen[-1], on_epoch=True)
            return seen[-1]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    trainer = Trainer(
        max_epochs=2, accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = [{**{name: x[i] for name, x in batch.items()}, "teacher": support[i]} for i in range(len(LENGTHS))]
    trainer.fit(Stored(), DataLoader(data, batch_size=len(LENGTHS)))
    by = 1e-5 if precision == "32-true" else 5e-2
    torch.testing.assert_close(seen[0].detach().double(), truth, rtol=by, atol=0)
    assert seen[1] < seen[0]

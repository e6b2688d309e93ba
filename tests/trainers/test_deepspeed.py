"""DeepSpeed: ZeRO 1 to 3 on 2 processes give the gradient and the step of one process."""

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.trainers.pages import scope_of
from tests.trainers.small import formula, rows, tiny
from tests.trainers.two import WORLD, on_two
from topk_rkl.loss import linear_topk_reverse_kl, teacher_topk

PROJECT = "deepspeed"
LENGTHS, K = (9, 14, 6, 11), 16
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,  # 1 by default
    "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def mine(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x[dist.get_rank() :: WORLD] for name, x in batch.items()}


def start(stage: int) -> Any:
    """The engine around the student, and the head's parameter."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    import deepspeed

    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # or it compiles a module of C++ first
    config = {**CONFIG, "zero_optimization": {"stage": stage}}
    student = tiny(0)
    engine, *_ = deepspeed.initialize(model=student, config=config, dist_init_required=False)
    return engine, student.lm_head.weight


def recorded(engine: Any, losses: list[float]) -> Any:
    backward = engine.backward

    def recording(loss: Tensor) -> None:
        losses.append(float(loss.detach()))
        backward(loss)

    engine.backward = recording
    return engine


def trained(stage: int) -> tuple[list[float], dict[str, Tensor]]:
    """Two steps of the page's function: the losses, and the parameters that they leave."""
    engine, _ = start(stage)
    import deepspeed

    losses: list[float] = []
    batches = [mine(rows(*LENGTHS, seed=seed)) for seed in (0, 1)]
    scope_of("deepspeed.md")["train"](recorded(engine, losses), tiny(1).eval(), batches, k=K)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return losses, {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def one_process() -> tuple[list[Tensor], dict[str, Tensor]]:
    student, teacher, losses = tiny(0), tiny(1).eval(), []
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    for seed in (0, 1):
        losses.append(formula(student, teacher, rows(*LENGTHS, seed=seed), K))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses, dict(student.named_parameters())


@pytest.mark.parametrize("stage", [1, 3])
def test_the_function_of_the_page_steps_as_one_process_does(tmp_path: Path, stage: int) -> None:
    """the function of the page: two steps of ZeRO-{stage} on 2 processes with gloo, against one process to 1e-6"""
    found = on_two(trained, tmp_path, stage)
    losses, truth = one_process()
    for i, loss in enumerate(losses):  # each is its rank's part of the mean, times the ranks
        assert sum(seen[i] for seen, _ in found) / WORLD == pytest.approx(float(loss), rel=1e-5)
    start = dict(tiny(0).named_parameters())
    for _, whole in found:
        for name, p in truth.items():
            assert (p - start[name]).abs().max() > 1e-4, name
            torch.testing.assert_close(whole[name], p.detach(), rtol=0, atol=1e-6, msg=lambda m, n=name: n + m)


def outside() -> Tensor:
    """The head's weight outside its forward pass, as it is and gathered."""
    engine, head = start(3)
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    batch, teacher = mine(rows(*LENGTHS)), tiny(1).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        support = teacher_topk(teacher(**inputs).logits[:, :-1], K)
    counted = batch["labels"][:, 1:] != -100
    total = counted.sum()
    dist.all_reduce(total)
    hidden = engine(**inputs, output_hidden_states=True).hidden_states[-1][:, :-1]

    def loss() -> Tensor:
        return linear_topk_reverse_kl(hidden, head, support, weights=counted, denominator=total / WORLD)

    with pytest.raises(ValueError, match=r"by DeepSpeed ZeRO-3 .* take the loss within the forward of the head"):
        loss()
    with deepspeed.zero.GatheredParameters([head]):
        engine.backward(loss())
    return safe_get_full_grad(head)


def test_a_partitioned_head_outside_its_forward_pass(tmp_path: Path) -> None:
    """ZeRO-3's head outside its forward pass is refused; GatheredParameters gives it the gradient of one process"""
    student = tiny(0)
    formula(student, tiny(1).eval(), rows(*LENGTHS), K).backward()
    for grad in on_two(outside, tmp_path):
        torch.testing.assert_close(grad, student.lm_head.weight.grad, rtol=0, atol=1e-6)

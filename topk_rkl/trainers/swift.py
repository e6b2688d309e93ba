"""ms-swift: the loss of `--rlhf_type gkd --gkd_logits_topk 32`, once a file of `--external_plugins` has this line:

    import topk_rkl.trainers.swift

`--beta` and `--temperature` mean what they do in ms-swift: 1 is reverse KL, 0 is forward KL, and what lies between is
the generalised Jensen-Shannon divergence. Without `--gkd_logits_topk`, and under Megatron, ms-swift's own loss runs.
"""

import inspect
import warnings

import torch
from torch import Tensor

if __name__.startswith("_swift_external"):  # the name that ms-swift gives a file
    raise ImportError(
        f"--external_plugins names {__file__}, whose folder ms-swift would search first: `import trl` would find "
        "topk_rkl/trainers/trl.py there; name a file of yours with the line `import topk_rkl.trainers.swift`"
    )

from swift.rlhf_trainers import gkd_trainer
from swift.rlhf_trainers.gkd_loss import (
    TeacherOutput,
    default_gather,
    default_kl_div,
    default_log_softmax,
)

from topk_rkl.loss import Support, generalized_jsd, topk_divergence

__all__ = ["gkd_loss"]

PARAMETERS = (
    "student_logits", "teacher_output", "labels", "beta", "temperature", "gather_fn", "log_softmax_fn", "kl_div_fn",
    "chunk_size",
)  # fmt: skip


def gkd_loss(
    student_logits: Tensor,  # (B, T, V)
    teacher_output: TeacherOutput,  # whose top-K tensors are (B, T_teacher, K)
    labels: Tensor,  # (B, T), shifted already
    beta: float,
    temperature: float,
    gather_fn: object = default_gather,
    log_softmax_fn: object = default_log_softmax,
    kl_div_fn: object = default_kl_div,
    chunk_size: int = 512,
) -> tuple[Tensor, Tensor]:  # (), and () how many positions it is the sum of
    """In place of ms-swift's function of this name, with its arguments."""
    if not teacher_output.is_topk_mode:
        warnings.warn(
            "ms-swift's own loss over the whole vocabulary runs, since gkd_logits_topk is not set; pass "
            "--gkd_logits_topk 32",
            stacklevel=2,
        )
    if not teacher_output.is_topk_mode or gather_fn is not default_gather:
        found: tuple[Tensor, Tensor] = _stock(
            student_logits, teacher_output, labels, beta, temperature, gather_fn, log_softmax_fn, kl_div_fn, chunk_size
        )
        return found
    here = labels != -100
    there = here if teacher_output.labels is None else teacher_output.labels != -100
    teacher = _moved(teacher_output.topk_indices, teacher_output.topk_logprobs, there, here)
    counted = here & (teacher.log_probs > -torch.inf).any(-1)
    total = topk_divergence(
        student_logits, teacher, divergence=generalized_jsd(beta), weights=counted, temperature=temperature,
        reduction="sum",
    )  # fmt: skip
    return total, counted.sum()


def _moved(
    ids: Tensor,  # (B, T_teacher, K)
    log_probs: Tensor,  # (B, T_teacher, K)
    there: Tensor,  # (B, T_teacher) bool
    here: Tensor,  # (B, T) bool, as many of them
) -> Support:  # (B, T, K), empty where not `here`
    """To the student's positions: the teacher of self-distillation reads another prompt before the same answer."""
    shape = (*here.shape, ids.shape[-1])
    moved = Support(ids.new_full(shape, -1), log_probs.new_full(shape, -torch.inf))
    moved.ids[here], moved.log_probs[here] = ids[there], log_probs[there]
    return moved


_stock = gkd_trainer.gkd_loss
if tuple(inspect.signature(_stock).parameters) != PARAMETERS:
    raise ImportError(
        f"gkd_loss of this ms-swift takes ({', '.join(inspect.signature(_stock).parameters)}), and not "
        f"({', '.join(PARAMETERS)}) as that of 4.6.0; install ms-swift==4.6.0"
    )
gkd_trainer.gkd_loss = gkd_loss

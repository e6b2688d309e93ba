"""The torch.autograd.Functions: the gradient is found in the forward pass, K numbers a row, and spread in the backward.

Only those K numbers and their ids are kept between the two. The incoming gradient scales them on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from topk_rkl import ops

Gradients = tuple[Tensor | None, ...]


def differentiable_once(backward: Callable[[Any, Tensor], Gradients]) -> Callable[[Any, Tensor], Gradients]:
    """A backward whose own derivative raises; once_differentiable alone lets a constant grad_output pass in silence."""
    refusing = once_differentiable(backward)

    def refusing_always(ctx: Any, grad_output: Tensor) -> Gradients:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grad_output = grad_output.detach().requires_grad_()
        return refusing(ctx, grad_output)

    return refusing_always


@dataclass(frozen=True)
class Options:
    """Everything that is not a tensor."""

    temperature: float
    overwrite_student_logits: bool
    backend: str


class _RowLoss(torch.autograd.Function):
    """What the two losses share: five inputs, of which the first, the student's logits, has a gradient."""

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any,
        grad_output: Tensor,  # (...), any strides
    ) -> Gradients:  # (..., V), and nothing for the other four
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        g, ids, student = ctx.saved_tensors
        shape, dtype = ctx.student_like
        out = torch.empty(shape, dtype=dtype, device=g.device) if student is None else student.detach()
        ops.scatter(g, ids, grad_output, out, ctx.unique, ctx.backend)
        if student is not None:
            torch.autograd.graph.increment_version(student)
        return out, None, None, None, None


class SupportLoss(_RowLoss):
    """The loss of every row on a support that is given, times its weight."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (..., V)
        ids: Tensor,  # (..., K)
        values: Tensor,  # (..., K)
        weights: Tensor | None,  # (...)
        options: Options,
    ) -> Tensor:  # (...)
        loss: Tensor
        loss, g = ops.support_loss(student, ids, values, weights, options.temperature, options.backend)
        _save(ctx, student, g, ids, options, unique=False)
        return loss


class SelectLoss(_RowLoss):
    """The loss of every row on the teacher's top k, selected in the same pass, times its weight."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (..., V_student)
        teacher: Tensor,  # (..., V)
        k: int,
        weights: Tensor | None,  # (...)
        options: Options,
    ) -> Tensor:  # (...)
        loss: Tensor
        loss, ids, g = ops.select_loss(student, teacher, k, weights, options.temperature, options.backend)
        _save(ctx, student, g, ids, options, unique=True)
        return loss


def _save(ctx: Any, student: Tensor, g: Tensor, ids: Tensor, options: Options, unique: bool) -> None:
    ctx.student_like = student.shape, student.dtype
    ctx.backend, ctx.unique = options.backend, unique
    # Saved for its version: autograd then refuses a second backward pass, which would find the logits overwritten.
    ctx.save_for_backward(g, ids, student if options.overwrite_student_logits else None)

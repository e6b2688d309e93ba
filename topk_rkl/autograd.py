"""The torch.autograd.Functions: the forward pass finds the gradient, K numbers per row, and the backward writes it out.

Only those K numbers and their ids are kept between the two. The incoming gradient scales them on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from topk_rkl import ops
from topk_rkl.divergence import Terms
from topk_rkl.rows import times

Gradients = tuple[Tensor | None, ...]


class _Gradient(torch.autograd.Function):
    """Stands between a gradient and all it was made of, so that any way to its own derivative meets the refusal."""

    @staticmethod
    def forward(ctx: Any, backward: Callable[..., Gradients], name: str, *made_of: Tensor | None) -> Gradients:
        ctx.name = name
        return backward(*made_of)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        name = ctx.name.removesuffix("Backward")
        raise RuntimeError(
            f"{name} has no second derivative: its gradient is found in the forward pass. For one, write the loss in "
            "plain PyTorch over the K gathered logits, as the README's `plain` does"
        )


def differentiable_once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A backward(ctx, grad_output, *saved) of the first output alone, whose own derivative raises however asked for.

    What is saved has to lead back to each input: the input itself, or an output. Under torch.compile torch refuses.
    """

    def refusing(ctx: Any, grad_output: Tensor | None, *_: None) -> Gradients:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        made_of = grad_output, *ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients: Gradients = _Gradient.apply(partial(backward, ctx), ctx.name(), *made_of)
            return gradients
        return backward(ctx, *made_of)

    return refusing


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """For the backward pass, in the order of its arguments after grad_output."""
    if not torch.compiler.is_compiling():  # which drops what is not used
        ctx.set_materialize_grads(False)  # of the outputs that are there only to be saved
    ctx.save_for_backward(*[None if x is None else savable(x) for x in tensors])


def savable(x: Tensor, copy: bool = True) -> Tensor:
    """What autograd may save: of a tensor made under torch.inference_mode a copy, or its memory under another name."""
    if torch.compiler.is_compiling():  # which cannot tell: of ids alone, K numbers per row, there is always a copy
        return x if x.is_floating_point() else ops.kept(x)
    if not x.is_inference():
        return x
    memory = x.untyped_storage(), x.storage_offset(), x.shape, x.stride()
    return x.clone() if copy else x.new_empty(0).set_(*memory)


@dataclass(frozen=True)
class Options:
    """Everything that is not a tensor."""

    backend: str
    terms: Terms | None = None  # of a divergence that is a function
    overwrite_student_logits: bool = False
    weight_grad: str = "dense"
    scaled: bool = False  # of the products with the head: by a logit scale
    capped: bool = False  # by a softcap


class RowLoss(torch.autograd.Function):
    """What losses from logits share: of their inputs the first, the student's logits, has a gradient."""

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any,
        grad_output: Tensor,  # (...), any strides
        g: Tensor,  # (..., K)
        ids: Tensor,  # (..., K)
        student: Tensor | None,  # (..., V), to overwrite
    ) -> Gradients:  # (..., V), and nothing for the others
        return scattered(ctx, grad_output, g, ids, student), *[None] * (len(ctx.needs_input_grad) - 1)


class SupportLoss(RowLoss):
    """The loss of every row on a support that is given, times its weight."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (..., V)
        ids: Tensor,  # (..., K)
        log_probs: Tensor,  # (..., K)
        weights: Tensor | None,  # (...)
        objective: Tensor | None,  # (numbers,)
        options: Options,
    ) -> tuple[Tensor, Tensor]:  # (...), and (..., K) for the backward pass
        loss, g = ops.support_loss(student, ids, log_probs, weights, objective, options.backend, terms=options.terms)
        keep_row(ctx, student, options, g, ids, unique=False)
        return loss, g


class SelectLoss(RowLoss):
    """The loss of every row on the teacher's top k, selected in the same pass, times its weight."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (..., V_student)
        teacher: Tensor,  # (..., V)
        k: int,
        weights: Tensor | None,  # (...)
        objective: Tensor | None,  # (numbers,)
        options: Options,
    ) -> tuple[Tensor, Tensor]:  # (...), and (..., K) for the backward pass
        loss, ids, g = ops.select_loss(student, teacher, k, weights, objective, options.backend, terms=options.terms)
        keep_row(ctx, student, options, g, ids, unique=True)
        return loss, g


def keep_row(
    ctx: Any,
    student: Tensor,  # (..., V)
    options: Options,
    *found: Tensor,  # of the forward pass
    unique: bool,
) -> None:
    """What `scattered` needs, and the student's logits last: None unless they are to be overwritten."""
    ctx.student_like = student.shape, student.dtype
    ctx.backend, ctx.unique = options.backend, unique
    # Saved for its version: autograd then refuses a second backward pass, which would find the logits overwritten.
    save(ctx, *found, student if options.overwrite_student_logits else None)


def scattered(
    ctx: Any,
    grad_output: Tensor,  # (...), any strides
    g: Tensor,  # (..., K)
    ids: Tensor,  # (..., K)
    student: Tensor | None,  # (..., V), to overwrite
) -> Tensor:  # (..., V)
    shape, dtype = ctx.student_like
    out = torch.empty(shape, dtype=dtype, device=g.device) if student is None else student.detach()
    ops.scatter(g, ids, grad_output, out, ctx.unique, ctx.backend)
    if student is not None:
        torch.autograd.graph.increment_version(student)
    return out


class MassLoss(torch.autograd.Function):
    """The loss of every row with the rest of the vocabulary as one more class, times its weight.

    It has a gradient everywhere: K numbers per row, and two for all the others, which the backward pass makes of the
    logits anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (..., V)
        ids: Tensor,  # (..., K)
        log_probs: Tensor,  # (..., K)
        tail: Tensor,  # (...)
        weights: Tensor | None,  # (...)
        objective: Tensor | None,  # (numbers,)
        options: Options,
    ) -> Tensor:  # (...)
        loss: Tensor
        loss, g, outside = ops.mass_loss(
            student, ids, log_probs, tail, weights, objective, options.backend, terms=options.terms
        )
        ctx.options = options
        save(ctx, g, ids, outside, student, objective)
        return loss

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any,
        grad_output: Tensor,  # (...), any strides
        g: Tensor,  # (..., K)
        ids: Tensor,  # (..., K)
        outside: Tensor,  # (..., 2)
        student: Tensor,  # (..., V)
        objective: Tensor | None,  # (numbers,)
    ) -> Gradients:  # (..., V), and nothing for the other six
        overwrite = ctx.options.overwrite_student_logits
        out = student.detach() if overwrite else torch.empty(student.shape, dtype=student.dtype, device=g.device)
        ops.mass_grad(g, ids, outside, grad_output, None if overwrite else student, out, objective, ctx.options.backend)
        if overwrite:
            torch.autograd.graph.increment_version(student)
        return out, None, None, None, None, None, None


class LinearLoss(torch.autograd.Function):
    """The loss of every row from its hidden state, for which the head makes only K logits, times its weight.

    The gradient of the hidden states is found in the forward pass, in float32, while the rows of the head are at hand.
    Those of head and bias are sums over all rows, which need grad_output first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (..., H)
        head: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        ids: Tensor,  # (..., K)
        log_probs: Tensor,  # (..., K)
        weights: Tensor | None,  # (...)
        objective: Tensor | None,  # (numbers,)
        options: Options,
    ) -> tuple[Tensor, ...]:  # (...), and for the backward pass (..., K), (..., H)
        of_hidden, of_head, of_bias = ctx.needs_input_grad[:3]
        loss, g, dhidden = ops.linear_loss(
            hidden, head, bias, ids, log_probs, weights, objective, of_hidden, options.backend, terms=options.terms
        )
        ctx.dtype = hidden.dtype
        describe_head(ctx, head, bias, options)
        summed = (g, ids, hidden) if of_head or of_bias else (None, None, None)
        save(ctx, dhidden if of_hidden else None, *summed)
        return loss, g, dhidden

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any,
        grad_output: Tensor,  # (...), any strides
        dhidden: Any,  # (..., H), or None if hidden has no gradient
        g: Any,  # (..., K), or None if neither head nor bias has one
        ids: Any,  # (..., K), as g
        hidden: Any,  # (..., H), as g
    ) -> Gradients:  # (..., H), (V, H), (V,), and nothing for the other five
        of_hidden, of_head, of_bias = ctx.needs_input_grad[:3]
        dhidden = ops.scale_rows(dhidden, grad_output, ctx.dtype, ctx.options.backend) if of_hidden else None
        g = times(g, grad_output) if of_head or of_bias else None
        return dhidden, *head_grads(ctx, g, ids, hidden), None, None, None, None, None


class LinearMassLoss(torch.autograd.Function):
    """The loss of every row from its hidden state with the rest of the vocabulary as one more class."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (..., H)
        head: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        ids: Tensor,  # (..., K)
        log_probs: Tensor,  # (..., K)
        tail: Tensor,  # (...)
        weights: Tensor | None,  # (...)
        objective: Tensor | None,  # (numbers,)
        options: Options,
    ) -> Tensor:  # (...)
        loss: Tensor
        loss, g, outside = ops.linear_mass_loss(
            hidden, head, bias, ids, log_probs, tail, weights, objective, options.backend, terms=options.terms
        )
        ctx.backend = options.backend
        save(ctx, g, ids, outside, hidden, savable(head, copy=False), bias, objective)
        return loss

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any,
        grad_output: Tensor,  # (...), any strides
        g: Tensor,  # (..., K)
        ids: Tensor,  # (..., K)
        outside: Tensor,  # (..., 2)
        hidden: Tensor,  # (..., H)
        head: Tensor,  # (V, H)
        bias: Any,  # (V,), or None
        objective: Tensor | None,  # (numbers,)
    ) -> Gradients:  # (..., H), (V, H), (V,), and nothing for the other six
        asked = zip(ctx.needs_input_grad[:3], (hidden, head, bias))
        outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else None for wanted, x in asked]
        ops.linear_mass_grad(g, ids, outside, grad_output, hidden, head, bias, *outs, objective, ctx.backend)
        return *outs, None, None, None, None, None, None


def describe_head(
    ctx: Any,
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    options: Options,
) -> None:
    """For `head_grads`, which needs no number of them."""
    ctx.options, ctx.head_shape, ctx.head_dtype = options, head.shape, head.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def head_grads(
    ctx: Any,
    g: Any,  # (..., K) times grad_output, or None if neither head nor bias has a gradient
    ids: Any,  # (..., K), as g
    hidden: Any,  # (..., H), as g
    gathered: bool = False,  # of a shard, which has few of the K ids
) -> Gradients:  # (V, H), (V,)
    """Of the inputs 1 and 2 of a Function, as sums over all rows."""
    _, of_head, of_bias = ctx.needs_input_grad[:3]
    options, dhead, dbias = ctx.options, None, None
    if of_bias:
        dbias = hidden.new_empty(ctx.head_shape[0], dtype=ctx.bias_dtype)
    if of_head and options.weight_grad == "dense":
        dhead = hidden.new_empty(ctx.head_shape, dtype=ctx.head_dtype)
    if dhead is not None or dbias is not None:
        ops.linear_weight_grad(g, ids, hidden, dhead, dbias, gathered, options.backend)
    if of_head and options.weight_grad == "sparse":
        dhead = _row_sparse(g, ids, hidden, ctx.head_shape, ctx.head_dtype, options.backend)
    return dhead, dbias


def _row_sparse(
    g: Tensor,  # (..., K)
    ids: Tensor,  # (..., K)
    hidden: Tensor,  # (..., H)
    shape: tuple[int, int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:  # (V, H) sparse, coalesced
    """The gradient over the touched rows of the head: the dense one of a head that has only those."""
    live = (ids >= 0) & (ids < shape[0]) & (g != 0)
    touched, places = ids[live].long().unique(return_inverse=True)  # how many is read on the host
    place = torch.full_like(ids, -1, dtype=torch.long).masked_scatter(live, places)
    values = hidden.new_empty((len(touched), shape[1]), dtype=dtype)
    ops.linear_weight_grad(g, place, hidden, values, None, False, backend)
    return torch.sparse_coo_tensor(touched[None], values, shape, is_coalesced=True, check_invariants=False)

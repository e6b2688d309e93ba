"""What a trainer imports: truncated, renormalised reverse KL on the teacher's top-K tokens.

from topk_rkl.loss import topk_reverse_kl

loss = topk_reverse_kl(student_logits, teacher_logits, k=32, weights=response_mask)
loss.backward()
"""

import torch
from torch import Tensor

from topk_rkl import checks, ops
from topk_rkl.backends import requested, use_backend
from topk_rkl.divergence import (
    AlphaBeta,
    Divergence,
    ForwardKL,
    JensenShannon,
    Mass,
    Mixture,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    generalized_jsd,
)
from topk_rkl.objective import (
    REVERSE_KL,
    LinearTopKDivergenceLoss,
    TopKDivergenceLoss,
    WeightGrad,
    linear_topk_divergence,
    topk_divergence,
)
from topk_rkl.reduction import Reduction
from topk_rkl.settings import pack
from topk_rkl.support import Support

__all__ = [
    "AlphaBeta",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "LinearTopKDivergenceLoss",
    "LinearTopKReverseKLLoss",
    "Mass",
    "Mixture",
    "Reduction",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "Support",
    "TopKDivergenceLoss",
    "TopKReverseKLLoss",
    "WeightGrad",
    "generalized_jsd",
    "linear_teacher_topk",
    "linear_topk_divergence",
    "linear_topk_reverse_kl",
    "teacher_topk",
    "topk_divergence",
    "topk_reverse_kl",
    "use_backend",
]


def teacher_topk(
    teacher_logits: Tensor,  # (..., V)
    k: int,
    *,
    normalize: bool = False,
) -> Support:
    """The K largest logits of each position: exactly the first K of a stable sort by (value descending, id ascending).

    Args:
        teacher_logits: (..., V) bfloat16, float16, float32 or float64, of any strides; must not require grad.
        k: 1 <= k <= V.
        normalize: returns true log-probs instead of logits, the logsumexp over V taken in the same pass. The loss
            needs no more than the logits, as a constant a row cancels.

    Returns:
        Support with ids (..., K) int32 and log_probs (..., K) float32 (float64 from float64). Logits of -inf are never
        taken: where fewer than K are above it, the last slots are empty, with id -1 and log_prob -inf. A NaN ranks
        above everything, -0.0 equals +0.0. With `normalize`, a row that holds NaN or +inf has NaN log-probs.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    k = checks.require_teacher_logits("teacher_logits", teacher_logits, k)
    checks.require_flag("normalize", normalize)
    return Support(*ops.select(teacher_logits, k, normalize, requested()))


def topk_reverse_kl(
    student_logits: Tensor,  # (..., V)
    teacher: Tensor | Support,  # (..., V_teacher) logits, or a Support of (..., K)
    *,
    k: int | None = None,
    weights: Tensor | None = None,  # (...)
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    denominator: float | Tensor | None = None,
    overwrite_student_logits: bool = False,
) -> Tensor:  # (...) or ()
    """Reverse KL between student and teacher, both renormalised on the K tokens the teacher ranks highest.

    With S those tokens, and p and q the softmax over S alone of the student's and the teacher's logits / temperature,
    the loss of a position is sum_S p (log p - log q), and its gradient p (log p - log q - loss) / temperature on S and
    exactly 0 elsewhere. It is equations 7 and 8 of "Revisiting On-Policy Distillation" (arXiv 2603.25562).

    Position t of both sides must already speak of the same next token; nothing is shifted.

    Args:
        student_logits: (..., V) bfloat16, float16, float32 or float64, of any strides. A logit of -inf in S has
            probability 0 there, term 0 and gradient 0.
        teacher: (..., V_teacher) logits, of which `k` are selected as by `teacher_topk`; or a `Support`. Must not
            require grad. Slots whose id is outside the student's vocabulary are outside S.
        k: how many tokens to compare, 1 <= k <= V_teacher; only with teacher logits. k = 1 gives exactly 0, and warns.
        weights: (...) bool, integer or float, any sign, times which each position counts; None counts all as 1. A
            position of weight 0 contributes exactly 0 whatever it holds, NaN included.
        temperature: divides both sides' logits. The loss is not multiplied by its square.
        reduction: "none" gives the weighted loss of each position, (...); "sum" their sum; "mean" that sum over
            sum(weights), and 0, still attached to the graph, where sum(weights) is 0.
        denominator: a number or 0-d tensor instead of sum(weights), already global over micro-batches and ranks.
        overwrite_student_logits: writes the gradient into the memory of student_logits during the backward pass,
            instead of new memory of the same size. The logits are lost then, and autograd raises if anything that saved
            them, a second backward pass included, still needs them. They must not be a leaf, whose `.grad` would be
            its own memory. To autograd all views of a tensor are one: of logits[:2] and logits[2:] it lets only one be
            overwritten. Ignored under torch.compile, which plans memory itself.

    Returns:
        float32, or float64 from float64 student logits. A position without a usable slot has loss and gradient 0. A NaN
        or +inf in S, or a NaN anywhere in the teacher's row, makes the loss of that position NaN, and of no other.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, and nothing has been computed.
        RuntimeError: the backend asked for by name cannot take these tensors.
        NotImplementedError: a tensor is under torch.func, vmap or forward mode.
    """
    return topk_divergence(
        student_logits, teacher, k=k, weights=weights, temperature=temperature, reduction=reduction,
        denominator=denominator, overwrite_student_logits=overwrite_student_logits,
    )  # fmt: skip


def linear_teacher_topk(
    teacher_hidden: Tensor,  # (..., H)
    teacher_weight: Tensor,  # (V, H)
    k: int,
    *,
    bias: Tensor | None = None,  # (V,)
    normalize: bool = False,
    chunk_rows: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Support:
    """`teacher_topk` of the logits teacher_hidden @ teacher_weight.T + bias, which never exist all at once.

    The platform's own matrix product fills one buffer of `chunk_rows` positions at a time, which is selected from at
    once: the ids are, to the bit, those that `teacher_topk` gives for the buffer. Such a product may give a position
    other last bits in another batch.

    Args:
        teacher_hidden: (..., H) bfloat16, float16, float32 or float64, the last hidden states; constant.
        teacher_weight: (V, H), the LM head as nn.Linear keeps it, on the same device; constant. Its dtype, and that of
            the bias, may differ, but float64 goes with float64 alone.
        k: 1 <= k <= V.
        bias: (V,).
        normalize: returns true log-probs instead of logits, as `teacher_topk` does, of the logits in the buffer.
        chunk_rows: positions a buffer; None takes as many as 128 MiB hold.
        logit_scale, softcap: see `linear_topk_reverse_kl`.
        logits_dtype: None for logits of the inputs' dtype, as the model itself would make them. torch.float32 for the
            products of the same numbers summed in float32, as `linear_topk_reverse_kl` sums the student's: a 16-bit
            teacher is then at distance 0 from itself but for the order of those sums. It is so too where dtypes differ.

    Returns:
        Support with ids (..., K) int32 and log_probs (..., K) float32 (float64 from float64), which hold logits, or
        log-probs with `normalize`.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    chunk_rows = checks.require_linear_teacher(teacher_hidden, teacher_weight, bias, chunk_rows)
    k = checks.require_k(k, len(teacher_weight), "teacher_hidden @ teacher_weight.T")
    checks.warn_of_single_slot(k)
    checks.require_flag("normalize", normalize)
    checks.require_logits_dtype(logits_dtype, teacher_hidden)
    settings = pack(1.0, REVERSE_KL.code, *checks.require_logit_options(logit_scale, softcap))
    head, full = (teacher_hidden, teacher_weight, bias), logits_dtype is not None
    return Support(*ops.linear_select(*head, k, chunk_rows, settings, normalize, full, requested()))


def linear_topk_reverse_kl(
    student_hidden: Tensor,  # (..., H)
    student_weight: Tensor,  # (V, H)
    teacher: Tensor | Support,  # (..., V_teacher) logits, or a Support of (..., K)
    *,
    student_bias: Tensor | None = None,  # (V,)
    k: int | None = None,
    weights: Tensor | None = None,  # (...)
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    denominator: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    weight_grad: WeightGrad = "dense",
) -> Tensor:  # (...) or ()
    """`topk_reverse_kl` of the logits that the student's head would make of its hidden states, without making them.

    With z = student_hidden @ student_weight.T + student_bias, the student's logits are those of
    `logit_scale` * z, then `softcap` * tanh(. / `softcap`). Only the K rows of the head that the teacher's tokens name
    are read, for each position: nothing of the size N V exists in the forward or in the backward pass.

    Args:
        student_hidden: (..., H) bfloat16, float16, float32 or float64, the last hidden states.
        student_weight: (V, H), the LM head as nn.Linear keeps it, on the same device; whole, not sharded or quantised.
            Frozen, it costs nothing in the backward pass. Its dtype, and that of the bias, may differ from that of the
            hidden states, but float64 goes with float64 alone: neither is rounded to the other's.
        teacher: (..., V_teacher) logits with `k`, or a `Support`, such as of `linear_teacher_topk`. Slots whose id is
            outside the head are outside S.
        student_bias: (V,).
        k, weights, temperature, reduction, denominator: see `topk_reverse_kl`.
        logit_scale: multiplies the logits (Cohere's logit_scale; for Granite 1 / logits_scaling); 0, or between 1e-30
            and 1e30 in size.
        softcap: then softcap * tanh(logits / softcap) (Gemma 2), at least 1e-30; None, or 1e30 and more, for none.
        weight_grad: "dense", (V, H); or "sparse", a row-sparse gradient over the ids that occur, as nn.Embedding with
            sparse=True gives and torch.optim.SparseAdam and SGD take, whose number of rows is read on the host: not
            within a CUDA graph or torch.compile(fullgraph=True). "sparse" needs a student_weight that is a leaf.

    Returns:
        float32, or float64 from float64. Dot products are summed in float32; the gradients of head and bias too, over
        all positions, and in a fixed order: the same bits every run. Each gradient has the dtype of its tensor.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, and nothing has been computed.
        RuntimeError: the backend asked for by name cannot take these tensors.
    """
    return linear_topk_divergence(
        student_hidden, student_weight, teacher, student_bias=student_bias, k=k, weights=weights,
        temperature=temperature, reduction=reduction, denominator=denominator, logit_scale=logit_scale,
        softcap=softcap, weight_grad=weight_grad,
    )  # fmt: skip


class TopKReverseKLLoss(TopKDivergenceLoss):
    """`topk_reverse_kl` as a module: the options in the constructor, the tensors in the call."""

    def __init__(
        self,
        k: int | None = None,
        *,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        overwrite_student_logits: bool = False,
    ) -> None:
        super().__init__(
            k, divergence=REVERSE_KL, temperature=temperature, reduction=reduction,
            overwrite_student_logits=overwrite_student_logits,
        )  # fmt: skip


class LinearTopKReverseKLLoss(LinearTopKDivergenceLoss):
    """`linear_topk_reverse_kl` as a module: the options in the constructor, the tensors in the call."""

    def __init__(
        self,
        k: int | None = None,
        *,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        logit_scale: float = 1.0,
        softcap: float | None = None,
        weight_grad: WeightGrad = "dense",
    ) -> None:
        super().__init__(
            k, divergence=REVERSE_KL, temperature=temperature, reduction=reduction, logit_scale=logit_scale,
            softcap=softcap, weight_grad=weight_grad,
        )  # fmt: skip

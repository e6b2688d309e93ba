"""The general entries: any divergence, over S alone or with the mass outside it, from logits or from hidden states."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from topk_rkl import checks, ops
from topk_rkl.autograd import HeadOptions, LinearLoss, LinearMassLoss, MassLoss, Options, SelectLoss, SupportLoss
from topk_rkl.backends import requested
from topk_rkl.divergence import Code, Divergence, Mass, ReverseKL, Terms, require_objective
from topk_rkl.mass import classes
from topk_rkl.overwrite import require_overwritable
from topk_rkl.reduction import Reduction, as_factors, reduce, require_reduction
from topk_rkl.settings import pack
from topk_rkl.support import Support, require_teacher

WeightGrad = Literal["dense", "sparse"]

REVERSE_KL = ReverseKL()


def topk_divergence(
    student_logits: Tensor,  # (..., V)
    teacher: Tensor | Support,  # (..., V_teacher) logits, or a Support of (..., K)
    *,
    divergence: Divergence | Terms = REVERSE_KL,
    mass: Mass = "renormalized",
    k: int | None = None,
    weights: Tensor | None = None,  # (...)
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    denominator: float | Tensor | None = None,
    overwrite_student_logits: bool = False,
    sampled_ids: Tensor | None = None,  # (...)
) -> Tensor:  # (...) or ()
    """`topk_reverse_kl` with any divergence, and with what both sides leave outside S.

    With p and q the probabilities of student and teacher over the whole vocabulary, P and Q their sums over S:

    | mass               | compared                                                                 | gradient |
    |--------------------|--------------------------------------------------------------------------|----------|
    | "renormalized"     | p / P and q / Q on S: the default; blind to P and Q                      | on S     |
    | "tail"             | p and q on S and, as one more class, 1 - P and 1 - Q                     | dense    |
    | "raw"              | p and q on S, and nothing else                                           | dense    |
    | "raw_stop_grad"    | the same, with the gradient of sum_S [p log(p / q) - p + q]              | dense    |
    | "ema_pg"           | "raw", and the sampled token where S lacks it (arXiv 2602.04417)         | dense    |
    | "ema_pg_corrected" | that, with an unbiased gradient: on average the one of the full KL       | dense    |

    "raw" is unstable: its reverse KL can be made small, below 0 even, by moving mass out of S, through the "+1" in its
    derivative log(p / q) + 1. Training collapses in arXiv 2603.25562 (section 5) and 2605.11182, and verl warns of it.
    "raw_stop_grad" leaves the 1 out: it is sum_S p log(p / q) with the logarithm held constant.
    The gradient of "ema_pg" as published is, on average over sampled tokens, that of the full KL plus that of P (minus,
    for forward KL). The corrected one has the head of "raw_stop_grad" (for forward KL, a tail without its "+ log r").

    Args:
        student_logits, teacher, k, weights, temperature, reduction, denominator, overwrite_student_logits: see
            `topk_reverse_kl`. With a mass other than "renormalized" a Support must hold true log-probs, such as of
            teacher_topk(..., normalize=True), at temperature 1, since K of them do not tell the normaliser at another;
            1 - Q is then taken as at least half the epsilon of their dtype. Of an id given twice the first slot counts.
            A position where they add up to more than 1 (by 1/16 in the logarithm) holds logits, and is NaN.
        divergence: `ReverseKL`, `ForwardKL`, `JensenShannon`, `Mixture`, `SkewReverseKL`, `SkewForwardKL`, `AlphaBeta`,
            each with every mass of "renormalized" and "tail"; the raw ones are for ReverseKL without clamp, ForwardKL
            and Mixture, the last two for ReverseKL and ForwardKL. Or a function of log p and log q, (..., K) float64
            each, that gives a term a slot: plain PyTorch, differentiated by autograd over the slots, on the
            "reference" backend. It is summed over the slots of S where p is not 0, and may see any finite number at
            the others. Such a function breaks the graph of torch.compile. It must depend on log p, and on nothing
            else that requires grad. With mass="tail" it sees K + 1 slots: the last is the rest of the vocabulary.
        mass: as above. Others than "renormalized" read the student's logits once more forwards and once backwards.
        sampled_ids: (...) int32 or int64, the tokens that the student sampled: for the two "ema_pg" alone, which need
            teacher logits too.

    Returns:
        As `topk_reverse_kl`. In divergences that hold forward KL a
        student logit of -inf in S makes the loss +inf, or leaves it finite where the teacher is compared with a blend
        of both; the gradient is 0 there and finite at the others. With a mass other than "renormalized" a NaN anywhere
        in the student's row makes that position NaN.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, and nothing has been computed.
        RuntimeError: the backend asked for by name cannot take these tensors, or has no such divergence or mass.
    """
    checks.require_logits("student_logits", student_logits)
    checks.require_plain(student_logits=student_logits, teacher=teacher, weights=weights)
    checks.require_weights(weights, student_logits)
    checks.require_temperature(temperature)
    require_reduction(reduction, denominator, student_logits)
    require_objective(divergence, mass)
    checks.require_flag("overwrite_student_logits", overwrite_student_logits)
    checks.require_sampled_for_mass(sampled_ids, mass, student_logits, "student_logits")
    weights = as_factors(weights, student_logits)
    overwrite_student_logits = overwrite_student_logits and not torch.compiler.is_compiling()
    if overwrite_student_logits:
        require_overwritable(student_logits)
    k = require_teacher(teacher, k, mass, temperature, student_logits, "student_logits")
    temperature = float(temperature)
    settings = pack(temperature, _code(divergence))
    options = Options(_terms(divergence), mass, overwrite_student_logits, requested())
    if mass != "renormalized":
        compared = classes(teacher, k, student_logits.shape[-1], temperature, sampled_ids, requested())
        per_token = MassLoss.apply(student_logits, *compared, weights, settings, options)
    elif isinstance(teacher, Support):
        per_token, _ = SupportLoss.apply(student_logits, *teacher, weights, settings, options)
    else:
        per_token, _ = SelectLoss.apply(student_logits, teacher, k, weights, settings, options)
    return reduce(per_token, weights, reduction, denominator)


def linear_topk_divergence(
    student_hidden: Tensor,  # (..., H)
    student_weight: Tensor,  # (V, H)
    teacher: Tensor | Support,  # (..., V_teacher) logits, or a Support of (..., K)
    *,
    divergence: Divergence | Terms = REVERSE_KL,
    mass: Mass = "renormalized",
    student_bias: Tensor | None = None,  # (V,)
    k: int | None = None,
    weights: Tensor | None = None,  # (...)
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    denominator: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    weight_grad: WeightGrad = "dense",
    sampled_ids: Tensor | None = None,  # (...)
) -> Tensor:  # (...) or ()
    """`linear_topk_reverse_kl` with any divergence, and with what both sides leave outside S.

    Args:
        divergence, mass, sampled_ids: see `topk_divergence`. With a mass other than "renormalized" all
            logits count: they are made a block of positions by a block of the vocabulary at a time, forwards and again
            backwards, in float32 (float64) and plain PyTorch on any device. Nothing of size N V exists; the head's
            gradient is dense. Those products have as many bits as torch.backends.fp32_precision and its like allow, and
            a position may get other last bits in another batch.
        others: see `linear_topk_reverse_kl`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, and nothing has been computed.
        RuntimeError: the backend asked for by name cannot take these tensors, or has no such divergence or mass.
    """
    checks.require_head(
        "student_hidden", student_hidden, "student_weight", student_weight, "student_bias", student_bias
    )
    checks.require_plain(
        student_hidden=student_hidden, student_weight=student_weight, student_bias=student_bias, teacher=teacher,
        weights=weights,
    )  # fmt: skip
    checks.require_weights(weights, student_hidden, "student_hidden")
    checks.require_temperature(temperature)
    require_reduction(reduction, denominator, student_hidden)
    logit_scale, softcap = checks.require_logit_options(logit_scale, softcap)
    checks.require_weight_grad(weight_grad, mass, student_weight)
    require_objective(divergence, mass)
    checks.require_sampled_for_mass(sampled_ids, mass, student_hidden, "student_hidden")
    k = require_teacher(teacher, k, mass, temperature, student_hidden, "student_hidden")
    weights = as_factors(weights, student_hidden)
    temperature = float(temperature)
    settings = pack(temperature, _code(divergence), logit_scale, softcap)
    options = HeadOptions(_terms(divergence), mass, weight_grad, requested())
    if mass == "renormalized":
        per_token, *_ = LinearLoss.apply(
            student_hidden, student_weight, student_bias, *_support(teacher, k), weights, settings, options
        )
    else:
        compared = classes(teacher, k, len(student_weight), temperature, sampled_ids, requested())
        per_token = LinearMassLoss.apply(
            student_hidden, student_weight, student_bias, *compared, weights, settings, options
        )
    return reduce(per_token, weights, reduction, denominator)


def _support(teacher: Tensor | Support, k: int | None) -> Support:
    if isinstance(teacher, Support):
        return teacher
    assert k is not None
    return Support(*ops.select(teacher, k, False, requested()))


def _code(divergence: Divergence | Terms) -> Code:
    """The numbers that cross the border of an op; a function, which crosses beside them, has none of its own."""
    return divergence.code if isinstance(divergence, Divergence) else REVERSE_KL.code


def _terms(divergence: Divergence | Terms) -> Terms | None:
    return None if isinstance(divergence, Divergence) else divergence


class TopKDivergenceLoss(nn.Module):
    """`topk_divergence` as a module: the options in the constructor, the tensors in the call."""

    def __init__(
        self,
        k: int | None = None,
        *,
        divergence: Divergence | Terms | None = None,  # ReverseKL()
        mass: Mass = "renormalized",
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        overwrite_student_logits: bool = False,
    ) -> None:
        super().__init__()
        divergence = REVERSE_KL if divergence is None else divergence
        require_objective(divergence, mass)
        checks.require_temperature(temperature)
        require_reduction(reduction, None)
        checks.require_flag("overwrite_student_logits", overwrite_student_logits)
        k = checks.require_count("k", k)
        self.options: dict[str, Any] = {
            "divergence": divergence, "mass": mass, "k": k, "temperature": temperature, "reduction": reduction,
            "overwrite_student_logits": overwrite_student_logits,
        }  # fmt: skip

    def forward(
        self,
        student_logits: Tensor,  # (..., V)
        teacher: Tensor | Support,
        weights: Tensor | None = None,  # (...)
        denominator: float | Tensor | None = None,
        sampled_ids: Tensor | None = None,  # (...)
    ) -> Tensor:
        """See `topk_divergence`."""
        return topk_divergence(
            student_logits, teacher, weights=weights, denominator=denominator, sampled_ids=sampled_ids, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearTopKDivergenceLoss(nn.Module):
    """`linear_topk_divergence` as a module: the options in the constructor, the tensors in the call."""

    def __init__(
        self,
        k: int | None = None,
        *,
        divergence: Divergence | Terms | None = None,  # ReverseKL()
        mass: Mass = "renormalized",
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        logit_scale: float = 1.0,
        softcap: float | None = None,
        weight_grad: WeightGrad = "dense",
    ) -> None:
        super().__init__()
        divergence = REVERSE_KL if divergence is None else divergence
        require_objective(divergence, mass)
        checks.require_temperature(temperature)
        require_reduction(reduction, None)
        checks.require_logit_options(logit_scale, softcap)
        checks.require_weight_grad(weight_grad, mass)
        k = checks.require_count("k", k)
        self.options: dict[str, Any] = {
            "divergence": divergence, "mass": mass, "k": k, "temperature": temperature, "reduction": reduction,
            "logit_scale": logit_scale, "softcap": softcap, "weight_grad": weight_grad,
        }  # fmt: skip

    def forward(
        self,
        student_hidden: Tensor,  # (..., H)
        student_weight: Tensor,  # (V, H)
        teacher: Tensor | Support,
        weights: Tensor | None = None,  # (...)
        denominator: float | Tensor | None = None,
        student_bias: Tensor | None = None,  # (V,)
        sampled_ids: Tensor | None = None,  # (...)
    ) -> Tensor:
        """See `linear_topk_divergence`."""
        return linear_topk_divergence(
            student_hidden, student_weight, teacher, weights=weights, denominator=denominator,
            student_bias=student_bias, sampled_ids=sampled_ids, **self.options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

"""What a trainer imports: truncated, renormalised reverse KL on the teacher's top-K tokens.

from topk_rkl.loss import topk_reverse_kl

loss = topk_reverse_kl(student_logits, teacher_logits, k=32, weights=response_mask)
loss.backward()

The entries from logits are here, those from hidden states in `topk_rkl.linear_loss`.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from topk_rkl import checks, ops
from topk_rkl.autograd import MassLoss, Options, SelectLoss, SupportLoss
from topk_rkl.backends import requested, use_backend
from topk_rkl.causal import as_weighted
from topk_rkl.divergence import (
    REVERSE_KL,
    AlphaBeta,
    Divergence,
    ForwardKL,
    JensenShannon,
    Mass,
    Mixture,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    Terms,
    generalized_jsd,
)
from topk_rkl.linear_loss import (
    LinearTopKDivergenceLoss,
    LinearTopKReverseKLLoss,
    WeightGrad,
    linear_causal_topk_reverse_kl,
    linear_teacher_topk,
    linear_topk_divergence,
    linear_topk_reverse_kl,
)
from topk_rkl.mass import classes
from topk_rkl.objective import pack, require_objective
from topk_rkl.overwrite import require_overwritable
from topk_rkl.parallel.agreement import refused_together, require_backend, shards_of
from topk_rkl.parallel.collectives import Group, require_group
from topk_rkl.parallel.counts import global_count
from topk_rkl.parallel.heads import is_dtensor, unwrap_logits, unwrap_teacher
from topk_rkl.parallel.logits import select
from topk_rkl.parallel.losses import logits_loss as loss_on_slots
from topk_rkl.reduction import Reduction, as_factors, reduce, require_reduction
from topk_rkl.support import Support, require_teacher
from topk_rkl.temperature import of_teacher, require_temperatures, temperatures

__all__ = [
    "AlphaBeta",
    "Divergence",
    "ForwardKL",
    "Group",
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
    "causal_topk_reverse_kl",
    "generalized_jsd",
    "global_count",
    "linear_causal_topk_reverse_kl",
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
    group: Group | None = None,
) -> Support:
    """The K largest logits of each position: exactly the first K of a stable sort by (value descending, id ascending).

    Args:
        teacher_logits: (..., V) bfloat16, float16, float32 or float64, of any strides; must not require grad.
        k: 1 <= k <= V.
        normalize: returns true log-probs instead of logits, the logsumexp over V taken in the same pass. The loss
            needs no more than the logits, as a constant per row cancels.
        group: the ranks that share the vocabulary; see `topk_reverse_kl`. k is then at most V over all ranks.

    Returns:
        Support with ids (..., K) int32 and log_probs (..., K) float32 (float64 from float64). Logits of -inf are never
        taken: where fewer than K are above it, the last slots are empty, with id -1 and log_prob -inf. A NaN ranks
        above everything, -0.0 equals +0.0. With `normalize`, a row that holds NaN or +inf has NaN log-probs.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the backend asked for by name cannot take these tensors, or another rank refused its arguments.
    """
    teacher_logits, group = unwrap_logits("teacher_logits", teacher_logits, require_group(group))
    with refused_together(group, teacher_logits):
        k = checks.require_teacher_logits("teacher_logits", teacher_logits, k, sharded=group is not None)
        checks.require_flag("normalize", normalize)
        require_backend(group, k, "renormalized", teacher_logits)
    shards = shards_of(group, (teacher_logits,), 0, teacher_logits.shape[-1], k, {"normalize": normalize})
    return Support(*select(teacher_logits, k, normalize, requested(), shards), normalized=normalize)


def topk_reverse_kl(
    student_logits: Tensor,  # (..., V)
    teacher: Tensor | Support,  # (..., V_teacher) logits, or a Support of (..., K)
    *,
    k: int | None = None,
    weights: Tensor | None = None,  # (...)
    temperature: float | Tensor = 1.0,  # a tensor broadcasts to (...)
    teacher_temperature: float | Tensor | None = None,
    reduction: Reduction = "mean",
    denominator: float | Tensor | None = None,
    overwrite_student_logits: bool = False,
    group: Group | None = None,
) -> Tensor:  # (...) or ()
    """Reverse KL between student and teacher, both renormalised on the K tokens the teacher ranks highest.

    S is the set of those tokens; p and q are the softmax over S alone of the student's and the teacher's logits /
    temperature. The loss of a position is sum_S p (log p - log q). Its gradient is p (log p - log q - loss) /
    temperature on S and exactly 0 elsewhere: equations 7 and 8 of "Revisiting On-Policy Distillation" (arXiv
    2603.25562).

    Position t of both sides must already speak of the same next token; nothing is shifted.

    Args:
        student_logits: (..., V) bfloat16, float16, float32 or float64, of any strides. A logit of -inf in S has
            probability 0 there, term 0 and gradient 0.
        teacher: (..., V_teacher) logits, of which `k` are selected as by `teacher_topk`; or a `Support`. Must not
            require grad. Slots whose id is outside the student's vocabulary are outside S.
        k: how many tokens to compare, 1 <= k <= V_teacher; only with teacher logits. k = 1 gives exactly 0, and warns.
        weights: (...) bool or float, any sign: the factor of each position; None is 1 for all. A position of
            weight 0 contributes exactly 0 whatever it holds, NaN included.
        temperature: divides both sides' logits: a number, or a float tensor of one per position, such as (B, 1) of one
            per sequence. The loss is not multiplied by its square. A position where a tensor is not positive is NaN.
        teacher_temperature: divides the teacher's logits instead. None is `temperature`; 1.0 is right where a server or
            a trainer has divided them already, which would divide twice.
        reduction: "none" gives the weighted loss of each position, (...); "sum" their sum; "mean" that sum over
            sum(weights), and 0, still attached to the graph, where sum(weights) is 0.
        denominator: a number or 0-d tensor instead of sum(weights), already global over micro-batches and ranks.
        overwrite_student_logits: writes the gradient into the memory of student_logits during the backward pass,
            instead of new memory of the same size. The logits are lost then. Autograd raises if anything that saved
            them, a second backward pass included, still needs them. A leaf is refused: its `.grad` would be its own
            memory. Autograd takes all views of a tensor for one: of logits[:2] and logits[2:] only one can be
            overwritten. The option is ignored under torch.compile, which plans memory itself.
        group: the ranks that share the vocabulary, as a ProcessGroup or a DeviceMesh of one dimension. Logits are then
            this rank's shard, (..., V_local): shards follow one another in the order of the ranks, may differ in
            length, and may be empty. Ids are those of the whole vocabulary. All other arguments are the same on every
            rank, and so is the result. Whole logits on every rank need no group, and would be taken for shards. None:
            the vocabulary is whole, or DTensors with Shard(-1) tell who shares it.

    Returns:
        float32, or float64 from float64 student logits. A position without a usable slot has loss and gradient 0. A NaN
        or +inf in S, or a NaN anywhere in the teacher's row, makes the loss of that position NaN, and of no other.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, and nothing has been computed.
        RuntimeError: the backend asked for by name cannot take these tensors, or another rank refused its arguments.
        NotImplementedError: a tensor is under torch.func, vmap or forward mode.
    """
    return topk_divergence(
        student_logits, teacher, k=k, weights=weights, temperature=temperature,
        teacher_temperature=teacher_temperature, reduction=reduction, denominator=denominator,
        overwrite_student_logits=overwrite_student_logits, group=group,
    )  # fmt: skip


def topk_divergence(
    student_logits: Tensor,  # (..., V)
    teacher: Tensor | Support,  # (..., V_teacher) logits, or a Support of (..., K)
    *,
    divergence: Divergence | Terms = REVERSE_KL,
    mass: Mass = "renormalized",
    k: int | None = None,
    weights: Tensor | None = None,  # (...)
    temperature: float | Tensor = 1.0,  # a tensor broadcasts to (...)
    teacher_temperature: float | Tensor | None = None,
    reduction: Reduction = "mean",
    denominator: float | Tensor | None = None,
    overwrite_student_logits: bool = False,
    sampled_ids: Tensor | None = None,  # (...)
    group: Group | None = None,
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

    "raw" is unstable. Moving mass out of S makes its reverse KL small, below 0 even, through the "+ 1" in its
    derivative log(p / q) + 1. Training collapses in arXiv 2603.25562 (section 5) and 2605.11182, and verl warns of it.
    "raw_stop_grad" leaves the 1 out: it is sum_S p log(p / q) with the logarithm held constant.
    The gradient of "ema_pg" as published averages, over sampled tokens, to that of the full KL plus that of P (minus,
    for forward KL). The corrected one has the gradient of "raw_stop_grad" on S. With r = q / p, the sampled token of
    forward KL has the gradient of r there, where the published one has that of r - log r.

    Args:
        student_logits, teacher, k, weights, temperature, teacher_temperature, reduction, denominator,
            overwrite_student_logits, group: see `topk_reverse_kl`. Temperatures are numbers where mass is not
            "renormalized". A Support must then hold true log-probs, such as of teacher_topk(..., normalize=True), with
            the teacher's temperature 1: K of them do not tell the normaliser at another. 1 - Q is then at least half
            the epsilon of their dtype. The first slot counts of an id given twice. Logits are refused by the field
            `normalized`; a position whose probabilities add up to more than 1 (by 1/16 in the logarithm) is NaN.
        divergence: `ReverseKL`, `ForwardKL`, `JensenShannon`, `Mixture`, `SkewReverseKL`, `SkewForwardKL`, `AlphaBeta`,
            each with mass="renormalized" and "tail". The raw masses are for ReverseKL without clamp, ForwardKL and
            Mixture, the last two masses for ReverseKL and ForwardKL. Or a function of log p and log q, (..., K) float64
            each, that gives a term per slot. Autograd differentiates it over the slots, on the "reference" backend. Its
            terms are summed over the slots of S where p is not 0. It may see any finite number at the others. It must
            depend on log p, and on nothing else that requires grad. It breaks the graph of torch.compile. It sees K + 1
            slots with mass="tail": the last is the rest of the vocabulary.
        mass: as above. "renormalized" does not see the student's probability outside S, which can grow in long training
            where the student is smaller than the teacher: docs/paper.md has figures and a check. The others read the
            student's logits once more forwards and once backwards.
        sampled_ids: (...) int32 or int64, the tokens that the student sampled: for the two "ema_pg" alone. They need
            teacher logits too.

    Returns:
        As `topk_reverse_kl`. A student logit of -inf in S makes a divergence that holds forward KL +inf, or leaves it
        finite where the teacher is compared with a blend of both. The gradient is 0 there and finite at the others. A
        NaN anywhere in the student's row makes that position NaN where mass is not "renormalized".

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, and nothing has been computed.
        RuntimeError: the backend asked for by name cannot take these tensors, or has no such divergence or mass.
    """
    asked = require_group(group)
    if overwrite_student_logits is True and is_dtensor(student_logits):
        raise ValueError("overwrite_student_logits=True, but student_logits is a DTensor; leave the option off")
    student_logits, group = unwrap_logits("student_logits", student_logits, asked)
    teacher, sharded = unwrap_teacher(teacher, "student_logits", asked, group), group is not None
    with refused_together(group, student_logits):
        checks.require_logits("student_logits", student_logits, sharded)
        checks.require_plain(student_logits=student_logits, teacher=teacher, weights=weights)
        checks.require_weights(weights, student_logits)
        require_reduction(reduction, denominator, student_logits)
        require_objective(divergence, mass)
        require_temperatures(temperature, teacher_temperature, mass, student_logits)
        checks.require_flag("overwrite_student_logits", overwrite_student_logits)
        checks.require_sampled_for_mass(sampled_ids, mass, student_logits, "student_logits")
        overwrite_student_logits = overwrite_student_logits and not torch.compiler.is_compiling()
        if overwrite_student_logits:
            require_overwritable(student_logits)
        own = of_teacher(temperature, teacher_temperature)
        k = require_teacher(teacher, k, mass, own, student_logits, "student_logits", sharded)
        require_backend(group, k, mass, student_logits, teacher)
    vocabs = student_logits.shape[-1], teacher.shape[-1] if isinstance(teacher, Tensor) else None
    asked_for: dict[str, object] = {
        "divergence": divergence, "mass": mass, "temperature": temperature,
        "teacher_temperature": teacher_temperature,
    }  # fmt: skip
    shards = shards_of(group, (student_logits, teacher), *vocabs, k, asked_for)
    weights, backend = as_factors(weights, student_logits), requested()
    at = temperatures(temperature, teacher_temperature, student_logits)
    objective = pack(at.loss, divergence, mass)
    options = Options(backend, None if isinstance(divergence, Divergence) else divergence, overwrite_student_logits)
    if shards is not None or at.student is not None:
        per_token = loss_on_slots(
            student_logits, teacher, k, mass, at, sampled_ids, weights, objective, options, shards
        )
    elif mass != "renormalized":
        compared = classes(teacher, k, student_logits.shape[-1], at, sampled_ids, backend)
        per_token = MassLoss.apply(student_logits, *compared, weights, objective, options)
    elif isinstance(teacher, Support) or at.teacher is not None:
        ids, log_probs = teacher.tensors if isinstance(teacher, Support) else ops.select(teacher, k, False, backend)
        ids, log_probs = at.divided_teacher(ids, log_probs, student_logits.shape[-1])
        per_token, _ = SupportLoss.apply(student_logits, ids, log_probs, weights, objective, options)
    else:
        per_token, _ = SelectLoss.apply(student_logits, teacher, k, weights, objective, options)
    return reduce(per_token, weights, reduction, denominator)


def causal_topk_reverse_kl(
    student_logits: Tensor,  # (B, T, V)
    teacher: Tensor | Support,  # (B, T, V_teacher) logits, or a Support of (B, T, K) or (B, T - 1, K)
    labels: Tensor,  # (B, T)
    *,
    num_items_in_batch: float | Tensor | None = None,
    world_size: int = 1,
    ignore_index: int = -100,
    weights: Tensor | None = None,  # (B, T)
    **options: Any,
) -> Tensor:  # () or (B, T)
    """`topk_reverse_kl` with labels for weights: shifted, masked and divided as causal language models do.

    Position t counts where labels[:, t + 1] is no `ignore_index`, since it predicts that token. The last position
    predicts nothing and never counts. Nothing is sliced, so no copy of the logits is made.

    Args:
        student_logits: (B, T, V), those that the model gives for the input ids, neither shifted nor cut.
        teacher: of the same positions: (B, T, V_teacher) logits with `k`, or a `Support` of (B, T, K). A Support of
            (B, T - 1, K) lacks the last position, which predicts nothing.
        labels: (B, T) int64 or int32 as transformers collates them, not shifted. In packed rows the first token of each
            sequence is an `ignore_index`, since no position of its sequence predicts it.
        num_items_in_batch: how many labels count over all micro-batches and ranks of the step, a number or 0-d tensor,
            as the Trainer of transformers passes it. None divides by those of this call.
        world_size: how many ranks num_items_in_batch counts whose gradients DDP or FSDP average: multiplies the loss.
            The Trainer multiplies by itself, so 1 is right there.
        ignore_index: the label that does not count.
        weights: (B, T) bool or float, a factor per label, such as of `special_token_mask`. Their sum divides where
            num_items_in_batch is None.
        **options: those of `topk_divergence`: k, divergence, mass, temperature, reduction and so on.

    Returns:
        () float32, or float64 from float64 logits. With reduction="none" (B, T): that of labels[:, t + 1] at t.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, and nothing has been computed.
    """
    labelled = labels, num_items_in_batch, world_size, ignore_index, weights, options
    _, group = unwrap_logits("student_logits", student_logits, require_group(options.get("group")))
    with refused_together(group, student_logits):
        asked = as_weighted(student_logits, "student_logits", teacher, *labelled)
    return topk_divergence(student_logits, **asked)


class TopKDivergenceLoss(nn.Module):
    """`topk_divergence` as a module: the options in the constructor, the tensors in the call."""

    def __init__(
        self,
        k: int | None = None,
        *,
        divergence: Divergence | Terms | None = None,  # ReverseKL()
        mass: Mass = "renormalized",
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        reduction: Reduction = "mean",
        overwrite_student_logits: bool = False,
        group: Group | None = None,
    ) -> None:
        super().__init__()
        divergence = REVERSE_KL if divergence is None else divergence
        require_objective(divergence, mass)
        checks.require_temperature(temperature)
        if teacher_temperature is not None:
            checks.require_temperature(teacher_temperature, "teacher_temperature")
        require_reduction(reduction, None)
        checks.require_flag("overwrite_student_logits", overwrite_student_logits)
        k = checks.require_count("k", k)
        require_group(group)  # and kept as it is, since a mesh can be copied and saved, and a ProcessGroup cannot
        self.options: dict[str, Any] = {
            "divergence": divergence, "mass": mass, "k": k, "temperature": temperature,
            "teacher_temperature": teacher_temperature, "reduction": reduction,
            "overwrite_student_logits": overwrite_student_logits, "group": group,
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

    if TYPE_CHECKING:
        __call__ = forward  # which nn.Module types as Any

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class TopKReverseKLLoss(TopKDivergenceLoss):
    """`topk_reverse_kl` as a module: the options in the constructor, the tensors in the call."""

    def __init__(
        self,
        k: int | None = None,
        *,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        reduction: Reduction = "mean",
        overwrite_student_logits: bool = False,
        group: Group | None = None,
    ) -> None:
        super().__init__(
            k, divergence=REVERSE_KL, temperature=temperature, teacher_temperature=teacher_temperature,
            reduction=reduction, overwrite_student_logits=overwrite_student_logits, group=group,
        )  # fmt: skip

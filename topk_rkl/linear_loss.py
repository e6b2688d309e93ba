"""The losses from hidden states: the student's logits, and the teacher's, never exist all at once."""

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from topk_rkl import checks, ops
from topk_rkl.autograd import LinearLoss, LinearMassLoss, Options
from topk_rkl.backends import requested
from topk_rkl.causal import as_weighted
from topk_rkl.divergence import REVERSE_KL, Divergence, Mass, Terms
from topk_rkl.mass import classes
from topk_rkl.objective import pack, require_objective
from topk_rkl.parallel.agreement import refused_together, require_backend, shards_of
from topk_rkl.parallel.collectives import Group, require_group
from topk_rkl.parallel.heads import TEACHER, is_dtensor, unwrap_head, unwrap_teacher, whole_head
from topk_rkl.parallel.logits import linear_select
from topk_rkl.parallel.losses import linear_loss as loss_on_slots
from topk_rkl.reduction import Reduction, as_factors, reduce, require_reduction
from topk_rkl.support import Support, require_teacher
from topk_rkl.temperature import of_teacher, require_temperatures, temperatures

WeightGrad = Literal["dense", "sparse"]


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
    group: Group | None = None,
) -> Support:
    """`teacher_topk` of the logits teacher_hidden @ teacher_weight.T + bias, which never exist all at once.

    The platform's own matrix product fills one buffer with the logits of `chunk_rows` positions at a time. The ids are,
    to the bit, those that `teacher_topk` gives for the buffer. The last bits of a logit may depend on the batch, as in
    any such product.

    Args:
        teacher_hidden: (..., H) bfloat16, float16, float32 or float64, the last hidden states; constant.
        teacher_weight: (V, H), the LM head as nn.Linear keeps it, on the same device; constant. Its dtype, and that of
            the bias, may differ, but float64 goes with float64 alone.
        k: 1 <= k <= V.
        bias: (V,).
        normalize: returns true log-probs instead of logits, as `teacher_topk` does.
        chunk_rows: positions per buffer; None takes as many as 128 MiB hold.
        logit_scale, softcap: see `linear_topk_reverse_kl`.
        logits_dtype: None for logits of the inputs' dtype, as the model itself would make them. torch.float32 for
            products summed in float32, as `linear_topk_reverse_kl` sums the student's. A 16-bit teacher is then at
            distance 0 from itself but for the order of those sums. Inputs of different dtypes always give float32.
        group: the ranks that share the vocabulary; see `linear_topk_reverse_kl`. k is then at most V over all ranks.

    Returns:
        Support with ids (..., K) int32 and log_probs (..., K) float32 (float64 from float64). They hold logits, or
        log-probs with `normalize`.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the backend asked for by name cannot take these tensors, or another rank refused its arguments.
    """
    head = teacher_hidden, teacher_weight, bias
    teacher_hidden, teacher_weight, bias, group = unwrap_head(*head, require_group(group), TEACHER)
    sharded = group is not None
    with refused_together(group, teacher_hidden):
        chunk_rows = checks.require_linear_teacher(teacher_hidden, teacher_weight, bias, chunk_rows, sharded)
        vocab = checks.LARGEST if sharded else len(teacher_weight)
        k = checks.require_k(k, vocab, "teacher_hidden @ teacher_weight.T")
        checks.warn_of_single_slot(k)
        checks.require_flag("normalize", normalize)
        _require_logits_dtype(logits_dtype, teacher_hidden)
        logit_scale, softcap = checks.require_logit_options(logit_scale, softcap)
        require_backend(group, k, "renormalized", teacher_hidden)
    teacher_weight, bias, _ = whole_head(teacher_weight, bias)
    given, objective = (teacher_hidden, teacher_weight, bias), pack(logit_scale=logit_scale, softcap=softcap)
    asked_for: dict[str, object] = {"normalize": normalize, "logits_dtype": logits_dtype}
    shards = shards_of(group, given, 0, len(teacher_weight), k, asked_for)
    full = logits_dtype is not None
    found = linear_select(*given, k, chunk_rows, objective, normalize, full, requested(), shards)
    return Support(*found, normalized=normalize)


def linear_topk_reverse_kl(
    student_hidden: Tensor,  # (..., H)
    student_weight: Tensor,  # (V, H)
    teacher: Tensor | Support,  # (..., V_teacher) logits, or a Support of (..., K)
    *,
    student_bias: Tensor | None = None,  # (V,)
    k: int | None = None,
    weights: Tensor | None = None,  # (...)
    temperature: float | Tensor = 1.0,  # a tensor broadcasts to (...)
    teacher_temperature: float | Tensor | None = None,
    reduction: Reduction = "mean",
    denominator: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    weight_grad: WeightGrad = "dense",
    group: Group | None = None,
) -> Tensor:  # (...) or ()
    """`topk_reverse_kl` of the logits that the student's head would make of its hidden states, without making them.

    The student's logits are softcap * tanh(logit_scale * z / softcap) with z = student_hidden @ student_weight.T +
    student_bias. Each position reads only the K rows of the head that the teacher's tokens name. Nothing of size N V
    exists in the forward or in the backward pass.

    Args:
        student_hidden: (..., H) bfloat16, float16, float32 or float64, the last hidden states.
        student_weight: (V, H), the LM head as nn.Linear keeps it, on the same device; not quantised. A frozen head
            costs nothing in the backward pass. Its dtype, and that of the bias, may differ from that of the hidden
            states: neither is rounded to the other's. float64 goes with float64 alone. A DTensor beside plain hidden
            states, as FSDP2 keeps a head, is gathered, and its gradient is averaged over the ranks. A DTensor with
            Shard(0) beside hidden states that are a DTensor on every rank is taken for shards of the vocabulary.
        teacher: (..., V_teacher) logits with `k`, or a `Support`, such as of `linear_teacher_topk`. Slots whose id is
            outside the head are outside S.
        student_bias: (V,).
        k, weights, temperature, teacher_temperature, reduction, denominator: see `topk_reverse_kl`.
        logit_scale: multiplies the logits (Cohere's logit_scale; for Granite 1 / logits_scaling); 0, or between 1e-30
            and 1e30 in size.
        softcap: bounds the scaled logits (Gemma 2), at least 1e-30; None, or 1e30 and more, for no bound.
        weight_grad: "dense", (V, H); or "sparse", a row-sparse gradient over the ids that occur, as nn.Embedding with
            sparse=True gives and torch.optim.SparseAdam and SGD take. "sparse" needs a student_weight that is a leaf.
            Its number of rows is read on the host: not within a CUDA graph or torch.compile(fullgraph=True).
        group: the ranks that share the vocabulary; see `topk_reverse_kl`. Weight, bias and teacher logits are then this
            rank's shard, (V_local, H), (V_local,) and (..., V_local). The hidden states are the same on every rank. So
            is their gradient, which is summed over the ranks: pass them as they are before a column-parallel head.

    Returns:
        float32, or float64 from float64. Dot products are summed in float32. So are the gradients of head and bias, in
        a fixed order: the same bits every run. Each gradient has the dtype of its tensor.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, and nothing has been computed.
        RuntimeError: the backend asked for by name cannot take these tensors, or another rank refused its arguments.
    """
    return linear_topk_divergence(
        student_hidden, student_weight, teacher, student_bias=student_bias, k=k, weights=weights,
        temperature=temperature, teacher_temperature=teacher_temperature, reduction=reduction, denominator=denominator,
        logit_scale=logit_scale, softcap=softcap, weight_grad=weight_grad, group=group,
    )  # fmt: skip


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
    temperature: float | Tensor = 1.0,  # a tensor broadcasts to (...)
    teacher_temperature: float | Tensor | None = None,
    reduction: Reduction = "mean",
    denominator: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    weight_grad: WeightGrad = "dense",
    sampled_ids: Tensor | None = None,  # (...)
    group: Group | None = None,
) -> Tensor:  # (...) or ()
    """`linear_topk_reverse_kl` with any divergence, and with what both sides leave outside S.

    Args:
        divergence, mass, sampled_ids: see `topk_divergence`. All logits count where mass is not "renormalized". They
            are made a block of positions by a block of the vocabulary at a time, forwards and again backwards, in
            float32 (float64) and plain PyTorch on any device. Nothing of size N V exists; the head's gradient is dense.
            torch.backends.fp32_precision and its like decide whether those products may use TF32. The last bits of a
            position may depend on the batch.
        The other arguments: see `linear_topk_reverse_kl`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, and nothing has been computed.
        RuntimeError: the backend asked for by name cannot take these tensors, or has no such divergence or mass.
    """
    asked, head = require_group(group), (student_hidden, student_weight, student_bias)
    student_hidden, student_weight, student_bias, group = unwrap_head(*head, asked)
    teacher, sharded = unwrap_teacher(teacher, "student_weight", asked, group), group is not None
    with refused_together(group, student_hidden):
        checks.require_head(
            "student_hidden", student_hidden, "student_weight", student_weight, "student_bias", student_bias, sharded
        )  # fmt: skip
        checks.require_plain(
            student_hidden=student_hidden, student_weight=student_weight, student_bias=student_bias, teacher=teacher,
            weights=weights,
        )  # fmt: skip
        checks.require_weights(weights, student_hidden, "student_hidden")
        require_reduction(reduction, denominator, student_hidden)
        logit_scale, softcap = checks.require_logit_options(logit_scale, softcap)
        _require_weight_grad(weight_grad, mass, student_weight)
        require_objective(divergence, mass)
        require_temperatures(temperature, teacher_temperature, mass, student_hidden, "student_hidden")
        checks.require_sampled_for_mass(sampled_ids, mass, student_hidden, "student_hidden")
        own = of_teacher(temperature, teacher_temperature)
        k = require_teacher(teacher, k, mass, own, student_hidden, "student_hidden", sharded)
        require_backend(group, k, mass, teacher)
    vocabs = len(student_weight), teacher.shape[-1] if isinstance(teacher, Tensor) else None
    asked_for: dict[str, object] = {
        "divergence": divergence, "mass": mass, "temperature": temperature,
        "teacher_temperature": teacher_temperature, "logit_scale": logit_scale, "softcap": softcap,
        "a backward pass": torch.is_grad_enabled() and student_hidden.requires_grad,
    }  # fmt: skip
    shards = shards_of(group, (student_hidden, teacher), *vocabs, k, asked_for)
    weights, backend = as_factors(weights, student_hidden), requested()
    at = temperatures(temperature, teacher_temperature, student_hidden)
    objective = pack(at.loss, divergence, mass, logit_scale, softcap)
    terms = None if isinstance(divergence, Divergence) else divergence
    bent = {"scaled": logit_scale != 1, "capped": softcap is not None}
    options = Options(backend, terms, weight_grad=weight_grad, **bent)
    if shards is not None or at.student is not None:
        per_token = loss_on_slots(
            student_hidden, student_weight, student_bias, teacher, k, mass, at, sampled_ids, weights, objective,
            options, shards,
        )  # fmt: skip
    elif mass != "renormalized":
        compared = classes(teacher, k, len(student_weight), at, sampled_ids, backend)
        weight, bias, _ = whole_head(student_weight, student_bias)
        per_token = LinearMassLoss.apply(student_hidden, weight, bias, *compared, weights, objective, options)
    else:
        ids, log_probs = teacher.tensors if isinstance(teacher, Support) else ops.select(teacher, k, False, backend)
        ids, log_probs = at.divided_teacher(ids, log_probs, len(student_weight))
        weight, bias, ids = whole_head(student_weight, student_bias, ids)
        per_token, *_ = LinearLoss.apply(student_hidden, weight, bias, ids, log_probs, weights, objective, options)
    return reduce(per_token, weights, reduction, denominator)


def linear_causal_topk_reverse_kl(
    student_hidden: Tensor,  # (B, T, H)
    student_weight: Tensor,  # (V, H)
    teacher: Tensor | Support,  # (B, T, V_teacher) logits, or a Support of (B, T, K) or (B, T - 1, K)
    labels: Tensor,  # (B, T)
    *,
    num_items_in_batch: float | Tensor | None = None,
    world_size: int = 1,
    ignore_index: int = -100,
    weights: Tensor | None = None,  # (B, T)
    **options: Any,
) -> Tensor:  # () or (B, T)
    """`causal_topk_reverse_kl` from hidden states.

    Args:
        student_hidden: (B, T, H), what the head is given for the input ids, neither shifted nor cut.
        student_weight: (V, H), see `linear_topk_reverse_kl`.
        teacher, labels, num_items_in_batch, world_size, ignore_index, weights: see `causal_topk_reverse_kl`.
        **options: those of `linear_topk_divergence`: student_bias, logit_scale, softcap, k, temperature and so on.

    Returns, Raises: see `causal_topk_reverse_kl`.
    """
    labelled = labels, num_items_in_batch, world_size, ignore_index, weights, options
    *_, group = unwrap_head(student_hidden, student_weight, None, require_group(options.get("group")))
    with refused_together(group, student_hidden):
        asked = as_weighted(student_hidden, "student_hidden", teacher, *labelled)
    return linear_topk_divergence(student_hidden, student_weight, **asked)


class LinearTopKDivergenceLoss(nn.Module):
    """`linear_topk_divergence` as a module: the options in the constructor, the tensors in the call."""

    def __init__(
        self,
        k: int | None = None,
        *,
        divergence: Divergence | Terms | None = None,  # ReverseKL()
        mass: Mass = "renormalized",
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        reduction: Reduction = "mean",
        logit_scale: float = 1.0,
        softcap: float | None = None,
        weight_grad: WeightGrad = "dense",
        group: Group | None = None,
    ) -> None:
        super().__init__()
        divergence = REVERSE_KL if divergence is None else divergence
        require_objective(divergence, mass)
        checks.require_temperature(temperature)
        if teacher_temperature is not None:
            checks.require_temperature(teacher_temperature, "teacher_temperature")
        require_reduction(reduction, None)
        checks.require_logit_options(logit_scale, softcap)
        _require_weight_grad(weight_grad, mass)
        k = checks.require_count("k", k)
        require_group(group)  # and kept as it is, since a mesh can be copied and saved, and a ProcessGroup cannot
        self.options: dict[str, Any] = {
            "divergence": divergence, "mass": mass, "k": k, "temperature": temperature,
            "teacher_temperature": teacher_temperature, "reduction": reduction, "logit_scale": logit_scale,
            "softcap": softcap, "weight_grad": weight_grad, "group": group,
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

    if TYPE_CHECKING:
        __call__ = forward  # which nn.Module types as Any

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearTopKReverseKLLoss(LinearTopKDivergenceLoss):
    """`linear_topk_reverse_kl` as a module: the options in the constructor, the tensors in the call."""

    def __init__(
        self,
        k: int | None = None,
        *,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        reduction: Reduction = "mean",
        logit_scale: float = 1.0,
        softcap: float | None = None,
        weight_grad: WeightGrad = "dense",
        group: Group | None = None,
    ) -> None:
        super().__init__(
            k, divergence=REVERSE_KL, temperature=temperature, teacher_temperature=teacher_temperature,
            reduction=reduction, logit_scale=logit_scale, softcap=softcap, weight_grad=weight_grad, group=group,
        )  # fmt: skip


def _require_logits_dtype(value: torch.dtype | None, hidden: Tensor) -> None:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if value is not None and value is not wide:
        raise ValueError(f"logits_dtype is {value}; use None, or {wide} with teacher_hidden of {hidden.dtype}")


def _require_weight_grad(
    value: str,
    mass: str,
    weight: Tensor | None = None,  # (V, H)
) -> None:
    """Refuses a row-sparse gradient where every row has one, and of a head that few operations could pass it on to."""
    checks.require_one_of("weight_grad", value, get_args(WeightGrad))
    if value == "dense":
        return
    if mass != "renormalized":
        raise ValueError(
            f"weight_grad is {value!r} with mass={mass!r}, which gives every row of the head a gradient; use 'dense'"
        )
    if is_dtensor(weight):
        raise ValueError(
            f"weight_grad is {value!r}, but student_weight is a DTensor, whose gradient is one; use 'dense'"
        )
    if weight is not None and not torch.compiler.is_compiling() and torch.is_grad_enabled() and weight.grad_fn:
        raise ValueError(
            f"student_weight is no leaf but the result of {weight.grad_fn.name()} (a merged adapter, a view, a cast?) "
            "with weight_grad='sparse', whose gradient a leaf alone can hold; use weight_grad='dense', or pass the "
            "parameter itself"
        )

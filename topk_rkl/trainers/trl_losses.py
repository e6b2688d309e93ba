"""The losses that TRL's trainers call, each made with options and called as TRL calls its own. TRL is not imported.

loss = generalized_jsd_loss(k=32)  # GKDTrainer, GOLDTrainer, IWOPDTrainer
loss(student_logits, teacher_logits, labels, beta=1.0, num_items_in_batch=n)

`topk_rkl.trainers.trl` has the trainers that call them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.diagnostics import NAMES, OF_SAMPLED, OF_TEACHER_LOGITS, linear_topk_diagnostics
from topk_rkl.divergence import REVERSE_KL, Divergence, Mass, Terms, generalized_jsd
from topk_rkl.loss import Support, linear_teacher_topk, linear_topk_divergence, teacher_topk, topk_divergence
from topk_rkl.objective import require_objective
from topk_rkl.recipe.builders import student_topk

Compared = Divergence | Terms | Literal["beta"]
Watch = Callable[[dict[str, Tensor]], None]
MASSES = ("renormalized", "tail", "raw", "raw_stop_grad")  # the others need the tokens that the student sampled
WATCHED = tuple(name for name in NAMES if name not in OF_SAMPLED + OF_TEACHER_LOGITS)  # what every trainer can log


def generalized_jsd_loss(
    k: int = 32,
    *,
    divergence: Compared = REVERSE_KL,
    mass: Mass = "renormalized",
) -> Callable[..., Tensor]:
    """A loss for `generalized_jsd_loss` of TRL's GKDTrainer, GOLDTrainer and IWOPDTrainer, on the teacher's top K.

    Args:
        k: 1 <= k <= V. `top_k` of IW-OPD is not read.
        divergence: see `topk_divergence`. The `beta` that the trainer passes counts with divergence="beta" alone. It is
            then TRL's: forward KL at 0, reverse KL at 1, `generalized_jsd(beta)` between.
        mass: "renormalized", "tail", "raw" or "raw_stop_grad". `add_tail` of IW-OPD is not read.

    Returns:
        A function of (student_logits, teacher_logits, labels, beta, temperature, reduction) and, by keyword,
        num_items_in_batch, as TRL's three have them. Logits are (B, T, V), labels (B, T) with -100 where nothing is
        compared. A teacher that is a `Support` is taken as it is. The sum over the tokens is divided by
        num_items_in_batch; without it by the tokens that count ("batchmean") or by nothing ("sum"). With
        labels=None "batchmean" divides by B.

    Raises:
        TypeError, ValueError: an argument is not as above, here or in the call.
    """
    require_options(divergence, mass, k)

    def loss(
        student_logits: Tensor,  # (B, T, V)
        teacher_logits: Tensor | Support,  # (B, T, V), or (B, T, K)
        labels: Tensor | None = None,  # (B, T)
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        *,
        logits_are_probs: bool = False,
        top_k: int = 0,  # noqa: ARG001
        add_tail: bool = True,  # noqa: ARG001
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor:  # ()
        if logits_are_probs:
            raise ValueError("logits_are_probs is True, as GOLD's ULD loss has it; this loss takes logits")
        if reduction not in ("batchmean", "sum"):
            raise ValueError(f"reduction is {reduction!r}, over the vocabulary in TRL; use 'batchmean' or 'sum'")
        if num_items_in_batch is None and labels is None and reduction == "batchmean":
            num_items_in_batch = max(len(student_logits), 1)
        return topk_divergence(
            student_logits, teacher_logits, k=None if isinstance(teacher_logits, Support) else k,
            divergence=_compared(divergence, beta), mass=mass, weights=None if labels is None else labels != -100,
            temperature=temperature, **_reduced(num_items_in_batch, student_logits, reduction),
        )  # fmt: skip

    return loss


def chunked_divergence_loss(
    k: int = 32,
    *,
    divergence: Compared = REVERSE_KL,
    mass: Mass = "renormalized",
    diagnostics: Sequence[str] = ("student_entropy",),
    watch: Watch | None = None,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A loss for `_chunked_divergence_loss` of TRL's DistillationTrainer: from hidden states, logits never made.

    The teacher's top K are selected from its head at the temperature asked for, over the tokens that count alone.

    Args:
        k, divergence, mass: see `generalized_jsd_loss`. `beta` counts with divergence="beta" alone.
        diagnostics: names of `topk_rkl.diagnostics`, which share one more pass over the student's head, forwards. The
            second value returned is the sum of "student_entropy", and NaN without that name: TRL logs no entropy then.
        watch: is called with the diagnostics of the tokens that count, {name: (n,)}.

    Returns:
        A function of TRL's signature. It returns the loss, the sum of the student's entropy and the number of tokens
        that count, as TRL's does. A head that is a DTensor is gathered as `linear_topk_divergence` gathers it.

    Raises:
        TypeError, ValueError: an argument is not as above, here or in the call.
    """
    require_options(divergence, mass, k, diagnostics)

    def loss(
        student_hidden_states: Tensor,  # (B, T, H)
        teacher_hidden_states: Tensor,  # (B, T, H_teacher)
        student_lm_head_weight: Tensor,  # (V, H)
        teacher_lm_head_weight: Tensor,  # (V, H_teacher)
        completion_mask: Tensor,  # (B, T)
        beta: float,
        num_items_in_batch: Tensor | float | None = None,
        student_lm_head_bias: Tensor | None = None,  # (V,)
        teacher_lm_head_bias: Tensor | None = None,  # (V,)
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # () each
        kept = completion_mask != 0  # (B, T)
        hidden = student_hidden_states[kept]  # (n, H)
        teacher = linear_teacher_topk(
            teacher_hidden_states[kept].detach(), teacher_lm_head_weight.detach(), k, normalize=True,
            bias=None if teacher_lm_head_bias is None else teacher_lm_head_bias.detach(),
            **_at_temperature(teacher_logit_scale, teacher_final_logit_softcapping, temperature),
        )  # fmt: skip
        head: dict[str, Any] = {
            "student_bias": student_lm_head_bias, "logit_scale": student_logit_scale,
            "softcap": student_final_logit_softcapping, "temperature": temperature, "teacher_temperature": 1.0,
        }  # fmt: skip
        value = linear_topk_divergence(
            hidden, student_lm_head_weight, teacher, divergence=_compared(divergence, beta), mass=mass,
            **head, **_reduced(num_items_in_batch, hidden),
        )  # fmt: skip
        entropy = value.new_full((), torch.nan)
        if diagnostics:
            watched = linear_topk_diagnostics(hidden, student_lm_head_weight, teacher, diagnostics, **head)
            entropy = watched["student_entropy"].sum() if "student_entropy" in watched else entropy
            if watch is not None:
                watch(watched)
        return value, entropy, kept.sum()

    return loss


def topk_self_distillation_loss(
    *,
    divergence: Compared = REVERSE_KL,
    support: Literal["teacher", "student"] = "teacher",
) -> Callable[..., Tensor]:
    """A loss for `compute_topk_self_distillation_loss` of TRL's SDPOTrainer, on the teacher's top K.

    The recipe of SDPO is divergence="beta" with support="student": it equals TRL's own function.

    Args:
        divergence: see `generalized_jsd_loss`; with "beta" it is `distillation_alpha` that counts.
        support: whose `distillation_topk` best tokens are compared.

    Returns:
        A function of TRL's signature, which gives the loss of each token, (B, T). mass is "tail" with
        `distillation_add_tail`, else "renormalized". TRL has divided both sides' logits by the temperature.

    Raises:
        TypeError, ValueError: an argument is not as above, here or in the call.
    """
    require_options(divergence)
    checks.require_one_of("support", support, ("teacher", "student"))

    def loss(
        student_logits: Tensor,  # (B, T, V)
        teacher_logits: Tensor,  # (B, T, V)
        *,
        distillation_topk: int,
        distillation_alpha: float,
        distillation_add_tail: bool,
    ) -> Tensor:  # (B, T)
        if support == "teacher":
            teacher = teacher_topk(teacher_logits, distillation_topk, normalize=distillation_add_tail)
        else:
            teacher = student_topk(student_logits, teacher_logits, distillation_topk, normalize=distillation_add_tail)
        return topk_divergence(
            student_logits, teacher, divergence=_compared(divergence, distillation_alpha),
            mass="tail" if distillation_add_tail else "renormalized", reduction="none",
        )  # fmt: skip

    return loss


def server_forward_kl_loss(
    *,
    divergence: Compared = REVERSE_KL,
    mass: Mass = "renormalized",
) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    """A loss for `_compute_server_forward_kl_loss` of TRL's ServerDistillationTrainer, on the K that the server sent.

    Both sides are log-probs at the trainer's temperature already, so none is divided again.

    Args:
        divergence, mass: see `generalized_jsd_loss`. "beta" is forward KL: TRL calls this at beta = 0 alone.

    Returns:
        A function of TRL's (teacher_result, student_log_probs, labels): the mean over the labels that are not -100.

    Raises:
        TypeError, ValueError: an argument is not as above, here or in the call.
    """
    require_options(divergence, mass)

    def loss(
        teacher_result: dict[str, Tensor],  # topk_token_ids, topk_logprobs: (B, T, K)
        student_log_probs: Tensor,  # (B, T, V)
        labels: Tensor,  # (B, T)
    ) -> Tensor:  # ()
        teacher = Support(teacher_result["topk_token_ids"], teacher_result["topk_logprobs"])
        return topk_divergence(
            student_log_probs, teacher, divergence=_compared(divergence, 0.0), mass=mass, weights=labels != -100
        )

    return loss


def chunked_jsd_loss(
    *,
    divergence: Compared = REVERSE_KL,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """A loss for `_chunked_jsd_loss` of TRL's AsyncDistillationTrainer: from hidden states, logits never made.

    The trainer needs vLLM, and was not run with it. It keeps the teacher's K with `beta=0.0` alone, and narrows them to
    one or two tokens otherwise.

    Args:
        divergence: see `generalized_jsd_loss`. `beta` counts with divergence="beta" alone.

    Returns:
        A function of TRL's signature and sums. mass is "tail" with `add_tail_bucket`, else "renormalized". The
        teacher's log-probs are at `temperature` already. `chunk_size` is not read.

    Raises:
        TypeError, ValueError: an argument is not as above, here or in the call.
    """
    require_options(divergence)

    def loss(
        hidden_valid: Tensor,  # (n, H)
        lm_head_weight: Tensor,  # (V, H)
        lm_head_bias: Tensor | None,  # (V,)
        logit_scale: float,
        final_logit_softcapping: float | None,
        target_ids: Tensor,  # (n, K)
        teacher_target_logps: Tensor,  # (n, K)
        valid_candidate_mask: Tensor,  # (n, K) bool
        beta: float,
        temperature: float,
        add_tail_bucket: bool,
        teacher_id_idx: Tensor | None,  # (n,)
        num_teachers: int,
        chunk_size: int,  # noqa: ARG001
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # () each, and (3 num_teachers,)
        teacher = Support(
            target_ids.masked_fill(~valid_candidate_mask, -1),
            teacher_target_logps.masked_fill(~valid_candidate_mask, -torch.inf),
        )
        head: dict[str, Any] = {
            "student_bias": lm_head_bias, "logit_scale": logit_scale, "softcap": final_logit_softcapping,
            "temperature": temperature, "teacher_temperature": 1.0,
        }  # fmt: skip
        per_token = linear_topk_divergence(
            hidden_valid, lm_head_weight, teacher, divergence=_compared(divergence, beta),
            mass="tail" if add_tail_bucket else "renormalized", reduction="none", **head,
        )  # (n,)  # fmt: skip
        with torch.no_grad():
            watched = linear_topk_diagnostics(hidden_valid, lm_head_weight, teacher, ["student_entropy"], **head)
            entropy = _entropy(teacher.log_probs, add_tail_bucket)  # (n,)
            stats = per_token.new_zeros((num_teachers, 3))
            if teacher_id_idx is not None:
                of = [torch.ones_like(per_token), per_token.detach(), entropy.to(per_token.dtype)]
                stats.index_add_(0, teacher_id_idx, torch.stack(of, 1))
        total = per_token.sum()
        return total, total.detach(), watched["student_entropy"].sum(), entropy.sum(), stats.flatten()

    return loss


def _entropy(
    log_probs: Tensor,  # (n, K), true ones, -inf where empty
    tail: bool,
) -> Tensor:  # (n,)
    """Of what the loss compares: the K tokens renormalised, or as they are and the rest of the vocabulary as one."""
    log_probs = log_probs.double()
    whole = log_probs.logsumexp(-1, keepdim=True)  # (n, 1)
    if tail:
        rest = torch.log(-torch.expm1(whole.clamp(max=-1e-7)))  # TRL's bound of the mass
        log_probs = torch.cat([log_probs, rest], -1)
    else:
        log_probs = log_probs - whole
    return -torch.where(log_probs > -torch.inf, log_probs.exp() * log_probs, 0).sum(-1)


def _compared(divergence: Compared, beta: float) -> Divergence | Terms:
    return generalized_jsd(beta) if divergence == "beta" else divergence


def _at_temperature(logit_scale: float, softcap: float | None, temperature: float) -> dict[str, Any]:
    """What makes a head give its logits / temperature."""
    return {"logit_scale": logit_scale / temperature, "softcap": None if softcap is None else softcap / temperature}


def _reduced(
    num_items_in_batch: Tensor | float | None,
    like: Tensor,
    reduction: str = "batchmean",
) -> dict[str, Any]:
    """Arguments of the loss that reduce as TRL does: a number of items comes before the name of a reduction."""
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(like.device)
    summed = reduction == "sum" and num_items_in_batch is None
    return {"reduction": "sum" if summed else "mean", "denominator": num_items_in_batch}


def require_options(
    divergence: Compared,
    mass: Mass = "renormalized",
    k: int | None = None,
    diagnostics: Sequence[str] = (),
) -> None:
    checks.require_one_of("mass", mass, MASSES)
    if isinstance(divergence, str) and divergence != "beta":
        raise ValueError(f'divergence is {divergence!r}; it must be "beta", a Divergence or a function')
    require_objective(REVERSE_KL if divergence == "beta" else divergence, mass)
    checks.require_count("k", k)
    if isinstance(diagnostics, str) or not isinstance(diagnostics, Sequence):
        raise TypeError(f"diagnostics is {diagnostics!r}; it must be a sequence of names, such as ('student_mass',)")
    for name in diagnostics:
        checks.require_one_of("diagnostics", name, WATCHED)

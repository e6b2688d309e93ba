"""verl: `distillation.distillation_loss.loss_mode=topk_reverse_kl`, without a line of code.

verl imports this module in each of its processes, through the entry point group `verl.plugins`. A script or a module
named in VERL_USE_EXTERNAL_MODULES adds other objectives:

    from topk_rkl.loss import JensenShannon
    from topk_rkl.trainers.verl import register

    register("topk_jensen_shannon", divergence=JensenShannon())

verl calls a top-K loss twice. The first call is next to the logits, where every rank has its own positions, and under
Megatron its own part of the vocabulary. The second gets the losses of whole sequences, and makes metrics of them.
"""

import inspect
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from topk_rkl import __version__
from topk_rkl.backends import requested
from topk_rkl.diagnostics import topk_diagnostics
from topk_rkl.divergence import REVERSE_KL, Divergence, Terms
from topk_rkl.loss import Support, teacher_topk, topk_divergence
from topk_rkl.objective import require_objective
from topk_rkl.parallel.logits import local_ids, logits_at, shard_tail

__all__ = ["Plugin", "register"]

TRIED = "0.9.1"
PARAMETERS = {  # by name: verl's functions that are replaced or called
    "compute_topk_loss": ("config", "distillation_config", "data", "student_logits", "data_format"),
    "compute_forward_kl_topk": ("config", "distillation_config", "model_output", "data"),
    "register_distillation_loss": ("loss_settings",),
}
WATCHED = ("student_mass", "teacher_mass", "overlap_count", "overlap_token_advantage", "max_log_ratio")
NOT_A_LOG_PROB = -9999.0  # what vLLM writes for -inf


class Plugin:
    """Our objectives among those of verl, whose module `verl.trainer.distillation.losses` is `losses`."""

    def __init__(self, losses: Any) -> None:
        for name, parameters in PARAMETERS.items():
            found = tuple(inspect.signature(getattr(losses, name)).parameters)
            if found != parameters:
                raise TypeError(f"{name} takes ({', '.join(found)}) there, and not ({', '.join(parameters)})")
        self.losses, self.stock = losses, losses.compute_topk_loss
        self.objectives: dict[str, tuple[bool, dict[str, Any]]] = {}  # by name: match_temperature, options of the loss
        losses.compute_topk_loss = self.at_logits

    def register(self, name: str, match_temperature: bool, **objective: Any) -> None:
        settings = self.losses.DistillationLossSettings(names=[name], use_topk=True)
        self.losses.register_distillation_loss(settings)(self.of_sequences)
        self.objectives[name] = match_temperature, objective

    def at_logits(
        self,
        config: Any,
        distillation_config: Any,
        data: Any,
        student_logits: Tensor,  # (1, N, V), (B, T, V) where verl does not pack; divided by the temperature already
        data_format: str,
    ) -> dict[str, Tensor]:  # (1, N) or (B, T) each
        """In place of verl's `compute_topk_loss`, for our names alone."""
        asked = distillation_config.distillation_loss
        if asked.loss_mode not in self.objectives:
            stock: dict[str, Tensor] = self.stock(config, distillation_config, data, student_logits, data_format)
            return stock
        if asked.use_policy_gradient:
            raise ValueError(
                f"use_policy_gradient=True with loss_mode={asked.loss_mode}: as a reward this loss is the same for "
                "every token that could be sampled, so that its gradient is 0 on average; set "
                "distillation.distillation_loss.use_policy_gradient=False"
            )
        match_temperature, objective = self.objectives[asked.loss_mode]
        log_probs = at_temperature_of(data) if match_temperature else data["teacher_logprobs"]
        ids, log_probs, raw, group = my_part(
            config.strategy, data_format, data["teacher_ids"], log_probs, data["teacher_logprobs"]
        )
        if objective["mass"] != "renormalized":
            # The backward pass of verl's log-probs may overwrite the logits, which this mass reads again.
            student_logits = student_logits.clone()
        teacher = Support(ids, present(log_probs), normalized=not match_temperature)
        options = {**objective, "reduction": "none", "group": group}
        loss = topk_divergence(student_logits, teacher, **options)
        logits, teacher = student_logits.detach(), Support(ids, present(raw))
        if group is None:
            return {"distillation_losses": loss, **topk_diagnostics(logits, teacher, WATCHED)}
        return {"distillation_losses": loss, **sharded_diagnostics(logits, teacher, group)}

    def of_sequences(
        self,
        config: Any,
        distillation_config: Any,
        model_output: dict[str, Tensor],
        data: Any,
    ) -> tuple[Tensor, dict[str, Any]]:  # (B, response), and metrics
        """verl's own second stage, and `distillation/max_log_ratio`."""
        if "max_log_ratio" not in model_output:
            raise RuntimeError(
                f"loss_mode={distillation_config.distillation_loss.loss_mode} was not computed from the logits; fused "
                "kernels compute verl's own forward KL, so set actor_rollout_ref.model.use_fused_kernels=False"
            )
        losses, metrics = self.losses.compute_forward_kl_topk(config, distillation_config, model_output, data)
        mask = data["response_mask"]
        mask = (mask.to_padded_tensor(0) if mask.is_nested else mask).bool()
        ratios = self.losses.no_padding_2_padding(model_output["max_log_ratio"], data)[mask]
        largest = self.losses.Metric(self.losses.AggregationType.MAX, ratios.max())
        return losses, {**metrics, "distillation/max_log_ratio": largest}


def at_temperature_of(data: Any) -> Tensor:  # (B, jagged, K)
    """The teacher's log-probs over the temperature that each sequence was sampled at, as the student's logits are."""
    log_probs, temperature = data["teacher_logprobs"], data["temperature"]  # the latter a number, or (B,)
    values, offsets = present(log_probs.values()), log_probs.offsets()
    if isinstance(temperature, Tensor):
        temperature = temperature.float().repeat_interleave(offsets.diff())[:, None]  # (N, 1)
    return torch.nested.nested_tensor_from_jagged(values / temperature, offsets)


def my_part(
    strategy: str,
    data_format: str,
    *teacher: Tensor,  # (B, jagged, K)
) -> tuple[Any, ...]:  # (1, N, K) or (B, T, K) each, and the group that shares the vocabulary
    """The positions of this rank, as verl cuts its logits."""
    if strategy == "megatron":
        from megatron.core.parallel_state import get_tensor_model_parallel_group
        from verl.models.mcore import util

        cut = util.preprocess_thd_engine if data_format == "thd" else util.preprocess_bshd_engine
        return *(cut(x, pre_process=True)[0] for x in teacher), get_tensor_model_parallel_group()
    if strategy not in ("fsdp", "fsdp2", "veomni"):
        raise NotImplementedError(f"strategy is {strategy}; top-K losses run with fsdp, fsdp2, veomni and megatron")
    from verl.utils import ulysses

    parts = [x.values().unsqueeze(0) for x in teacher]
    if ulysses.get_ulysses_sequence_parallel_world_size() > 1:
        parts = [ulysses.slice_input_tensor(x, dim=1) for x in parts]
    return *parts, None


def present(
    log_probs: Tensor,  # (..., K)
) -> Tensor:  # (..., K), -inf where the teacher's probability is 0
    return log_probs.masked_fill(log_probs <= NOT_A_LOG_PROB, -torch.inf)


@torch.no_grad()
def sharded_diagnostics(
    student_logits: Tensor,  # (..., V / ranks)
    teacher: Support,  # (..., K)
    group: Any,
) -> dict[str, Tensor]:  # (...) each
    """`WATCHED` where the ranks of `group` hold equal parts of the vocabulary, in the order of the ranks."""
    ids, log_q = teacher.tensors
    vocab, nothing = student_logits.shape[-1], ids.new_full((*ids.shape[:-1], 1), -1, dtype=torch.int32)
    starts = torch.arange(dist.get_world_size(group) + 1, device=ids.device) * vocab
    logits = logits_at(student_logits, local_ids(ids, starts, vocab, group), group).float()
    best = teacher_topk(student_logits, min(ids.shape[-1], vocab * dist.get_world_size(group)), group=group).ids
    total = shard_tail(student_logits, nothing, None, group, requested())
    log_p = (logits.double() - total[..., None]).float()
    overlap = (ids[..., :, None] == best[..., None, :]).any(-1)
    count, terms = overlap.sum(-1), log_q.exp() * (log_p - log_q)
    live = log_q > -torch.inf
    ratios = logits.masked_fill(~live, -torch.inf).log_softmax(-1) - log_q.log_softmax(-1)
    return {
        "student_mass": torch.where(live, log_p.exp(), 0).sum(-1),
        "teacher_mass": log_q.exp().sum(-1),
        "overlap_count": count,
        "overlap_token_advantage": torch.where(overlap & live, terms, 0).sum(-1) / count.clamp(min=1),
        "max_log_ratio": torch.where(live, ratios.abs(), 0).amax(-1),
    }


def register(
    name: str,
    *,
    divergence: Divergence | Terms = REVERSE_KL,
    mass: str = "renormalized",
    match_temperature: bool = False,
) -> None:
    """Makes `loss_mode=name` an objective of verl, in this process.

    Args:
        name: not one of verl's own.
        divergence: see `topk_divergence`.
        mass: "renormalized" or "tail". verl clamps the loss of a position at 0, which the others may fall below.
        match_temperature: divides the teacher's log-probs by the temperature of the sequence, as verl divides the
            student's logits; with mass="renormalized" alone. False compares as verl's own losses do: the student at
            the temperature that it samples at, the teacher at 1.

    Raises:
        ValueError: an argument is not as above, or verl has a loss of that name.
    """
    require_objective(divergence, mass)
    if mass not in ("renormalized", "tail"):
        raise ValueError(f"mass is {mass!r}; it must be 'renormalized' or 'tail', whose losses are not negative")
    if match_temperature and mass == "tail":
        raise ValueError("match_temperature=True with mass='tail', which needs the teacher's log-probs at 1")
    _plugin.register(name, match_temperature, divergence=divergence, mass=mass)


def _plug_in() -> Plugin:
    """verl says nothing of a plugin that fails, so this warns; without the loss verl is as before."""
    version = "of unknown version"
    try:
        import verl

        version = verl.__version__
        from verl.trainer.distillation import losses

        return Plugin(losses)
    except Exception as error:
        warnings.warn(
            f"topk_rkl {__version__} cannot add loss_mode=topk_reverse_kl to verl {version}, since it is written for "
            f"verl {TRIED}: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        raise


_plugin = _plug_in()
register("topk_reverse_kl")

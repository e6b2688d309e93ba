"""NeMo-RL: a loss function in the place of its `DistillationLossFn`.

loss_fn = TopKLossFn()  # between `setup` and `distillation_train` in examples/run_distillation.py

Written after NeMo-RL 0.6.0 at commit 7ea279a, which needs GPUs: read, not run.
"""

import sys
from typing import Any

import torch.distributed as dist
from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from topk_rkl.loss import Divergence, ReverseKL, Support, topk_divergence


class TopKLossFn:
    """The loss on the student's logits and the `topk_logits_k` logits that NeMo-RL's teacher sends with each position.

    Both sides are renormalised on these tokens, as by NeMo-RL where `zero_outside_topk` is false. Logits come divided
    by the temperature of `policy.generation` on both sides, so there is none here. The student's may be whole, a
    DTensor of its DTensor workers, or the shard of a Megatron worker.
    """

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGIT  # the logits themselves, where DISTILLATION gathers both sides first

    def __init__(self, divergence: Divergence | None = None) -> None:
        """Reverse KL by default; `Mixture(0.5)` is NeMo-RL's default, its kl_type "mixed"."""
        self.divergence = ReverseKL() if divergence is None else divergence

    def __call__(
        self,
        logits: Tensor,  # (B, S', V), S' of at least S
        data: dict[str, Any],
        global_valid_seqs: Tensor,  # noqa: ARG002 -- NeMo-RL passes it by name
        global_valid_toks: Tensor,  # ()
    ) -> tuple[Tensor, dict[str, Any]]:
        """Sum over the tokens of this micro-batch, divided by the valid tokens of all of them, and what is logged.

        `data` holds teacher_topk_logits and teacher_topk_indices (B, S, K), token_mask (B, S) and sample_mask (B,).

        Context parallelism of DTensor workers gives each rank the value of all positions and the gradient of its own.

        Raises:
            ValueError: a Megatron worker splits the positions.
        """
        ids, teacher = (data[f"teacher_topk_{name}"].to(logits.device) for name in ("indices", "logits"))  # (B, S, K)
        mask = data["token_mask"].to(logits.device) * data["sample_mask"].to(logits.device)[:, None]  # (B, S)
        weights = pad(mask[:, 1:].float(), (0, 1))  # position t predicts token t + 1
        logits, group, context = whole_positions(logits)
        if context is None:
            logits = logits[:, : ids.shape[1]]  # packed sequences of Megatron come padded
        else:
            mine = data["seq_index"].chunk(context.size())[context.rank()]  # (S / ranks,)
            ids, teacher, weights = ids[:, mine], teacher[:, mine], weights[:, mine]
        loss = topk_divergence(
            logits,
            Support(ids, teacher, normalized=False),
            divergence=self.divergence,
            weights=weights,
            denominator=global_valid_toks,
            group=group,
        )
        if context is not None:
            total = loss.detach().clone()
            dist.all_reduce(total, group=context)
            loss = loss + (total - loss.detach())
        return loss, {"loss": loss.item(), "num_valid_samples": ids.shape[0]}


def whole_positions(
    logits: Tensor,  # (B, S', V)
) -> tuple[Tensor, ProcessGroup | None, ProcessGroup | None]:
    """The logits, the ranks that share their vocabulary, and those that share their positions.

    A DTensor that is split in the vocabulary alone stays one, and tells its ranks.
    """
    if isinstance(logits, DTensor):
        mesh = logits.device_mesh
        if "cp" not in (mesh.mesh_dim_names or ()):
            return logits, None, None
        return logits.to_local(), mesh.get_group("tp"), mesh.get_group("cp")
    state: Any = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return logits, None, None
    if (ranks := state.get_context_parallel_world_size()) > 1:
        raise ValueError(
            f"context_parallel_size is {ranks} in a Megatron worker, which splits the positions of a sequence; set it "
            "to 1 in policy.megatron_cfg, or keep NeMo-RL's own DistillationLossFn"
        )
    return logits, state.get_tensor_model_parallel_group(), None

"""Megatron-LM: the loss function that `forward_step` returns.

return model(tokens, position_ids, attention_mask), partial(loss_func, loss_mask, support=support)

Written after Megatron Core 0.20.0 at commit d98e8a6. Its training loop needs GPUs: read, not run.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from topk_rkl.loss import Support, topk_divergence


def loss_func(
    loss_mask: Tensor,  # (B, S)
    output_tensor: Tensor,  # (B, S, V / ranks)
    *,
    support: Support,  # of (B, S, K)
    model: object = None,  # noqa: ARG001 -- Megatron-LM gives it to its own loss functions
    **options: Any,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the loss over this micro-batch, how many tokens it counts, and both to be logged.

    Megatron-LM divides by the tokens of all micro-batches and ranks with `calculate_per_token_loss`. It otherwise
    divides each micro-batch by its own, and averages.

    Args:
        loss_mask: 0 or 1 per position, as `GPTDataset` has it beside its labels, which are shifted; nothing is here.
        output_tensor: logits that the model gives without labels: its `output_layer` leaves the vocabulary split over
            the tensor-parallel ranks.
        support: the teacher's tokens, ids of the whole vocabulary, such as of `teacher_topk(logits, k, group=...)`.
            Context parallelism cuts it along the sequence, as it cuts the tokens.
        options: of `topk_divergence`, such as `divergence` and `mass`. `group` is that of the tensor-parallel ranks
            unless given.

    Raises:
        ValueError: output_tensor holds losses, since the model was given labels.
    """
    if output_tensor.dim() == 2:
        raise ValueError(
            f"output_tensor has shape {tuple(output_tensor.shape)}, the losses of a model that was given labels; "
            "call the model without labels, and it gives logits (B, S, V / ranks)"
        )
    options.setdefault("group", parallel_state.get_tensor_model_parallel_group())
    loss = topk_divergence(output_tensor, support, weights=loss_mask.float(), reduction="sum", **options)
    tokens = loss_mask.sum().detach().to(torch.int)  # Megatron-LM adds them up in this dtype
    return loss, tokens, {"distillation loss": torch.stack([loss.detach(), tokens.to(loss.dtype)])}

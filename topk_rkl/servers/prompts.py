"""What a server is asked for, as it takes it: prompts, the ids to score, and the prompts of a trainer's batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from topk_rkl import checks
from topk_rkl.support import Support

BEYOND_IDS = (  # change what a model reads
    "inputs_embeds", "pixel_values", "pixel_values_videos", "input_features",
    "position_ids", "cu_seq_lens_q", "seq_idx",
)  # fmt: skip


def require_prompts(input_ids: Any) -> list[list[int]]:
    checks.require_list("input_ids", input_ids, "prompts, each a list of token ids")
    return [_require_prompt(f"input_ids[{i}]", prompt) for i, prompt in enumerate(input_ids)]


def _require_prompt(name: str, prompt: Any) -> list[int]:
    if isinstance(prompt, Tensor):
        checks.require_tensor(name, prompt, checks.INTEGERS)
        if prompt.dim() != 1:
            raise ValueError(f"{name} has shape {checks.shape_of(prompt)}; it must be (T,), the token ids of a prompt")
        prompt = prompt.tolist()
    if isinstance(prompt, int):
        raise TypeError(f"{name} is {prompt}; it must be a list of token ids: a single prompt is [[1, 2, 3]]")
    ids = checks.require_integers(name, prompt)
    if not ids:
        raise ValueError(f"{name} is empty; a prompt must have at least one token")
    if min(ids) < 0:
        raise ValueError(f"{name} has the id {min(ids)}; leave out padding and labels, which are no tokens")
    return ids


def require_ids(ids: Any, prompts: list[list[int]]) -> list[Tensor]:
    """On the CPU."""
    checks.require_list("ids", ids, "tensors of token ids, one per prompt")
    if len(ids) != len(prompts):
        raise ValueError(f"ids has {len(ids)} tensors and input_ids {len(prompts)} prompts; give one per prompt")
    return [_require_tensor_of_ids(i, *pair) for i, pair in enumerate(zip(ids, prompts))]


def _require_tensor_of_ids(
    i: int,
    x: Tensor,  # (T, K)
    prompt: list[int],
) -> Tensor:
    checks.require_tensor(f"ids[{i}]", x, checks.INTEGERS)
    if x.dim() != 2 or x.shape[0] != len(prompt) or x.shape[1] == 0:
        raise ValueError(
            f"ids[{i}] has shape {checks.shape_of(x)} and input_ids[{i}] {len(prompt)} tokens; it must be (T, K), here "
            f"({len(prompt)}, K)"
        )
    return x.cpu()


def packed(
    ids: Tensor,  # (N, K)
) -> Tensor:  # (N, U)
    """The different ids of each row, then -1, in as few columns as hold them."""
    unique = Support(ids, torch.zeros(ids.shape)).unique().ids.sort(-1, descending=True).values
    return unique[:, : int((unique >= 0).sum(-1).max())].clamp_min(-1)


def taken(
    support: Support,  # (T, U)
    ids: Tensor,  # (T, K)
) -> Support:  # (T, K)
    """What the support says of the ids, in their order; empty where it says nothing."""
    known, order = support.ids.long().sort(-1)
    at = torch.searchsorted(known, ids.long().contiguous()).clamp_max(support.k - 1)
    log_probs = support.log_probs.gather(-1, order).gather(-1, at)
    return Support(ids, log_probs).without((known.gather(-1, at) != ids) | (ids < 0))


def require_batch(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The ids, (B, T), and which of them are tokens, (B, T) bool."""
    beyond = [name for name in BEYOND_IDS if name in inputs]
    if beyond:
        raise ValueError(
            f"the batch has {', '.join(beyond)}, which a server of token ids does not read; pad rows instead of "
            "packing them, and call the teacher with input_ids and attention_mask alone"
        )
    checks.require_tensor("input_ids", inputs.get("input_ids"), checks.INTEGERS)
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if ids.dim() != 2 or kept.shape != ids.shape:
        raise ValueError(
            f"input_ids has shape {checks.shape_of(ids)} and attention_mask {checks.shape_of(kept)}; both must be "
            "(B, T)"
        )
    starts = (kept & ~pad(kept, (1, 0))[:, :-1]).sum(-1)
    if (starts != 1).any():
        row = int((starts != 1).nonzero()[0])
        if starts[row] == 0:
            raise ValueError(f"attention_mask has no token in row {row}; drop such rows")
        raise ValueError(f"attention_mask has padding within row {row}; a server reads tokens without a gap")
    if mask is not None and mask.dtype in checks.INTEGERS and int(mask.max()) > 1:
        raise ValueError(
            f"attention_mask has the value {int(mask.max())}, as packed rows have; pad rows instead of packing them"
        )
    return ids, kept

"""slime, and its fork miles: the teacher's top-K from an SGLang server, and the loss in Megatron workers.

--custom-rm-path topk_rkl.trainers.slime.reward --rm-url http://TEACHER/generate
--loss-type custom_loss --custom-loss-function-path topk_rkl.trainers.slime.loss

Written after slime 0.3.1 at commit 624b824 and miles at commit 31f1ca9, which need GPUs: read, not run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from topk_rkl.loss import Support, topk_divergence

K = 32  # unless `topk_rkl_k` stands in the file of --custom-config-path


async def reward(args: Any, sample: Any, **_: Any) -> float:
    """Asks the teacher for its K best tokens at each token of the response, and keeps them in `train_metadata`.

    The reward is 0: the loss is the objective.
    """
    k = getattr(args, "topk_rkl_k", K)
    answer = await _post(args.rm_url, {
        "input_ids": list(sample.tokens),
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": k,
    })  # fmt: skip
    sample.train_metadata = {**(sample.train_metadata or {}), **teacher_of(answer, sample.response_length, k)}
    return 0.0


async def _post(url: str, request: dict[str, Any]) -> dict[str, Any]:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.post(url, json=request) as answer:
        answer.raise_for_status()
        return dict(await answer.json())


def teacher_of(answer: dict[str, Any], response_length: int, k: int) -> dict[str, list[Any]]:
    """Ids and log-probs (R, K) of an answer of SGLang, in lists, which both projects' stores take.

    Entry i of `input_top_logprobs` speaks of token i, and holds [log-prob, id, text] of each of its K tokens.

    Raises:
        ValueError: it has no K tokens at a token of the response.
    """
    entries = answer["meta_info"]["input_top_logprobs"]
    entries = entries[len(entries) - response_length :]
    if len(entries) != response_length or any(len(entry or ()) < k for entry in entries):
        raise ValueError(
            f"the teacher's answer lacks {k} tokens at a token of the response, which has {response_length}; "
            "ask for the whole prompt with logprob_start_len=0, and no more tokens than the server gives"
        )
    return {
        "teacher_ids": [[id for _, id, *_ in entry[:k]] for entry in entries],
        "teacher_log_probs": [[log_prob for log_prob, *_ in entry[:k]] for entry in entries],
    }


def loss(
    args: Any,
    batch: dict[str, Any],
    logits: Tensor,  # (1, T, V / ranks) float32, sequences one after another
    sum_of_sample_mean: Callable[[Tensor], Tensor],
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch and what is logged, as `policy_loss_function` and `sft_loss_function` give them.

    The student's logits and the teacher's log-probs, which SGLang gives at temperature 1, are divided by
    `rollout_temperature`. The project masks, divides and scales: by its `sum_of_sample_mean`, and per token with
    `calculate_per_token_loss`. Context parallelism may cut the sequences in its zig-zag layout.

    Args:
        options: of `topk_divergence`, such as `divergence` and `mass`, where a function of yours calls this one.

    Raises:
        ValueError: the batch lacks the teacher, or the sequences are cut or laid out in another way.
    """
    # Here, since the process of the rollouts needs reward() alone.
    from megatron.core import mpu

    ranks = mpu.get_context_parallel_world_size()
    if ranks > 1 and getattr(args, "allgather_cp", False):
        raise ValueError("allgather_cp is set: it cuts the batch elsewhere than its sequences; leave it out")
    if getattr(args, "qkv_format", "thd") != "thd":
        raise ValueError(f"qkv_format is {args.qkv_format!r}; only 'thd', one sequence after another, is taken")
    if not batch.get("metadata"):
        raise ValueError(
            "the batch lacks `metadata`, in which reward() keeps the teacher; add it to the lists of fields that "
            "docs/integrations/slime.md names"
        )
    rows, start = [], 0
    k = max((len(row) for kept in batch["metadata"] for row in kept["teacher_ids"][:1]), default=K)
    ids = torch.full((logits.shape[1], k), -1, dtype=torch.int32)  # a slot is empty where the id is -1
    log_probs = torch.full((logits.shape[1], k), -torch.inf)
    for kept, total, response in zip(batch["metadata"], batch["total_lengths"], batch["response_lengths"]):
        positions = held(total, mpu.get_context_parallel_rank(), ranks)
        token = positions - (total - response - 1)  # of the response, which the position predicts
        here = ((token >= 0) & (token < response)).nonzero()[:, 0]
        row, token = start + here, token[here]
        if len(row):
            ids[row] = torch.tensor(kept["teacher_ids"], dtype=torch.int32)[token]
            log_probs[row] = torch.tensor(kept["teacher_log_probs"])[token]
        rows.append(row)
        start += len(positions)
    support = Support(ids.to(logits.device), log_probs.to(logits.device))
    options = {"temperature": args.rollout_temperature, "group": mpu.get_tensor_model_parallel_group()} | options
    per_token = topk_divergence(logits[0], support, reduction="none", **options)  # (T,)
    value = sum_of_sample_mean(per_token[torch.cat(rows).to(logits.device)])
    return value, {"loss": value.detach().clone()}


def held(total: int, rank: int, ranks: int) -> Tensor:
    """The positions of a sequence that this rank holds: chunks r and 2 W - 1 - r of 2 W, padded to equal lengths."""
    if ranks == 1:
        return torch.arange(total)
    chunk = -(-total // (2 * ranks))
    return torch.cat([torch.arange(chunk) + c * chunk for c in (rank, 2 * ranks - 1 - rank)])

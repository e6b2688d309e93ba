"""vLLM: its two APIs in the style of OpenAI, `RequestOutput` of the offline LLM, and scores of chosen ids."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.servers import openai
from topk_rkl.servers.answers import (
    Part,
    array,
    chosen,
    field,
    from_npy,
    require_answer,
    require_part,
    require_rows,
    require_start,
)
from topk_rkl.servers.rows import Rows, after, flat, ranked
from topk_rkl.servers.strings import Inverter
from topk_rkl.support import Support

REMEDY = "ask for {0}={1}, and start the server with --max-logprobs {1}"


def from_vllm(
    answer: object,
    k: int,
    *,
    part: Part = "prompt",
    choice: int | None = None,
) -> Support:
    """The teacher's best K tokens after each token of the prompt, or at each token of the response.

    vLLM's row i of `prompt_logprobs` speaks of token i, and row 0 is null: the rows move one position earlier here. It
    lists the actual token besides the best, K or K + 1 tokens in no order of rank, and -9999.0 stands for -inf, which
    makes an empty slot. Temperature and penalties do not enter, unless the server runs with a processed
    `--logprobs-mode`: such log-probs cannot be told from raw ones.

    Args:
        answer: a decoded answer of /v1/completions, /v1/chat/completions or /inference/v1/generate, or a RequestOutput,
            its `prompt_logprobs` a list of dicts or FlatLogprobs.
        k: at most the number that was asked for: `prompt_logprobs=k`, or `logprobs=k` with
            `return_tokens_as_token_ids=True` for the response.
        part: "prompt", or "response" for N generated tokens: (N, K), where row j belongs to position P - 1 + j of a
            prompt of P tokens.
        choice: which one, where the answer has several: one per prompt, or per sample.

    Returns:
        Support (T, K) for T tokens of the prompt, the last position empty; or (N, K). Of a chat with `top_logprobs=k`,
        a sampled token that is ranked last has pushed out a better one, so its slot is empty: ask for k + 1.

    Raises:
        ValueError: the answer is an error of the server, whose message is given; it lacks the log-probs; a log-prob is
            NaN, or the numbers are logits; no position has K tokens; a token is a string instead of `token_id:N`.
    """
    k = checks.require_positive_integer("k", k)
    require_part(part)
    require_answer(answer, "choices", "outputs", "prompt_logprobs")
    if part == "response":
        return _response(answer, k, choice)
    rows = field(answer, "prompt_logprobs")  # of a chat and of RequestOutput
    if rows is None and field(answer, "choices") is not None:
        rows = field(chosen(answer, choice), "prompt_logprobs")
    elif choice is not None:
        checks.require_integer("choice", choice)
    rows = require_rows("prompt_logprobs", rows, f"prompt_logprobs={k}")
    return after(from_dicts("prompt_logprobs", rows).support(k, REMEDY.format("prompt_logprobs", k)))


def from_vllm_scores(
    answer: object,
    token_ids: Sequence[Sequence[int]] | Tensor,  # (N, K)
    *,
    start: int = 0,
) -> Support:
    """The teacher's log-probs of ids that the caller chose, such as the student's best.

    vLLM 0.32 has `prompt_logprob_token_ids` for it. Its row i scores token `start` + i + 1, so it is that of position
    `start` + i here, whose ids are in the order of their log-probs. An id that a row repeats is one slot.

    Args:
        answer: a RequestOutput, or a decoded answer of /inference/v1/generate, where `prompt_token_id_logprobs` is an
            (N, K) array, or base64 of such a .npy file.
        token_ids: (N, K), as they were sent; -1 makes an empty slot. A Tensor, an array, or lists, which are padded.
        start: `prompt_logprob_start` of the request.

    Returns:
        Support (start + N + 1, K), where the first `start` positions and the last one are empty.

    Raises:
        ValueError: as `from_vllm`; the answer has no scores, or those of other ids.
    """
    start = require_start(start)
    name = "prompt_token_id_logprobs"
    require_answer(answer, name, "choices", "outputs")
    ids = _chosen_ids(token_ids)
    scores = field(answer, name)
    if scores is None:
        raise ValueError(
            f"answer has no {name}; ask for prompt_logprob_token_ids, of vLLM 0.32 or later that was started with "
            "VLLM_USE_V2_MODEL_RUNNER=1 and without --kv-sharing-fast-prefill"
        )
    scores = from_npy(name, scores) if isinstance(scores, str) else array(name, scores).float()
    if scores.shape != ids.shape:
        raise ValueError(
            f"token_ids has shape {checks.shape_of(ids)}, but {name} of the answer {checks.shape_of(scores)}; pass the "
            "ids that were sent with the request"
        )
    scores = scores.masked_fill(ids < 0, -torch.inf)  # as vLLM itself gives padding
    return Support(*ranked(name, ids, scores)).pad(start + len(ids), side="left").pad(start + len(ids) + 1)


def from_dicts(name: str, rows: Iterable[Any]) -> Rows:
    """Rows of {id: Logprob}, the actual token first, or FlatLogprobs, which gives it a second entry."""
    found = Rows(name)
    if all(hasattr(rows, x) for x in ("start_indices", "end_indices", "token_ids", "logprobs")):
        ids, log_probs = list(rows.token_ids), list(rows.logprobs)  # type: ignore[attr-defined]
        for start, end in zip(rows.start_indices, rows.end_indices, strict=True):  # type: ignore[attr-defined]
            found.add(ids[start:end], log_probs[start:end], ids[start] if end > start else -1)
        return found
    for i, row in enumerate(rows):
        if not row:
            found.add((), ())
            continue
        try:
            ids = [int(x) for x in row]
            log_probs = [x["logprob"] for x in row.values()] if _plain(row) else [x.logprob for x in row.values()]
        except (TypeError, ValueError, KeyError, AttributeError):
            raise ValueError(f"answer: {name}[{i}] is not a dict of ids, each with a logprob") from None
        found.add(ids, log_probs, ids[0])
    return found


def _plain(row: Any) -> bool:
    return isinstance(next(iter(row.values())), dict)


def _response(answer: Any, k: int, choice: int | None) -> Support:
    if field(answer, "outputs") is not None:
        rows = field(chosen(answer, choice, "outputs"), "logprobs")
        rows = require_rows("logprobs", rows, f"SamplingParams(logprobs={k})")
        return from_dicts("logprobs", rows).support(k, REMEDY.format("logprobs", k))
    drawn = openai.generated(chosen(answer, choice), Inverter(None, "refuse"))
    if openai.echoed(drawn):
        raise ValueError(
            "part is 'response', but the answer is an echo, which begins with the prompt; read both by from_openai, or "
            "ask for echo=false"
        )
    return drawn.support(k, REMEDY.format("logprobs", k))


def _chosen_ids(token_ids: Any) -> Tensor:
    """(N, K) int64, rows of lists padded with -1."""
    if isinstance(token_ids, (list, tuple)) and token_ids and all(isinstance(x, (list, tuple)) for x in token_ids):
        rows = Rows("token_ids")
        for row in token_ids:
            rows.add(row, [0.0] * len(row))
        try:
            flat("token_ids", rows.ids, torch.int64)
        except ValueError:
            raise TypeError("token_ids holds what is no int; it must be rows of ids") from None
        return rows.padded()[0]
    if type(token_ids).__module__ == "numpy" and token_ids.dtype.kind in "iu":
        token_ids = torch.tensor(token_ids.astype("int64"))
    if not isinstance(token_ids, Tensor):
        raise TypeError(f"token_ids is {checks.kind_of(token_ids)}; it must be (N, K) ids: a tensor, an array or lists")
    checks.require_tensor("token_ids", token_ids, checks.INTEGERS)
    if token_ids.dim() != 2 or token_ids.is_meta:
        raise ValueError(f"token_ids has shape {checks.shape_of(token_ids)} on {token_ids.device}; it must be (N, K)")
    return token_ids.cpu().long()

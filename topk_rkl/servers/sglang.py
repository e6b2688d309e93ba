"""SGLang's own API, /generate: rows of [log-prob, id, text], or flat arrays."""

from typing import Any

import torch

from topk_rkl import checks
from topk_rkl.servers.answers import Part, field, raw, require_answer, require_part, require_rows, require_start
from topk_rkl.servers.rows import Rows, after, best, flat
from topk_rkl.support import Support

TOP, SCORED = "{}_top_logprobs", "{}_token_ids_logprobs"
REQUEST = {TOP: "return_logprob=true, top_logprobs_num={}", SCORED: "return_logprob=true, token_ids_logprob=[...]"}
FLAT = "input_top_logprobs"


def from_sglang(
    answer: object,
    k: int,
    *,
    part: Part = "prompt",
    scored: bool = False,
    start: int = 0,
) -> Support:
    """The teacher's best K tokens after each token of the prompt, or at each token of the response.

    SGLang's row i of `input_top_logprobs` speaks of token `logprob_start_len` + i, and row 0 is null: the rows move one
    position earlier here. A row has the best tokens alone, and the actual one only where it is among them. The request
    needs `return_logprob` and `logprob_start_len`, which is the end of the prompt by default: no row at all.

    Args:
        answer: one decoded answer of /generate, whose `meta_info` has rows or the flat arrays that
            `return_flat_raw_top_logprobs` asks for, plain or base64.
        k: at most `top_logprobs_num` of the request, or with `scored` the length of `token_ids_logprob`.
        part: "prompt", or "response" for N generated tokens: (N, K), where row j belongs to position P - 1 + j of a
            prompt of P tokens.
        scored: reads the ids of `token_ids_logprob`, one list for all positions, instead of the best.
        start: `logprob_start_len` of the request, of the prompt alone.

    Returns:
        Support (T, K) for T tokens of the prompt, the last position and those before `start` - 1 empty; or (N, K).

    Raises:
        ValueError: as `from_vllm`.
    """
    k = checks.require_positive_integer("k", k)
    require_part(part)
    checks.require_flag("scored", scored)
    start = require_start(start)
    require_answer(answer, "meta_info")
    kind = SCORED if scored else TOP
    name, request = kind.format("input" if part == "prompt" else "output"), REQUEST[kind].format(k)
    info = field(answer, "meta_info")
    if name == FLAT and field(info, f"{FLAT}_shape") is not None:
        support = _flat(info, k)
    else:
        request += ", logprob_start_len=0" * (part == "prompt")
        support = _nested(name, require_rows(name, field(info, name), request)).support(k, f"ask for {request}")
    if part == "response":
        return support
    length = field(info, "prompt_tokens")
    if length not in (None, start + len(support)):
        raise ValueError(
            f"start is {start}, and {name} has {len(support)} rows of a prompt of {length} tokens; pass the "
            "logprob_start_len of the request, which must be there to give rows: logprob_start_len=0"
        )
    return after(support, start)


def _nested(name: str, rows: Any) -> Rows:
    found = Rows(name)
    for i, row in enumerate(rows):
        try:
            found.add([x[1] for x in row or ()], [x[0] for x in row or ()])
        except (TypeError, IndexError, KeyError):
            raise ValueError(f"answer: {name}[{i}] is not a list of [log-prob, id, text]") from None
    return found


def _flat(info: Any, k: int) -> Support:
    """Rows of equal length after the null ones; some versions count those among the rows of the shape."""
    ids, log_probs = _array(info, "idx", torch.int32), _array(info, "val", torch.float32)
    shape, prefix = field(info, f"{FLAT}_shape"), field(info, f"{FLAT}_null_prefix") or 0
    shape = checks.require_integers(f"answer: {FLAT}_shape", shape)
    prefix = checks.require_integer(f"answer: {FLAT}_null_prefix", prefix)
    sizes = {rows * shape[-1]: rows for rows in (shape[0] - prefix, shape[0])} if len(shape) == 2 else {}
    if ids.shape != log_probs.shape or len(ids) not in sizes or prefix < 0:
        raise ValueError(
            f"answer: {FLAT}_val_flat has {len(log_probs)} numbers, {FLAT}_idx_flat {len(ids)}, {FLAT}_shape is "
            f"{shape} and {FLAT}_null_prefix {prefix}; both must have a number per row and slot"
        )
    rows, width = sizes[len(ids)], shape[-1]
    remedy = f"ask for {REQUEST[TOP].format(k)}"
    support = best(FLAT, ids.long().reshape(rows, width), log_probs.float().reshape(rows, width), k, remedy)
    return support.pad(prefix + rows, side="left")


def _array(info: Any, kind: str, dtype: torch.dtype) -> torch.Tensor:
    name = f"{FLAT}_{kind}_flat"
    text = field(info, f"{name}_b64")
    if text is None:
        return flat(name, require_rows(name, field(info, name), "return_flat_raw_top_logprobs=true"), dtype)
    said = field(info, f"{name}_b64_dtype")
    given = {"float32": torch.float32, "float64": torch.float64, "int32": torch.int32, "int64": torch.int64}.get(said)
    if given is None or given.is_floating_point != dtype.is_floating_point:
        raise ValueError(f"answer: {name}_b64_dtype is {said!r}; it must be {str(dtype).removeprefix('torch.')}")
    return raw(f"{name}_b64", text, given)

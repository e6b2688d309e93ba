"""Tinker: dense arrays, or lists of (id, log-prob)."""

from topk_rkl import checks
from topk_rkl.servers.answers import array, field, require_answer, require_rows
from topk_rkl.servers.rows import Rows, after, best
from topk_rkl.support import Support


def from_tinker(answer: object, k: int) -> Support:
    """The teacher's best K tokens after each token of the prompt.

    Tinker's row i speaks of token i, and row 0 is missing: the rows move one position earlier here. Missing entries
    have id 0 and log-prob -99999.0 in the arrays, and are empty slots here.

    Args:
        answer: a SampleResponse, of `sample(..., topk_prompt_logprobs=k)`, by its arrays `topk_prompt_logprobs_np`, or
            by `topk_prompt_logprobs`, as in decoded JSON.
        k: at most the number of the request.

    Returns:
        Support (T, K) for T tokens of the prompt, the last position empty.

    Raises:
        ValueError: as `from_vllm`.
    """
    k = checks.require_positive_integer("k", k)
    names = ("topk_prompt_logprobs_np", "topk_prompt_logprobs")
    require_answer(answer, *names, "sequences")
    remedy = f"ask for topk_prompt_logprobs={k}"
    dense = field(answer, names[0])
    if dense is not None:
        ids, log_probs = (array(f"{names[0]}.{x}", field(dense, x)) for x in ("token_ids", "logprobs"))
        if ids.dim() != 2 or ids.shape != log_probs.shape or ids.is_floating_point():
            seen = " and ".join(f"{x.dtype} of {checks.shape_of(x)}" for x in (ids, log_probs))
            raise ValueError(f"answer: {names[0]} has arrays of {seen}; they must be ints and floats, (T, K) both")
        return after(best(names[0], ids.long(), log_probs.float(), k, remedy))
    rows = Rows(names[1])
    for i, row in enumerate(require_rows(names[1], field(answer, names[1]), f"topk_prompt_logprobs={k}")):
        try:
            rows.add([x[0] for x in row or ()], [x[1] for x in row or ()])
        except (TypeError, IndexError, KeyError):
            raise ValueError(f"answer: {names[1]}[{i}] is not a list of (id, log-prob)") from None
    return after(rows.support(k, remedy))

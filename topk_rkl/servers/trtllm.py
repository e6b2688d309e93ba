"""TensorRT-LLM: the results of its LLM API."""

from topk_rkl import checks
from topk_rkl.servers.answers import Part, chosen, field, require_answer, require_part, require_rows
from topk_rkl.servers.vllm import from_dicts
from topk_rkl.support import Support


def from_trtllm(
    answer: object,
    k: int,
    *,
    part: Part = "prompt",
    choice: int | None = None,
) -> Support:
    """The teacher's best K tokens after each token of the prompt, or at each token of the response.

    TensorRT-LLM's row t of `prompt_logprobs` is made of the logits at t: it speaks of token t + 1, and nothing moves.
    A row has the best tokens, and after them the actual one where it is not among them. The last row of a prompt speaks
    of the first generated token. Its HTTP server is read by `from_openai`.

    Args:
        answer: a RequestOutput, or GenerationResult, of `LLM.generate`.
        k: at most the number of the request: `SamplingParams(prompt_logprobs=k)`, or `logprobs=k` for the response.
        part: "prompt", or "response" for N generated tokens: (N, K), where row j belongs to position P - 1 + j of a
            prompt of P tokens.
        choice: which of `outputs`, where there are several.

    Returns:
        Support (T, K), with the last position where the engine gives it; or (N, K).

    Raises:
        ValueError: as `from_vllm`.
    """
    k = checks.require_positive_integer("k", k)
    require_part(part)
    require_answer(answer, "outputs")
    output = chosen(answer, choice, "outputs")
    name = "prompt_logprobs" if part == "prompt" else "logprobs"
    request = f"SamplingParams({name}={k})"
    rows = from_dicts(name, require_rows(name, field(output, name), request))
    tokens = field(answer, "prompt_token_ids") if part == "prompt" else field(output, "token_ids")
    tokens = list(tokens or ())[part == "prompt" :]  # those that the rows speak of
    rows.actual = [*tokens, *[-1] * len(rows.counts)][: len(rows.counts)]
    return rows.support(k, f"ask for {request}")

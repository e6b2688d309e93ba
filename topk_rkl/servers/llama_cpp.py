"""llama.cpp: its own server, which gives ids, and llama-cpp-python, which gives strings."""

from topk_rkl import checks
from topk_rkl.servers.answers import chosen, field, require_answer
from topk_rkl.servers.openai import echoed, generated, of_chat
from topk_rkl.servers.strings import Ambiguous, Inverter
from topk_rkl.support import Support

NATIVE = "completion_probabilities"


def from_llama_cpp(
    answer: object,
    k: int,
    tokenizer: object = None,
    *,
    choice: int | None = None,
    ambiguous: Ambiguous = "refuse",
) -> Support:
    """The best K tokens per position, of /completion of the server of llama.cpp, or of llama-cpp-python.

    `echo=True` of llama-cpp-python looks like OpenAI's, but row t is that of the logits at t: it speaks of token t + 1,
    and nothing moves. Its row 0 is null, so the first position is empty and the last one is not. A BOS token at the
    start is position 0, though it is not listed; one further on has no row, and is refused where `usage` shows it.
    Other answers are of the response: row j is that of which token j was drawn, and belongs to position P - 1 + j of a
    prompt of P tokens.

    Args:
        answer: decoded JSON of /completion with `n_probs=k`, of /v1/completions with `logprobs=k`, or of a chat.
        k: at most the number of the request.
        tokenizer: the teacher's, of transformers, for llama-cpp-python, whose tokens are strings.
        choice: which one, where the answer has several.
        ambiguous: "refuse" raises where a string is not that of one id alone, or is empty as special tokens are; "drop"
            makes an empty slot of it.

    Returns:
        Support (T, K) with `echo=True`, the first position empty; else (N, K) of N generated tokens.

    Raises:
        ValueError: as `from_openai`; `post_sampling_probs` were asked for, the server is too old to give ids, or rows
            are missing.
    """
    k = checks.require_positive_integer("k", k)
    inverter = Inverter(tokenizer, ambiguous)
    require_answer(answer, "choices", NATIVE)
    rows = field(answer, NATIVE)
    if rows is None:
        listed = generated(chosen(answer, choice), inverter, crowded=False)
        if echoed(listed):
            _require_all_rows(len(listed.counts), field(answer, "usage"))
        return listed.support(k, f"ask for logprobs={k}")
    for i, row in enumerate(rows):
        if field(row, "top_logprobs") is None:
            raise ValueError(
                f"answer: {NATIVE}[{i}] has no top_logprobs; ask for n_probs={k} with post_sampling_probs=false, of a "
                "server from 2025 on"
            )
    return of_chat(NATIVE, rows, inverter, crowded=False).support(k, f"ask for n_probs={k}")


def _require_all_rows(rows: int, usage: object) -> None:
    """An echo has a row per token that was evaluated: all but the last drawn one, and but BOS within the text."""
    prompt, drawn = field(usage, "prompt_tokens"), field(usage, "completion_tokens")
    if prompt is not None and drawn is not None and rows < prompt + drawn - 1:
        raise ValueError(
            f"answer has {rows} rows for {prompt} tokens of the prompt and {drawn} of the response; llama-cpp-python "
            "leaves out BOS tokens within a text: take them out of the prompt, or ask another server"
        )

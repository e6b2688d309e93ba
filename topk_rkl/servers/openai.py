"""The API of OpenAI, as its own servers and many others speak it: completions and chats, with tokens as strings."""

from typing import Any

from topk_rkl import checks
from topk_rkl.servers.answers import chosen, field, require_answer, require_rows
from topk_rkl.servers.rows import Rows, after
from topk_rkl.servers.strings import Ambiguous, Inverter
from topk_rkl.support import Support

REMEDY = "ask for logprobs={0}, or top_logprobs={0} in a chat"


def from_openai(
    answer: object,
    k: int,
    tokenizer: object = None,
    *,
    choice: int | None = None,
    ambiguous: Ambiguous = "refuse",
) -> Support:
    """The best K tokens per position of completions or of a chat.

    A completion with `echo=True` is told by its first row, which is null. Its row i speaks of token i, so the rows move
    one position earlier here; llama-cpp-python differs, see `from_llama_cpp`. Other answers are of the response: row j
    is that of which token j was drawn, and belongs to position P - 1 + j of a prompt of P tokens.

    Args:
        answer: decoded JSON, or an object of the openai package.
        k: at most the number that was asked for: `logprobs=k`, or `top_logprobs=k` in a chat.
        tokenizer: the teacher's, of transformers, where tokens are strings. `token_id:N`, a field `id`, and bytes of a
            part of a character are read first. Its strings are worked out once.
        choice: which one, where the answer has several.
        ambiguous: "refuse" raises where a string is not that of one id alone, or is empty as special tokens are; "drop"
            makes an empty slot of it.

    Returns:
        Support (T, K) of prompt and response with `echo=True`, the last position empty; else (N, K) of N generated
        tokens. A sampled token that a chat ranks last has pushed out a better one: its slot is empty, so ask for k + 1.

    Raises:
        ValueError: as `from_vllm`; the message names the position and the string that has no id of its own.
    """
    k = checks.require_positive_integer("k", k)
    inverter = Inverter(tokenizer, ambiguous)
    require_answer(answer, "choices")
    rows = generated(chosen(answer, choice), inverter)
    support = rows.support(k, REMEDY.format(k))
    return after(support) if echoed(rows) else support


def echoed(rows: Rows) -> bool:
    """Whether the rows begin with the prompt, whose first token nothing predicts."""
    return bool(rows.counts) and rows.counts[0] == 0


def generated(choice: Any, inverter: Inverter, crowded: bool = True) -> Rows:
    """The rows of a choice as they come, with the token that was drawn per row."""
    if field(choice, "logprobs", "content") is not None:
        return of_chat("logprobs.content", field(choice, "logprobs", "content"), inverter, crowded)
    rows = require_rows(
        "logprobs", field(choice, "logprobs", "top_logprobs"), "logprobs=K, or in a chat top_logprobs=K"
    )
    tokens = require_rows("logprobs.tokens", field(choice, "logprobs", "tokens"), "logprobs=K")
    name = "logprobs.top_logprobs"
    if len(tokens) != len(rows):
        raise ValueError(f"answer: {name} has {len(rows)} rows for {len(tokens)} tokens; it must have one per token")
    found = Rows(name)
    for i, (row, token) in enumerate(zip(rows, tokens)):
        if not row:
            found.add((), ())
            continue
        if not hasattr(row, "items"):
            raise ValueError(f"answer: {name}[{i}] is not a dict of tokens and log-probs")
        ids = [inverter.id_of(name, i, x) for x in row]
        found.add(ids, row.values(), dict(zip(row, ids)).get(token, -1))
    return found


def of_chat(name: str, content: Any, inverter: Inverter, crowded: bool = True) -> Rows:
    """Of entries with `top_logprobs`, each a token with its log-prob."""
    found = Rows(name, crowded=crowded)
    for i, entry in enumerate(require_rows(name, content, "top_logprobs=K")):
        top = field(entry, "top_logprobs")
        if not top:
            raise ValueError(f"answer: {name}[{i}] has no top_logprobs; ask the server for top_logprobs=K")
        ids = [entry_id(name, i, x, inverter) for x in top]
        log_probs = [field(x, "logprob") for x in top]
        drawn = field(entry, "token"), field(entry, "logprob")  # two parts of characters may have one string
        listed = [x for x, y, log_prob in zip(ids, top, log_probs) if (field(y, "token"), log_prob) == drawn]
        found.add(ids, log_probs, listed[0] if listed else -1)
    return found


def entry_id(name: str, row: int, entry: Any, inverter: Inverter) -> int:
    """llama.cpp gives a field `id` beside the string."""
    known = field(entry, "id")
    if isinstance(known, int) and not isinstance(known, bool):
        return known
    return inverter.id_of(name, row, field(entry, "token"), field(entry, "bytes"))

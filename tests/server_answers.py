"""Answers as servers give them, of one text and the log-probs of a teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from topk_rkl import Support

LOGITS = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)) * 3
LOG_PROBS = LOGITS.log_softmax(-1)
TOKENS = [7, int(LOG_PROBS[0].argmax()), 31, 12, 3, 39]  # LOG_PROBS[t] is that of the token after position t
K = 4


def truth(positions: slice = slice(0, -1), k: int = K) -> Support:
    """The K best, by log-prob, of these positions."""
    best, ids = LOG_PROBS[positions].topk(k)
    return Support(ids.int(), best)


def same(found: Support, want: Support) -> None:
    assert (found.ids.dtype, found.log_probs.dtype, found.normalized) == (torch.int32, torch.float32, True)
    assert found.ids.tolist() == want.ids.tolist()
    torch.testing.assert_close(found.log_probs, want.log_probs, rtol=0, atol=1e-6)


def prompt() -> Support:
    """What every server says of the prompt: the last position is empty."""
    return truth().pad(6)


def logprob(t: int, i: int) -> dict[str, Any]:
    return {
        "logprob": LOG_PROBS[t, i].item(),
        "rank": int((LOG_PROBS[t] >= LOG_PROBS[t, i]).sum()),
        "decoded_token": "x",
    }


def vllm_row(t: int, token: int, k: int = K) -> dict[str, Any]:
    """The actual token first, then the best: a dict has K or K + 1 entries."""
    return {str(i): logprob(t, i) for i in (token, *LOG_PROBS[t].topk(k).indices.tolist())}


def vllm_rows(k: int = K) -> list[Any]:
    return [None, *(vllm_row(t, TOKENS[t + 1], k) for t in range(5))]


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class Flat(Sequence[Any]):
    """The columns of vLLM's FlatLogprobs, where the actual token has an entry more."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.start_indices)

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("its dicts take long to make")


def objects(rows: list[Any]) -> list[Any]:
    return [row and {int(i): Logprob(x["logprob"], x["rank"]) for i, x in row.items()} for row in rows]


def chat(top: int) -> dict[str, Any]:
    """`top` entries per token: a token that is not among the best takes the place of the last one."""

    def entry(t: int, i: int) -> dict[str, Any]:
        return {"token": f"token_id:{i}", "logprob": LOG_PROBS[t, i].item(), "bytes": [1]}

    content = []
    for t in range(5):
        best = LOG_PROBS[t].topk(top).indices.tolist()
        listed = list(dict.fromkeys([TOKENS[t + 1], *best]))[:top]
        content.append({**entry(t, TOKENS[t + 1]), "top_logprobs": [entry(t, i) for i in listed]})
    return {"choices": [{"logprobs": {"content": content}}]}


def sglang(rows: list[Any], **more: Any) -> dict[str, Any]:
    return {"text": "", "meta_info": {"input_top_logprobs": rows, **more}}


def triples(positions: range, k: int = K) -> list[Any]:
    return [[[x, i, None] for x, i in zip(*(y.tolist() for y in LOG_PROBS[t].topk(k)))] for t in positions]


class Words:
    """A byte-level tokenizer of six ids, of which two have one string, and two are parts of a character."""

    tokens = ("a", "Ġb", "Ġb", "Ã", "©", "<|end|>")

    def __len__(self) -> int:
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.tokens[i] for i in ids]

    def batch_decode(self, rows: list[list[int]], **options: bool) -> list[str]:
        assert options["skip_special_tokens"] is False
        strings = {"Ġb": " b", "Ã": "\ufffd", "©": "\ufffd"}
        return [strings.get(self.tokens[i], self.tokens[i]) for (i,) in rows]


def completion(top: dict[str, float]) -> dict[str, Any]:
    return {"choices": [{"logprobs": {"tokens": [next(iter(top))], "top_logprobs": [top]}}]}

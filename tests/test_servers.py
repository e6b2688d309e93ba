"""Answers of any server: its errors, what is refused, how a shift is found, and the page."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.server_answers import (
    LOG_PROBS,
    LOGITS,
    TOKENS,
    K,
    Words,
    chat,
    completion,
    prompt,
    same,
    sglang,
    truth,
    vllm_row,
    vllm_rows,
)
from topk_rkl import Support, topk_reverse_kl
from topk_rkl.servers import alignment, from_llama_cpp, from_openai, from_sglang, from_tinker, from_trtllm, from_vllm

ERRORS = [
    {"error": {"message": "no such model", "code": 404}},
    {"object": "error", "message": "no such model"},
    {"error": "no such model"},
    {"detail": "no such model"},
]


@pytest.mark.parametrize("read", [from_vllm, from_openai, from_sglang, from_trtllm, from_tinker, from_llama_cpp])
@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_an_error_of_the_server_is_told_in_its_words(read: Any, error: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="answer is an error of the server: no such model"):
        read(error, K)


WIDE = {"token": "\ufffd", "bytes": [300], "logprob": -1.0}
REFUSALS = {
    "a batch": (lambda: from_vllm([{}, {}], K), TypeError, r"answer is a list of 2; pass one of its items"),
    "another answer": (
        lambda: from_vllm({"meta_info": {}}, K),
        ValueError,
        "answer has meta_info; it must have choices",
    ),
    "an answer without what it names": (
        lambda: from_sglang({"meta_info": None, "text": "x"}, K),
        ValueError,
        "answer has text; it must have meta_info",
    ),
    "an object of another library": (
        lambda: from_trtllm(3, K),
        TypeError,
        r"answer is a int; it must be .* response.json\(\), with",
    ),
    "no prompt_logprobs": (
        lambda: from_vllm({"choices": [{"prompt_logprobs": None}]}, K),
        ValueError,
        "answer has no prompt_logprobs; ask the server for it: prompt_logprobs=4",
    ),
    "no logprobs": (lambda: from_openai({"choices": [{}]}, K), ValueError, "no logprobs; ask .* top_logprobs=K"),
    "a chat without top_logprobs": (
        lambda: from_openai({"choices": [{"logprobs": {"content": [{"token": "a"}]}}]}, K),
        ValueError,
        r"logprobs.content\[0\] has no top_logprobs",
    ),
    "a chat with top_logprobs=0": (
        lambda: from_openai({"choices": [{"logprobs": {"content": [{"token": "a", "top_logprobs": []}]}}]}, K),
        ValueError,
        r"logprobs.content\[0\] has no top_logprobs; ask the server for top_logprobs=K",
    ),
    "no choices": (lambda: from_vllm({"choices": []}, K), ValueError, "choices is .*at least one item"),
    "rows of another length": (
        lambda: from_openai({"choices": [{"logprobs": {"tokens": ["a"], "top_logprobs": []}}]}, K),
        ValueError,
        "has 0 rows for 1 tokens",
    ),
    "a row that is a list": (
        lambda: from_openai({"choices": [{"logprobs": {"tokens": ["a"], "top_logprobs": [["a"]]}}]}, K),
        ValueError,
        r"top_logprobs\[0\] is not a dict of tokens",
    ),
    "rows that are a dict": (lambda: from_vllm({"prompt_logprobs": {}}, K), ValueError, "prompt_logprobs is a dict"),
    "a row of words": (
        lambda: from_vllm({"prompt_logprobs": [None, {"a": {"logprob": -1.0}}]}, K),
        ValueError,
        r"prompt_logprobs\[1\] is not a dict of ids, each with a logprob",
    ),
    "a log-prob that is a word": (
        lambda: from_vllm({"prompt_logprobs": [None, {"1": {"logprob": "x"}}]}, 1),
        ValueError,
        "the log-probs of prompt_logprobs are not all numbers",
    ),
    "an id that is no int": (
        lambda: from_sglang(sglang([None, [[-1.0, 2.5, None]]]), 1),
        ValueError,
        "the ids of input_top_logprobs are not all ints",
    ),
    "an id beyond int32": (
        lambda: from_sglang(sglang([None, [[-1.0, 2**31, None]]]), 1),
        ValueError,
        "input_top_logprobs has the id 2147483648, which is no int32",
    ),
    "pairs of sglang": (lambda: from_sglang(sglang([None, [3]]), 1), ValueError, r"\[1\] is not a list of \[log-prob"),
    "pairs of tinker": (
        lambda: from_tinker({"topk_prompt_logprobs": [None, [3]]}, 1),
        ValueError,
        r"\[1\] is not a list of \(id, log-prob\)",
    ),
    "arrays of tinker": (
        lambda: from_tinker({"topk_prompt_logprobs_np": SimpleNamespace(token_ids=[1], logprobs=[1.0])}, 1),
        ValueError,
        r"arrays of torch.int64 of \(1,\) and torch.float32 of \(1,\); they must be ints and floats, \(T, K\) both",
    ),
    "bytes that are none": (
        lambda: from_openai({"choices": [{"logprobs": {"content": [{"top_logprobs": [WIDE]}]}}]}, 1, Words()),
        ValueError,
        r"logprobs.content\[0\] has the bytes \[300\]; they must be ints from 0 to 255",
    ),
    "a token that is a number": (
        lambda: from_openai({"choices": [{"logprobs": {"tokens": [1], "top_logprobs": [{1: -1.0}]}}]}, 1),
        ValueError,
        "has the token 1; it must be a string",
    ),
    "tokenizer": (lambda: from_openai(completion({"a": -1.0}), 1, "gpt2"), TypeError, "tokenizer is a str; it must be"),
    "k": (lambda: from_vllm({"prompt_logprobs": []}, 0), ValueError, "k is 0; it must be a positive int"),
    "part": (lambda: from_vllm({"prompt_logprobs": []}, 1, part="all"), ValueError, "part is 'all'; use one of prompt"),
    "start": (lambda: from_sglang({}, 1, start=-1), ValueError, "start is -1; it must be the position"),
    "at_least": (
        lambda: alignment(truth(), torch.zeros(5, dtype=torch.int64), at_least=0),
        ValueError,
        "at_least is 0; it must be a positive int",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    call, kind, message = REFUSALS[name]
    with pytest.raises(kind, match=message):
        call()


def test_an_id_far_below_0_is_no_other_id() -> None:
    answer = sglang([None, [[-1.0, 5 - 2**32, None], [-2.0, 7, None]]])
    assert from_sglang(answer, 2).ids[0].tolist() == [7, -1]


def text(length: int = 40) -> tuple[Support, torch.Tensor]:
    """A support that holds the next token at four of five positions, and others seldom."""
    ids = torch.randint(1000, (length,))
    slots = torch.randint(1000, (length, K))
    slots[:-1, 1] = torch.where(torch.arange(length - 1) % 5 > 0, ids[1:], slots[:-1, 1])
    return Support(slots.int(), torch.full((length, K), -2.0)), ids


def test_alignment_gives_the_share_per_shift() -> None:
    support, ids = text()
    shares = alignment(support, ids)
    assert shares[1] == pytest.approx(31 / 39, abs=0.03)
    assert shares[0] < 0.1 > shares[2]
    batch = alignment(Support.stack([support, support]), torch.stack([ids, ids]))
    assert batch == shares


def test_alignment_leaves_out_empty_positions_and_negative_ids() -> None:
    support, ids = text()
    shares = alignment(support, ids)
    padded = alignment(support.pad(50), torch.cat([ids, torch.zeros(10, dtype=torch.int64)]))
    assert padded[1] == pytest.approx(shares[1] * 39 / 40)  # the last of the text looks at the padding
    assert alignment(support.pad(50), torch.cat([ids, torch.full((10,), -100)])) == shares
    log_probs = support.log_probs.clone()
    log_probs[::2, 1] = -torch.inf  # the slot of the next token, at every other position
    assert alignment(Support(support.ids, log_probs), ids)[1] < 0.7 * shares[1]


@pytest.mark.parametrize(("shift", "moved"), [(0, lambda s: s.pad(41, side="left")[:-1]), (2, lambda s: s[1:].pad(40))])
def test_a_support_that_is_off_is_refused_with_the_slice_that_mends_it(shift: int, moved: Any) -> None:
    support, ids = text()
    support = support.without(torch.arange(40)[:, None] == torch.tensor([[0], [39]])[shift // 2].expand(40, K))
    with pytest.raises(ValueError, match=f"support speaks of the token {shift} positions after its own") as error:
        alignment(moved(support), ids)
    advice = str(error.value).partition("mend it with ")[2]
    mended = eval(advice, {"support": moved(support)})
    right = alignment(mended, ids)
    assert right[1] > 0.7
    assert mended.ids[1:-1].tolist() == support.ids[1:-1].tolist()


def test_the_support_of_another_text_is_refused() -> None:
    support, ids = text()
    with pytest.raises(ValueError, match="support holds no token of input_ids at any shift; pass the input_ids that"):
        alignment(support, ids + 1000)
    assert alignment(support, ids)[1] > 0.7


def test_too_few_positions_tell_nothing() -> None:
    support, ids = text(17)
    with pytest.raises(ValueError, match="support has 15 positions that count at a shift of 2, but at_least is 16"):
        alignment(support, ids)
    assert alignment(support, ids, at_least=15)[1] > 0.7
    with pytest.raises(ValueError, match=r"input_ids has shape \(16,\) and support positions \(17,\)"):
        alignment(support, ids[:16])


def test_the_page_has_code_that_runs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "servers.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page.partition("\n## Answers")[2].partition("\n## ")[0], re.M | re.S)
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(block, scope)
    answer = {"choices": [{"prompt_logprobs": vllm_rows()}, {"prompt_logprobs": vllm_rows()[:4]}]}
    batch = scope["of_batch"](answer, K)
    assert batch.shape == (2, 6)
    same(batch[0], prompt())
    same(batch[1], prompt()[:3].pad(6))
    placed = scope["of_response"](chat(K + 1), K, 1)
    same(placed, prompt())
    with pytest.raises(ValueError, match="support has 5 positions"):
        scope["distill"]({"prompt_logprobs": vllm_rows(32)}, torch.tensor(TOKENS), LOGITS)
    ids, rows = [int(LOG_PROBS[0].argmax())] * 40, [None, *[vllm_row(0, int(LOG_PROBS[0].argmax()), 32)] * 39]
    loss = scope["distill"]({"prompt_logprobs": rows}, torch.tensor(ids), LOGITS[:1].expand(40, -1))
    assert float(loss) == pytest.approx(0, abs=1e-6)
    loss = scope["distill"]({"prompt_logprobs": rows}, torch.tensor(ids), LOGITS[:1].expand(40, -1) * 0.5)
    by_row = topk_reverse_kl(LOGITS[:1] * 0.5, truth(slice(0, 1), 32))
    assert float(loss) == pytest.approx(float(by_row) * 39 / 40, rel=1e-5)  # an empty position has loss 0 and counts

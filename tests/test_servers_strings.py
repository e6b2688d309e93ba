"""Tokens that are strings: which of them name an id."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.server_answers import LOG_PROBS, TOKENS, K, Words, chat, completion, same, truth
from topk_rkl.servers import from_openai, from_vllm
from topk_rkl.servers.strings import bytes_of


def test_a_chat_that_lists_the_best_alone_is_whole() -> None:
    answer = chat(K)
    for t, entry in enumerate(answer["choices"][0]["logprobs"]["content"]):
        entry["top_logprobs"] = [
            {"token": f"token_id:{i}", "logprob": LOG_PROBS[t, i].item()} for i in LOG_PROBS[t].topk(K).indices.tolist()
        ]
    beyond = [TOKENS[t + 1] not in truth().ids[t] for t in range(5)]
    assert sum(beyond) >= 2
    same(from_openai(answer, K)[torch.tensor(beyond)], truth()[torch.tensor(beyond)])


def test_objects_of_the_openai_package_are_read_as_json_is() -> None:
    def objects_of(x: Any) -> Any:
        if isinstance(x, dict):
            return SimpleNamespace(**{name: objects_of(y) for name, y in x.items()})
        return [objects_of(y) for y in x] if isinstance(x, list) else x

    same(from_openai(objects_of(chat(K + 1)), K), truth())


def test_strings_of_one_id_are_read_through_the_tokenizer() -> None:
    found = from_openai(completion({"<|end|>": -0.6, "a": -1.0}), 2, Words())
    assert found.ids.tolist() == [[5, 0]]


@pytest.mark.parametrize("string", [" b", "", "\ufffd", "none"])
def test_a_string_of_no_or_several_ids_is_refused(string: str) -> None:
    answer = completion({"a": -0.9, string: -1.0})
    with pytest.raises(
        ValueError, match=rf"logprobs.top_logprobs\[0\] has the token {string!r}, which .* one id alone"
    ):
        from_openai(answer, 2, Words())
    found = from_openai(answer, 2, Words(), ambiguous="drop")
    assert found.ids.tolist() == [[0, -1]]
    assert found.log_probs[0, 0] == torch.tensor(-0.9) and found.log_probs[0, 1] == -math.inf


def test_an_empty_string_is_refused_even_where_one_id_has_it() -> None:
    words = Words()
    words.tokens = (*Words.tokens, "")
    with pytest.raises(ValueError, match="has the token '', which is not the string of one id alone"):
        from_openai(completion({"a": -0.9, "": -1.0}), 2, words)


def test_a_token_that_is_left_out_makes_no_room_for_a_worse_one() -> None:
    answer = {"choices": [{"logprobs": {"tokens": ["a"], "top_logprobs": [{" b": -0.5, "<|end|>": -2.0, "a": -3.0}]}}]}
    found = from_openai(answer, 2, Words(), ambiguous="drop")
    assert found.ids.tolist() == [[5, -1]]  # "a" is the third
    answer = completion({" b": -1.5, "none": -1.6, "<|end|>": -2.0, "a": -3.0})
    assert from_openai(answer, 3, Words(), ambiguous="drop").ids.tolist() == [[5, -1, -1]]


def test_bytes_name_a_part_of_a_character() -> None:
    entries = [
        {"token": "\ufffd", "bytes": [195], "logprob": -0.5},
        {"token": "\ufffd", "bytes": [169], "logprob": -1.0},
    ]
    answer = {"choices": [{"logprobs": {"content": [{**entries[0], "top_logprobs": entries}]}}]}
    assert from_openai(answer, 2, Words()).ids.tolist() == [[3, 4]]


def test_a_tokenizer_that_grows_is_read_again() -> None:
    words = Words()
    assert from_openai(completion({"a": -1.0}), 1, words).ids.tolist() == [[0]]
    words.tokens = (*Words.tokens, "new")
    assert from_openai(completion({"new": -1.0}), 1, words).ids.tolist() == [[6]]


def test_byte_fallback_names_a_byte() -> None:
    assert bytes_of(["<0xE2>", "Ġa", "▁a", "<s>"]) == [b"\xe2", b" a", None, b"<s>"]


def test_the_bytes_of_a_string_that_stands_for_others_are_no_bytes_of_a_token() -> None:
    words = Words()
    words.tokens = (*Words.tokens, "ï¿½")  # the character that others are replaced by is a token too
    entry = {"token": "\ufffd", "bytes": list("\ufffd".encode()), "logprob": -0.5}
    answer = {"choices": [{"logprobs": {"content": [{**entry, "top_logprobs": [entry]}]}}]}
    with pytest.raises(ValueError, match="is not the string of one id alone"):
        from_openai(answer, 1, words)


def test_strings_without_a_tokenizer_are_refused_with_what_to_ask() -> None:
    with pytest.raises(
        ValueError, match=r"\[0\] has the token 'a', a string; ask vLLM for return_tokens_as_token_ids=Tr"
    ):
        from_openai(completion({"a": -1.0}), 1)
    with pytest.raises(ValueError, match="return_tokens_as_token_ids=True"):
        from_vllm(completion({"a": -1.0}), 1, part="response")

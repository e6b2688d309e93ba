"""Answers that servers gave for SmolLM2, beside what the model itself says: vLLM 0.32.0, llama-cpp-python 0.3.36."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from topk_rkl import Support, teacher_topk, topk_reverse_kl
from topk_rkl.servers import alignment, from_llama_cpp, from_openai, from_vllm

FOLDER = Path(__file__).parent / "recorded"
VLLM, LLAMA = (json.loads((FOLDER / f"{name}.json").read_text()) for name in ("vllm", "llama"))
TEXT = [1, 4093, 198, 504, 3575, 282, 4649, 314, 7042, 30, 2, 198]
ATOL = 1e-4  # of log-probs in float32 by other kernels; 5.5e-5 was seen

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("smollm2")]


@torch.no_grad()
def truth(model: Any, ids: list[int], k: int) -> Support:
    return teacher_topk(model(torch.tensor([ids])).logits[0], k, normalize=True)


def same(found: Support, want: Support) -> None:
    assert found.ids.tolist() == want.ids.tolist()
    torch.testing.assert_close(found.log_probs, want.log_probs, rtol=0, atol=ATOL)


def is_empty(support: Support) -> bool:
    return bool((support.ids == -1).all() and (support.log_probs == -torch.inf).all())


def test_vllm_says_what_the_model_says_of_prompts(loaded: Any) -> None:
    model, _ = loaded
    for choice, ids in enumerate((TEXT, TEXT[:7])):
        found = from_vllm(VLLM["prompt_logprobs"], 8, choice=choice)
        same(found[:-1], truth(model, ids, 8)[:-1])
        assert is_empty(found[-1])
        assert alignment(found, torch.tensor(ids), at_least=3)[1] > 0.6
    ids = VLLM["chat_ids"]["prompt_token_ids"]
    found = from_vllm(VLLM["chat_ids"], 3)
    same(found[:-1], truth(model, ids, 3)[:-1])
    assert is_empty(found[-1])
    # One position late is another loss: the shift is no detail.
    student = model(torch.tensor([TEXT])).logits[0, :-1] * 0.7
    right = from_vllm(VLLM["prompt_logprobs"], 8, choice=0)
    assert topk_reverse_kl(student[1:], right[:-2]) > 3 * topk_reverse_kl(student, right[:-1])


def test_vllm_says_what_the_model_says_of_responses(loaded: Any) -> None:
    model, _ = loaded
    answer = VLLM["completions_ids"]
    response = answer["choices"][0]["token_ids"]
    found = from_vllm(answer, 5, part="response")
    same(found, truth(model, TEXT + response, 5)[len(TEXT) - 1 : -1])
    chat = VLLM["chat_ids"]["choices"][0]
    ids = VLLM["chat_ids"]["prompt_token_ids"] + chat["token_ids"]
    want = truth(model, ids, 5)[-1 - len(chat["token_ids"]) : -1]
    found = from_vllm(VLLM["chat_ids"], 5, part="response")
    pushed_out = found.ids[:, 4] == -1  # by a sampled token that is not among the best five
    assert pushed_out.tolist() == [True, False, False, False, True, False]
    same(found[~pushed_out], want[~pushed_out])
    same(from_vllm(VLLM["chat_ids"], 4, part="response"), want.each(lambda x: x[:, :4]))


def test_echoes_of_vllm_by_id_and_by_string_are_the_models(loaded: Any) -> None:
    model, tokenizer = loaded
    found = from_openai(VLLM["completions_echo_ids"], 5)  # the prompt and a token that was generated
    same(found[:-1], truth(model, TEXT, 5))
    assert len(found) == len(TEXT) + 1 and is_empty(found[-1])
    same(from_openai(VLLM["completions_echo"], 5, tokenizer), found)
    with pytest.raises(ValueError, match=r"logprobs.content\[0\] has the token '', which is not the string of one id"):
        from_openai(VLLM["chat"], 5, tokenizer)


def test_the_error_of_vllm_is_told() -> None:
    with pytest.raises(ValueError, match=r"greater than max allowed: 64.*start it with a larger --max-logprobs"):
        from_vllm(VLLM["prompt_logprobs_100"], 100)


def test_llama_cpp_says_nearly_what_the_model_says(loaded: Any) -> None:
    """The model has the weights of Q4_1 in float32; llama.cpp computes with 8-bit activations."""
    model, tokenizer = loaded
    ids = tokenizer("The capital of France is Paris.")["input_ids"]
    with pytest.raises(ValueError, match=r"\[6\] has the token '', which is not the string of one id alone"):
        from_llama_cpp(LLAMA["echo"], 8, tokenizer)
    found = from_llama_cpp(LLAMA["echo"], 8, tokenizer, ambiguous="drop")
    want = truth(model, ids, 8)
    assert is_empty(found[0])
    assert found.ids[1:, 0].tolist() == want.ids[1:, 0].tolist()
    common = (found.ids[1:, :, None] == want.ids[1:, None]) & (found.ids[1:, :, None] >= 0)
    assert common.sum() == 44  # of 47: the 48th is a special token, whose string is empty
    apart = (found.log_probs[1:, :, None] - want.log_probs[1:, None])[common].abs()
    assert apart.max() < 0.7 and apart.mean() < 0.15
    response = from_llama_cpp(LLAMA["gen"], 8, tokenizer, ambiguous="drop")
    assert response.ids[0].tolist() == found.ids[4].tolist()  # " is" is followed by the same tokens
    assert (response.ids >= 0).sum(-1).tolist() == [8, 8, 7, 8]
    chat = from_llama_cpp(LLAMA["chat"], 5, tokenizer, ambiguous="drop")
    assert tokenizer.decode(chat.ids[:3, 0].tolist()) == "Café"


def test_the_echo_of_llama_cpp_read_as_openais_is_found_and_mended(loaded: Any) -> None:
    _, tokenizer = loaded
    ids = torch.tensor(tokenizer("The capital of France is Paris.")["input_ids"])
    support = from_openai(LLAMA["echo"], 8, tokenizer, ambiguous="drop")
    with pytest.raises(ValueError, match="support speaks of the token 2 positions after its own") as error:
        alignment(support, ids, at_least=4)
    mended = eval(str(error.value).partition("mend it with ")[2], {"support": support})
    right = from_llama_cpp(LLAMA["echo"], 8, tokenizer, ambiguous="drop")
    assert mended.ids.equal(right.ids) and mended.log_probs.equal(right.log_probs)
    assert alignment(mended, ids, at_least=4)[1] == 1.0

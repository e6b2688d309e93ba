"""SGLang, TensorRT-LLM, Tinker and llama.cpp: the shapes of their answers, and their traps."""

import base64
import itertools
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from tests.server_answers import (
    LOG_PROBS,
    TOKENS,
    K,
    objects,
    prompt,
    same,
    sglang,
    triples,
    truth,
    vllm_row,
    vllm_rows,
)
from topk_rkl import Support
from topk_rkl.servers import from_llama_cpp, from_sglang, from_tinker, from_trtllm


def test_sglang_gives_rows() -> None:
    same(from_sglang(sglang([None, *triples(range(5))]), K), prompt())
    same(from_sglang({"meta_info": {"output_top_logprobs": triples(range(5))}}, K, part="response"), truth())


def test_sglang_may_begin_later() -> None:
    same(from_sglang(sglang([None, *triples(range(3, 5))]), K, start=3), prompt().pad(6)[3:].pad(6, side="left"))
    same(from_sglang(sglang(triples(range(2, 5))), K, start=3), prompt()[2:].pad(6, side="left"))  # row 0 is given


def flat(counted: bool, encoded: bool) -> dict[str, Any]:
    """As `return_flat_raw_top_logprobs` gives it; the rows of the shape count the null ones, or do not."""
    ids, log_probs = truth().tensors
    fields = {"shape": [5 + counted, K], "null_prefix": 1}
    if encoded:
        for kind, x in {"val": log_probs, "idx": ids}.items():
            fields[f"{kind}_flat_b64"] = base64.b64encode(x.numpy().tobytes()).decode()
            fields[f"{kind}_flat_b64_dtype"] = str(x.dtype).removeprefix("torch.")
    else:
        fields |= {"val_flat": log_probs.flatten().tolist(), "idx_flat": ids.flatten().tolist()}
    return {"meta_info": {f"input_top_logprobs_{name}": x for name, x in fields.items()}}


@pytest.mark.parametrize(("counted", "encoded"), list(itertools.product((False, True), repeat=2)))
def test_sglang_gives_flat_arrays(counted: bool, encoded: bool) -> None:
    same(from_sglang(flat(counted, encoded), K), prompt())
    same(from_sglang(flat(counted, encoded), 2), truth(k=2).pad(6))


def test_flat_arrays_of_another_size_are_refused() -> None:
    answer = flat(False, False)
    answer["meta_info"]["input_top_logprobs_val_flat"].pop()
    with pytest.raises(ValueError, match=r"input_top_logprobs_val_flat has 19 numbers.*shape is \[5, 4\]"):
        from_sglang(answer, K)
    answer = flat(False, False)
    answer["meta_info"]["input_top_logprobs_null_prefix"] = -1
    with pytest.raises(ValueError, match="input_top_logprobs_null_prefix -1; both must have a number per row and slot"):
        from_sglang(answer, K)
    answer = flat(False, True)
    answer["meta_info"]["input_top_logprobs_val_flat_b64_dtype"] = "float8"
    with pytest.raises(ValueError, match="input_top_logprobs_val_flat_b64_dtype is 'float8'; it must be float32"):
        from_sglang(answer, K)
    answer = flat(False, True)
    answer["meta_info"]["input_top_logprobs_idx_flat_b64"] = "AAA="
    with pytest.raises(ValueError, match="input_top_logprobs_idx_flat_b64 has 2 bytes; it must hold 4 per number"):
        from_sglang(answer, K)


def test_sglang_scores_chosen_ids() -> None:
    ids = [4, 9, 2]
    rows = [None, *([[LOG_PROBS[t, i].item(), i, None] for i in ids] for t in range(5))]
    found = from_sglang({"meta_info": {"input_token_ids_logprobs": rows}}, 3, scored=True)
    log_probs, order = LOG_PROBS[:5, ids].sort(descending=True)
    same(found, Support(torch.tensor(ids)[order].int(), log_probs).pad(6))


def test_rows_of_sglang_must_be_as_many_as_the_prompt_has_tokens() -> None:
    answer = sglang([None, *triples(range(3, 5))], prompt_tokens=6)
    with pytest.raises(ValueError, match="start is 0, and input_top_logprobs has 3 rows of a prompt of 6 tokens"):
        from_sglang(answer, K)
    assert len(from_sglang(answer, K, start=3)) == 6
    with pytest.raises(ValueError, match=r"has 0 rows of a prompt of 6 tokens; pass the .* logprob_start_len=0"):
        from_sglang(sglang([], prompt_tokens=6), K)
    same(from_sglang(sglang([None, *triples(range(5))], prompt_tokens=6), K), prompt())


def test_what_was_not_asked_of_sglang_is_named() -> None:
    with pytest.raises(ValueError, match=r"no input_top_logprobs; ask .* top_logprobs_num=4, logprob_start_len=0"):
        from_sglang({"meta_info": {}}, K)
    with pytest.raises(ValueError, match="k is 9, but no position of input_top_logprobs has more than 4"):
        from_sglang(sglang([None, *triples(range(5))]), 9)


def test_trtllm_speaks_of_the_next_token_already() -> None:
    rows = objects([vllm_row(t, int(LOG_PROBS[t].argmax())) for t in range(6)])
    want = truth(slice(0, 6))
    same(from_trtllm(SimpleNamespace(outputs=[SimpleNamespace(prompt_logprobs=rows)]), K), want)
    # Later versions add the actual token at the end of a row, where it is not among the best.
    rows = objects([dict(reversed(vllm_row(t, TOKENS[(t + 1) % 6]).items())) for t in range(6)])
    answer = SimpleNamespace(outputs=[SimpleNamespace(prompt_logprobs=rows)], prompt_token_ids=TOKENS)
    same(from_trtllm(answer, K), want)


def test_the_actual_token_of_trtllm_is_not_one_of_the_best() -> None:
    rows = objects([dict(reversed(row.items())) for row in vllm_rows()[1:]])
    answer = SimpleNamespace(outputs=[SimpleNamespace(prompt_logprobs=rows)], prompt_token_ids=TOKENS)
    same(from_trtllm(answer, K), truth())
    with pytest.raises(ValueError, match="k is 5, but no position of prompt_logprobs has more than 4"):
        from_trtllm(answer, K + 1)


def test_trtllm_gives_the_response() -> None:
    rows = objects(vllm_rows()[1:])
    answer = SimpleNamespace(outputs=[SimpleNamespace(logprobs=rows, token_ids=TOKENS[1:])])
    same(from_trtllm(answer, K, part="response"), truth())
    with pytest.raises(ValueError, match="k is 5, but no position of logprobs has more than 4"):
        from_trtllm(answer, K + 1, part="response")
    with pytest.raises(ValueError, match=r"logprobs\[0\] is not a dict of ids"):
        from_trtllm(SimpleNamespace(outputs=[SimpleNamespace(logprobs=[-0.5])]), K, part="response")


def test_tinker_gives_arrays_and_lists() -> None:
    ids, log_probs = (torch.cat([torch.full((1, K), x), y]) for x, y in zip((0, -99999.0), truth().tensors))
    arrays = SimpleNamespace(token_ids=ids.int().numpy(), logprobs=log_probs.numpy())
    same(from_tinker(SimpleNamespace(sequences=[], topk_prompt_logprobs_np=arrays), K), prompt())
    same(from_tinker({"topk_prompt_logprobs_np": vars(arrays)}, K), prompt())
    arrays.token_ids = arrays.token_ids.astype("float32")
    with pytest.raises(ValueError, match=r"arrays of torch.float32 of \(6, 4\) and torch.float32 .* ints and floats"):
        from_tinker(SimpleNamespace(topk_prompt_logprobs_np=arrays), K)
    pairs = [None, *(list(zip(*(x.tolist() for x in truth()[t].tensors))) for t in range(5))]
    same(from_tinker({"sequences": [], "topk_prompt_logprobs": pairs}, K), prompt())


def test_a_sentinel_of_tinker_is_not_the_token_0() -> None:
    arrays = SimpleNamespace(
        token_ids=numpy.array([[0, 0, 0], [0, 5, 0]], dtype="int32"),
        logprobs=numpy.array([[-99999.0] * 3, [-0.1, -3.0, -99999.0]], dtype="float32"),
    )
    found = from_tinker(SimpleNamespace(topk_prompt_logprobs_np=arrays), 2)
    assert found.ids.tolist() == [[0, 5], [-1, -1]]


def test_the_server_of_llama_cpp_gives_ids() -> None:
    def entry(t: int, i: int) -> dict[str, Any]:
        return {"id": i, "token": "same", "bytes": [9], "logprob": LOG_PROBS[t, i].item()}

    top = [LOG_PROBS[t].topk(K).indices.tolist() for t in range(5)]
    rows = [{**entry(t, TOKENS[t + 1]), "top_logprobs": [entry(t, i) for i in top[t]]} for t in range(5)]
    same(from_llama_cpp({"content": "", "completion_probabilities": rows}, K), truth())
    with pytest.raises(ValueError, match=r"completion_probabilities\[0\] has no top_logprobs; ask for n_probs=4 with"):
        from_llama_cpp({"completion_probabilities": [{"id": 3, "top_probs": []}]}, K)


def test_an_echo_of_llama_cpp_lacks_bos_tokens() -> None:
    """llama-cpp-python leaves a first BOS out of the tokens, and not the logits at it."""
    tokens = [f"token_id:{i}" for i in TOKENS[1:]]  # a prompt of 5 tokens, and one that was drawn
    top = [None, *({f"token_id:{i}": LOG_PROBS[t, i].item() for i in truth().ids[t].tolist()} for t in range(1, 5))]
    logprobs, usage = {"tokens": tokens, "top_logprobs": top}, {"prompt_tokens": 5, "completion_tokens": 1}
    answer = {"choices": [{"logprobs": logprobs}], "usage": usage}
    same(from_llama_cpp(answer, K), truth(slice(1, 5)).pad(5, side="left"))
    del tokens[2], top[2]  # as where it is BOS
    with pytest.raises(ValueError, match=r"answer has 4 rows for 5 tokens of the prompt and 1 of the response; .*BOS"):
        from_llama_cpp(answer, K)


def test_a_chat_of_llama_cpp_adds_the_sampled_token_to_the_best() -> None:
    def entry(t: int, i: int) -> dict[str, Any]:
        return {"token": f"token_id:{i}", "logprob": LOG_PROBS[t, i].item(), "bytes": None}

    content = []
    for t, drawn in enumerate([int(LOG_PROBS[0].topk(K).indices[-1]), *TOKENS[2:]]):
        listed = dict.fromkeys([*LOG_PROBS[t].topk(K).indices.tolist(), drawn])
        content.append({**entry(t, drawn), "top_logprobs": [entry(t, i) for i in listed]})
    same(from_llama_cpp({"choices": [{"logprobs": {"content": content}}]}, K), truth())

"""Answers of servers: the shapes they come in, and the traps, on answers made here."""

import base64
import io
import itertools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from topk_rkl import Support, topk_reverse_kl
from topk_rkl.servers import (
    alignment,
    from_llama_cpp,
    from_openai,
    from_sglang,
    from_tinker,
    from_trtllm,
    from_vllm,
    from_vllm_scores,
)
from topk_rkl.servers.strings import bytes_of

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


def test_both_apis_of_vllm_give_the_prompt() -> None:
    rows = vllm_rows()
    assert {len(row) for row in rows[1:]} == {K, K + 1}
    assert any(
        list(map(int, row))[:K] != truth().ids[t].tolist() for t, row in enumerate(rows[1:])
    )  # not in rank order
    same(from_vllm({"choices": [{"prompt_logprobs": rows}]}, K), prompt())
    same(from_vllm({"choices": [{"logprobs": None}], "prompt_logprobs": rows}, K), prompt())


def test_a_smaller_k_takes_the_best_of_what_was_given() -> None:
    same(from_vllm({"prompt_logprobs": vllm_rows()}, 2), truth(k=2).pad(6))


def test_the_objects_of_vllm_give_the_same() -> None:
    same(from_vllm(SimpleNamespace(prompt_logprobs=objects(vllm_rows()), outputs=[]), K), prompt())


def test_flat_log_probs_repeat_the_actual_token_but_no_slot_does() -> None:
    flat = Flat()
    for t in range(-1, 5):
        ids = [] if t < 0 else [TOKENS[t + 1], *LOG_PROBS[t].topk(K).indices.tolist()]
        flat.start_indices.append(len(flat.token_ids))
        flat.token_ids += ids
        flat.logprobs += LOG_PROBS[t, ids].tolist()
        flat.end_indices.append(len(flat.token_ids))
    assert any(len(set(flat.token_ids[a:b])) < b - a for a, b in zip(flat.start_indices, flat.end_indices))
    same(from_vllm(SimpleNamespace(prompt_logprobs=flat), K), prompt())


def test_several_choices_are_asked_for_one_by_one() -> None:
    answer = {"choices": [{"prompt_logprobs": vllm_rows()[:3]}, {"prompt_logprobs": vllm_rows()}]}
    with pytest.raises(ValueError, match="choice is None, but the answer has 2; pass one of 0 to 1"):
        from_vllm(answer, K)
    supports = [from_vllm(answer, K, choice=i) for i in range(2)]
    assert [len(x) for x in supports] == [3, 6]
    same(supports[1], prompt())
    with pytest.raises(ValueError, match="choice is 2; the answer has 2"):
        from_vllm(answer, K, choice=2)


def test_a_k_that_the_server_does_not_give_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k is 6, but no position of prompt_logprobs has more than 4 tokens; ask for "
                       r"prompt_logprobs=6, and start the server with --max-logprobs 6"):  # fmt: skip
        from_vllm({"prompt_logprobs": vllm_rows()}, 6)
    same(from_vllm({"prompt_logprobs": vllm_rows(6)}, 6), truth(k=6).pad(6))


def test_the_actual_token_is_not_the_fifth_best_where_four_were_asked_for() -> None:
    with pytest.raises(ValueError, match="k is 5, but no position of prompt_logprobs has more than 4 tokens"):
        from_vllm({"prompt_logprobs": vllm_rows()}, K + 1)
    rows = [vllm_row(0, 0), vllm_row(1, int(LOG_PROBS[1].topk(K).indices[-1]))]  # one row has K + 1 tokens, one K
    with pytest.raises(ValueError, match="k is 5, but no position of prompt_logprobs has more than 4 tokens"):
        from_vllm({"prompt_logprobs": [None, *rows]}, K + 1)


def test_a_single_row_whose_actual_token_is_the_last_is_whole() -> None:
    row = vllm_row(0, int(LOG_PROBS[0].topk(K).indices[-1]))
    assert len(row) == K
    same(from_vllm({"prompt_logprobs": [None, row]}, K), truth(slice(0, 1)).pad(2))


def test_a_position_of_fewer_tokens_has_empty_slots() -> None:
    rows = vllm_rows()
    rows[2] = dict(sorted(rows[2].items(), key=lambda x: -x[1]["logprob"])[:2])
    found = from_vllm({"prompt_logprobs": rows}, K)
    assert found.ids[1].tolist() == [*truth().ids[1, :2].tolist(), -1, -1]
    assert found.log_probs[1, 2:].tolist() == [-math.inf] * 2
    same(found[[0, 2, 3, 4]], truth()[[0, 2, 3, 4]])


@pytest.mark.parametrize("never", [-9999.0, -99999.0, -math.inf, -3.4028234663852886e38])
def test_a_number_that_stands_for_minus_infinity_makes_an_empty_slot(never: float) -> None:
    rows = [None, {"5": {"logprob": never}, "3": {"logprob": -0.1}, "8": {"logprob": -3.0}}]
    found = from_vllm({"prompt_logprobs": rows}, 3)
    assert found.ids.tolist() == [[3, 8, -1], [-1, -1, -1]]
    assert found.log_probs[0, 2] == -math.inf


def test_nan_is_refused_by_its_position() -> None:
    rows = vllm_rows()
    rows[3]["2"] = {"logprob": math.nan}
    with pytest.raises(ValueError, match=r"answer: prompt_logprobs\[3\] has a log-prob of NaN"):
        from_vllm({"prompt_logprobs": rows}, K)


def test_logits_are_not_log_probs() -> None:
    rows = [None, {str(i): {"logprob": LOGITS[0, i].item()} for i in range(8)}]
    with pytest.raises(
        ValueError, match=r"add up to more than 1, so its numbers are logits.*--logprobs-mode raw_logprobs"
    ):
        from_vllm({"prompt_logprobs": rows}, 8)


def test_equal_log_probs_are_in_the_order_of_their_ids() -> None:
    rows = [None, {str(i): {"logprob": -2.0} for i in (9, 2, 5, 30)}]
    assert from_vllm({"prompt_logprobs": rows}, 3).ids[0].tolist() == [2, 5, 9]


def test_rank_is_no_index() -> None:
    rows = vllm_rows()
    for row in rows[1:]:
        for x in row.values():
            x["rank"] = 1
    same(from_vllm({"prompt_logprobs": rows}, K), prompt())


@pytest.mark.parametrize("rows", [[], [None], [None, {}]])
def test_an_empty_prompt_has_empty_positions(rows: list[Any]) -> None:
    found = from_vllm({"prompt_logprobs": rows}, K)
    assert found.ids.tolist() == [[-1] * K] * len(rows)
    assert found.log_probs.tolist() == [[-math.inf] * K] * len(rows)


def test_tokens_that_were_drawn_have_the_log_probs_that_they_were_drawn_from() -> None:
    tokens = [f"token_id:{i}" for i in TOKENS[1:]]
    top = [{f"token_id:{i}": x["logprob"] for i, x in row.items()} for row in vllm_rows()[1:]]
    answer = {"choices": [{"logprobs": {"tokens": tokens, "top_logprobs": top}}]}
    same(from_vllm(answer, K, part="response"), truth())
    same(from_openai(answer, K), truth())
    outputs = [SimpleNamespace(logprobs=objects(vllm_rows()[1:]))]
    same(from_vllm(SimpleNamespace(prompt_logprobs=None, outputs=outputs), K, part="response"), truth())


def test_rows_of_a_response_are_placed_after_the_prompt() -> None:
    p, response = 4, truth(slice(3, 5))
    placed = response.pad(p - 1 + len(response), side="left").pad(p + len(response))
    assert placed.ids.tolist() == [[-1] * K] * 3 + response.ids.tolist() + [[-1] * K]


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


def test_a_chat_lets_the_sampled_token_push_out_the_last_one() -> None:
    found = from_vllm(chat(K), K, part="response")
    for row, want in zip(found.ids.tolist(), truth().ids.tolist()):
        assert row in (want, [*want[:-1], -1])  # never a token that is not among the best
    assert (found.ids == -1).any()
    same(from_vllm(chat(K + 1), K, part="response"), truth())  # the remedy
    same(from_openai(chat(K + 1), K), truth())


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


def scores(k: int = 3, dtype: type = numpy.float32) -> tuple[torch.Tensor, str]:
    ids = torch.stack([torch.randperm(40)[:k] for _ in range(3)])
    file = io.BytesIO()
    numpy.save(file, LOG_PROBS[2:5].gather(-1, ids).numpy().astype(dtype))
    return ids, base64.b64encode(file.getvalue()).decode()


def scored(ids: torch.Tensor) -> Support:
    log_probs, order = LOG_PROBS[2:5].gather(-1, ids).sort(descending=True)
    return Support(ids.gather(-1, order).int(), log_probs).pad(5, side="left").pad(6)


def test_scores_of_chosen_ids_stand_where_the_request_began() -> None:
    ids, text = scores()
    answer = {"choices": [], "prompt_token_id_logprobs": text}
    for given in (ids, ids.int(), ids.tolist(), ids.numpy(), ids.numpy().astype("int32")):
        same(from_vllm_scores(answer, given, start=2), scored(ids))
    array = LOG_PROBS[2:5].gather(-1, ids)
    for kind in (array, array.numpy()):
        same(from_vllm_scores(SimpleNamespace(prompt_token_id_logprobs=kind), ids, start=2), scored(ids))


def test_padding_of_chosen_ids_is_empty() -> None:
    answer = SimpleNamespace(prompt_token_id_logprobs=torch.tensor([[-1.0, -math.inf], [-3.0, -2.0]]))
    found = from_vllm_scores(answer, [[8], [4, 6]])
    assert found.ids.tolist() == [[8, -1], [6, 4], [-1, -1]]


def test_scores_of_other_ids_are_refused() -> None:
    ids, text = scores()
    with pytest.raises(ValueError, match=r"token_ids has shape \(2, 3\), but prompt_token_id_logprobs .* \(3, 3\)"):
        from_vllm_scores({"prompt_token_id_logprobs": text}, ids[:2])
    with pytest.raises(ValueError, match="prompt_token_id_logprobs is '!!'; it must be base64"):
        from_vllm_scores({"prompt_token_id_logprobs": "!!"}, ids)
    with pytest.raises(ValueError, match=r"prompt_token_id_logprobs is no \.npy file of numbers"):
        from_vllm_scores({"prompt_token_id_logprobs": "AAAA"}, ids)
    with pytest.raises(TypeError, match="token_ids holds what is no int"):
        from_vllm_scores({"prompt_token_id_logprobs": text}, [[1.5, 2, 3]] * 3)


def sglang(rows: list[Any], **more: Any) -> dict[str, Any]:
    return {"text": "", "meta_info": {"input_top_logprobs": rows, **more}}


def triples(positions: range, k: int = K) -> list[Any]:
    return [[[x, i, None] for x, i in zip(*(y.tolist() for y in LOG_PROBS[t].topk(k)))] for t in positions]


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


def test_a_npy_file_needs_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, text = scores()
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ModuleNotFoundError, match=r"prompt_token_id_logprobs is a \.npy file.*pip install numpy"):
        from_vllm_scores({"prompt_token_id_logprobs": text}, ids.tolist())


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


REFUSALS = {
    "a batch": (lambda: from_vllm([{}, {}], K), TypeError, r"answer is a list of 2; pass one of its items"),
    "another answer": (
        lambda: from_vllm({"meta_info": {}}, K),
        ValueError,
        "answer has meta_info; it must have choices",
    ),
    "an object of another library": (lambda: from_trtllm(3, K), TypeError, "answer is a int; it must be a decoded"),
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
        r"arrays of \(1,\) and \(1,\); both must be \(T, K\)",
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
        "at_least is 0; it must be at least 1",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    call, kind, message = REFUSALS[name]
    with pytest.raises(kind, match=message):
        call()


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

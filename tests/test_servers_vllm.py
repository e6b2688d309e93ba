"""vLLM: the shapes of its answers, and the traps that other servers share."""

import base64
import io
import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from tests.server_answers import (
    LOG_PROBS,
    LOGITS,
    TOKENS,
    Flat,
    K,
    chat,
    objects,
    prompt,
    same,
    truth,
    vllm_row,
    vllm_rows,
)
from topk_rkl import Support
from topk_rkl.servers import from_openai, from_vllm, from_vllm_scores


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
    with pytest.raises(ValueError, match="k is 5, but no position of prompt_logprobs has more than 4"):
        from_vllm(SimpleNamespace(prompt_logprobs=flat), K + 1)


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
    with pytest.raises(ValueError, match=r"k is 5, but no position of logprobs\.top_logprobs has more than 4"):
        from_openai(answer, K + 1)
    outputs = [SimpleNamespace(logprobs=objects(vllm_rows()[1:]))]
    same(from_vllm(SimpleNamespace(prompt_logprobs=None, outputs=outputs), K, part="response"), truth())


def test_an_echo_begins_with_the_prompt_and_moves() -> None:
    tokens = [f"token_id:{i}" for i in TOKENS]
    top = [row and {f"token_id:{i}": x["logprob"] for i, x in row.items()} for row in vllm_rows()]
    answer = {"choices": [{"logprobs": {"tokens": tokens, "top_logprobs": top}}]}
    with pytest.raises(ValueError, match=r"part is 'response', but .* an echo, .* read both by from_openai"):
        from_vllm(answer, K, part="response")
    same(from_openai(answer, K), prompt())


def test_a_chat_lets_the_sampled_token_push_out_the_last_one() -> None:
    found = from_vllm(chat(K), K, part="response")
    for row, want in zip(found.ids.tolist(), truth().ids.tolist()):
        assert row in (want, [*want[:-1], -1])  # never a token that is not among the best
    assert (found.ids == -1).any()
    same(from_vllm(chat(K + 1), K, part="response"), truth())  # the remedy
    same(from_openai(chat(K + 1), K), truth())


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
    for given in (ids, ids.int(), ids.tolist(), ids.numpy(), ids.numpy().astype("uint32")):
        same(from_vllm_scores(answer, given, start=2), scored(ids))
    array = LOG_PROBS[2:5].gather(-1, ids)
    for kind in (array, array.numpy(), numpy.frombuffer(array.numpy().tobytes(), "float32").reshape(3, 3)):
        same(from_vllm_scores(SimpleNamespace(prompt_token_id_logprobs=kind), ids, start=2), scored(ids))


@pytest.mark.parametrize("never", [-math.inf, 0.0, math.nan])
def test_padding_of_chosen_ids_is_empty(never: float) -> None:
    answer = SimpleNamespace(prompt_token_id_logprobs=torch.tensor([[-1.0, never], [-3.0, -2.0]]))
    found = from_vllm_scores(answer, [[8], [4, 6]])
    assert found.ids.tolist() == [[8, -1], [6, 4], [-1, -1]]
    answer.prompt_token_id_logprobs[1, 1] = never
    found = from_vllm_scores(answer, torch.tensor([[8, -1], [4, -1]]))  # no row is full
    assert found.ids.tolist() == [[8, -1], [4, -1], [-1, -1]]
    assert found.log_probs.tolist() == [[-1, -math.inf], [-3, -math.inf], [-math.inf] * 2]


def test_a_chosen_id_that_is_repeated_is_one_slot() -> None:
    answer = SimpleNamespace(prompt_token_id_logprobs=torch.tensor([[-0.5, -0.5], [-3.0, -3.0]]))
    found = from_vllm_scores(answer, [[8, 8], [4, 4]])
    assert found.ids.tolist() == [[8, -1], [4, -1], [-1, -1]]


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
    with pytest.raises(ValueError, match=r"prompt_token_id_logprobs is \[\[None\]\]; it must be an array of numbers"):
        from_vllm_scores({"prompt_token_id_logprobs": [[None]]}, [[1]])
    with pytest.raises(ValueError, match="has no prompt_token_id_logprobs; ask for prompt_logprob_token_ids, of"):
        from_vllm_scores({"choices": [], "prompt_token_id_logprobs": None}, [[1]])


def test_a_npy_file_needs_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, text = scores()
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ModuleNotFoundError, match=r"prompt_token_id_logprobs is a \.npy file.*pip install numpy"):
        from_vllm_scores({"prompt_token_id_logprobs": text}, ids.tolist())

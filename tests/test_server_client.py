"""A teacher behind a server is the teacher itself: clients of vLLM and SGLang against stand-ins over real sockets."""

import copy
import importlib
import json
import pickle
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import urllib3
from stand_in_servers import NAME, Answer, Fault, SGLangStandIn, StandIn, VLLMStandIn, serving, vllm_error
from tiny_models import K, V, collate, inputs_of, rows, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from topk_rkl.loss import Support, teacher_topk
from topk_rkl.servers.client import VLLM, ScoringError, Server, SGLang
from topk_rkl.store import Store
from topk_rkl.trainers.transformers import distill

TEACHER = tiny(seed=1, layers=2).eval()
PROMPTS = [row["input_ids"] for row in rows(6, seed=3)] + [[5]]
ROOT = Path(__file__).parent.parent
Make = Callable[..., Server]


@pytest.fixture(params=["vllm", "sglang"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[StandIn, Make]]:
    """A server, and what makes a client of it."""
    stand_in = (VLLMStandIn if request.param == "vllm" else SGLangStandIn)(TEACHER)
    with serving(stand_in) as server:
        yield server, lambda **options: client(request.param, server.url, **options)


@pytest.fixture
def vllm() -> Iterator[StandIn]:
    with serving(VLLMStandIn(TEACHER)) as server:
        yield server


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds between tries, which no test waits."""
    slept: list[float] = []
    monkeypatch.setattr(urllib3.Retry, "_sleep_backoff", lambda self: slept.append(self.get_backoff_time()))

    def after(self: urllib3.Retry, response: Any) -> bool:
        seconds = self.get_retry_after(response)
        if seconds is not None:
            slept.append(seconds)
        return seconds is not None

    monkeypatch.setattr(urllib3.Retry, "sleep_for_retry", after)
    return slept


def client(kind: str, url: str, **options: Any) -> Server:
    return VLLM(url, NAME, **options) if kind == "vllm" else SGLang(url, **options)


def truth(prompt: list[int], k: int = K) -> Support:
    """(T, K) of the model itself, the last position empty."""
    with torch.no_grad():
        logits = TEACHER(torch.tensor([prompt])).logits[0, :-1]
    return teacher_topk(logits, k, normalize=True).pad(len(prompt))


def assert_same(found: Support, want: Support) -> None:
    assert torch.equal(found.ids.long(), want.ids.long()) and found.normalized
    torch.testing.assert_close(found.log_probs, want.log_probs, atol=1e-5, rtol=0)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_score_is_the_top_k_of_the_model_in_the_order_of_the_prompts(pair: tuple[StandIn, Make]) -> None:
    server, make = pair
    server.delay = lambda prompt: 0.05 * (len(PROMPTS) - PROMPTS.index(prompt))  # the first answers last
    with make(concurrency=4) as teacher:
        found = teacher.score(PROMPTS, K)
    assert [x.shape for x in found] == [(len(prompt),) for prompt in PROMPTS]
    for support, prompt in zip(found, PROMPTS):
        assert_same(support, truth(prompt))
    assert 1 < server.most_under_way <= 4


def test_a_prompt_may_be_a_tensor_and_supports_make_a_batch(pair: tuple[StandIn, Make]) -> None:
    prompts = [torch.tensor(prompt) for prompt in PROMPTS[:3]]
    length = max(map(len, prompts))
    batch = Support.stack([x.pad(length) for x in pair[1]().score(prompts, 3)])
    assert batch.ids.shape == (3, length, 3)
    for i, prompt in enumerate(PROMPTS[:3]):
        assert_same(batch[i, : len(prompt)], truth(prompt, 3))
        assert (batch[i, len(prompt) :].ids == -1).all()


def test_a_prompt_of_two_tokens_has_k_slots_whichever_comes_second(pair: tuple[StandIn, Make]) -> None:
    best = truth([8, 9], 4).ids[0].tolist()
    prompts = [[8, token] for token in (*best, 3)]
    for support, prompt in zip(pair[1]().score(prompts, 4), prompts):
        assert_same(support, truth(prompt, 4))


def test_an_answer_that_vllm_gave_is_read(vllm: StandIn) -> None:
    answer = json.loads((ROOT / "tests/recorded/vllm.json").read_text())["prompt_logprobs"]
    answer["choices"] = answer["choices"][:1]  # of two prompts
    tokens = [next(iter(row)) for row in answer["choices"][0]["prompt_logprobs"][1:]]
    vllm.faults = [Fault((200, answer))]
    (found,) = VLLM(vllm.url, NAME).score([[1, *map(int, tokens)]], 8)
    assert found.ids[0, :3].tolist() == [29, 28, 198] and found.log_probs[0, 0] == pytest.approx(-0.98550, abs=1e-5)


def test_a_request_asks_for_raw_log_probs_of_the_whole_prompt(
    pair: tuple[StandIn, Make], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, make = pair
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")  # is not asked
    make(api_key="secret").score([[5, 6]], 2)
    path, body, headers = server.asked[0]
    if path == "/generate":
        assert body == {
            "input_ids": [5, 6], "sampling_params": {"max_new_tokens": 1, "temperature": 1.0}, "return_logprob": True,
            "logprob_start_len": 0, "top_logprobs_num": 2,
        }  # fmt: skip
    else:
        assert path == "/v1/completions"
        assert body == {"model": NAME, "prompt": [5, 6], "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 2}
    assert headers["Authorization"] == "Bearer secret"
    assert "secret" not in repr(make(api_key="secret"))


def test_given_ids_are_scored_by_the_model_in_their_order(pair: tuple[StandIn, Make]) -> None:
    server, make = pair
    torch.manual_seed(0)
    ids = [torch.stack([torch.randperm(V)[:5] for _ in prompt]) for prompt in PROMPTS]
    ids[0][2, 1:3] = -1
    ids[2][:, 1], ids[2][:, 3] = -1, ids[2][:, 0]  # no row is full, and one id is asked for twice
    ids[1][:] = -1
    found = make().score_ids(PROMPTS, ids)
    for support, prompt, asked in zip(found, PROMPTS, ids):
        with torch.no_grad():
            log_probs = TEACHER(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        want = Support(asked[:-1], log_probs.gather(-1, asked[:-1].clamp_min(0))).without(asked[:-1] < 0)
        assert_same(support, want.pad(len(prompt)))
    assert len(server.asked) == len(PROMPTS) - 2  # neither the one without an id nor the one of a single token


def test_the_ids_of_a_request_are_those_that_the_servers_take(pair: tuple[StandIn, Make]) -> None:
    server, make = pair
    make().score_ids([[5, 6, 7]], [torch.tensor([[-1, 4, 9], [-7, 4, 4], [1, 1, 1]])])
    path, body, _ = server.asked[0]
    if path == "/generate":
        assert body["token_ids_logprob"] == [4, 9] and "top_logprobs_num" not in body
    else:
        assert path == "/inference/v1/generate" and body["token_ids"] == [5, 6, 7]
        assert body["sampling_params"] == {
            "max_tokens": 1, "temperature": 1.0, "detokenize": False, "prompt_logprob_start": 0,
            "prompt_logprob_token_ids": [[9, 4], [4, -1]],  # as few columns as hold the different ids
        }  # fmt: skip


def test_vllm_without_scores_of_ids_is_told_how_to_start(vllm: StandIn) -> None:
    teacher, ids = VLLM(vllm.url, NAME, concurrency=1), [torch.tensor([[9], [4]])]
    vllm.faults = [Fault((200, {"request_id": "1", "choices": []})), Fault((404, {"detail": "Not Found"}))]
    with pytest.raises(ScoringError, match=r"prompt_token_id_logprobs; .* vLLM 0.32 .*VLLM_USE_V2_MODEL_RUNNER=1"):
        teacher.score_ids([[5, 6]], ids)
    with pytest.raises(ScoringError, match=r"/inference/v1/generate answered 404: Not Found.* 0.32 or later"):
        teacher.score_ids([[5, 6]], ids)


@pytest.mark.parametrize("end", ["/", "/v1", "/v1/"])
@pytest.mark.parametrize("kind", [VLLMStandIn, SGLangStandIn])
def test_a_url_may_end_as_clients_of_openai_want_it(kind: type[StandIn], end: str) -> None:
    with serving(kind(TEACHER)) as server:
        teacher = client("vllm" if kind is VLLMStandIn else "sglang", server.url + end)
        assert_same(teacher.score([[5, 6]], 3)[0], truth([5, 6], 3))


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_teacher_of_a_step_is_the_local_one(pair: tuple[StandIn, Make], side: str) -> None:
    batch = collate(rows(4))
    if side == "left":
        shifts = [int((row == 0).sum()) for row in batch["attention_mask"]]
        batch = {name: torch.stack([row.roll(n) for row, n in zip(x, shifts)]) for name, x in batch.items()}
    losses, gradients = [], []
    for teacher, k in ((pair[1]().teacher(K), None), (copy.deepcopy(TEACHER), K)):
        student = tiny().train()
        loss = distill(student, teacher, k=k)
        losses.append(loss(student(**inputs_of(batch)), batch["labels"]))
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert losses[0] > 0.1


@pytest.mark.parametrize("mask", [torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 1, 1], [0, 1, 1]]), None])
def test_a_batch_is_empty_at_padding_and_after_the_last_token(vllm: StandIn, mask: Tensor | None) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 30, 11]])
    inputs = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    found = VLLM(vllm.url, NAME).teacher(4)(inputs)
    assert found.ids.shape == found.log_probs.shape == (2, 3, 4)
    kept = torch.ones(2, 3, dtype=torch.bool) if mask is None else mask.bool()
    for row in range(2):
        assert_same(found[row][kept[row]], truth(ids[row][kept[row]].tolist(), 4))
    assert (found.ids[~kept] == -1).all() and (found.log_probs[~kept] == -torch.inf).all()


def test_a_busy_server_is_asked_again(pair: tuple[StandIn, Make], waits: list[float]) -> None:
    server, make = pair
    server.faults = [Fault((503, "starting")), Fault((503, "starting"))]
    (found,) = make().score([[5, 6, 7]], 4)
    assert_same(found, truth([5, 6, 7], 4))
    assert len(server.asked) == 3 and waits == [0, 1]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_passing_status_is_told_after_the_last_try(vllm: StandIn, status: int) -> None:
    vllm.faults = [Fault((status, {"error": {"message": "queue full"}}))] * 3
    with pytest.raises(ScoringError, match=rf"answered {status}: queue full; .*raise retries where the server is busy"):
        VLLM(vllm.url, NAME, retries=2).score([[5, 6]], 4)
    assert len(vllm.asked) == 3


def test_the_advice_of_more_retries_helps(vllm: StandIn) -> None:
    vllm.faults = [Fault((503, "busy"))] * 3
    assert_same(VLLM(vllm.url, NAME, retries=3).score([[5, 6]], 4)[0], truth([5, 6], 4))


def test_a_wait_that_the_server_asks_for_is_kept(vllm: StandIn, waits: list[float]) -> None:
    vllm.faults = [Fault((429, "slow down"), {"Retry-After": "17"})]
    assert_same(VLLM(vllm.url, NAME).score([[5, 6]], 4)[0], truth([5, 6], 4))
    assert waits == [17] and len(vllm.asked) == 2


def test_a_body_that_breaks_off_is_asked_for_again(pair: tuple[StandIn, Make]) -> None:
    server, make = pair
    server.faults = [Fault(cut=True)]
    assert_same(make().score([[5, 6, 7]], 4)[0], truth([5, 6, 7], 4))
    assert len(server.asked) == 2
    server.faults = [Fault(cut=True)] * 2
    with pytest.raises(ScoringError, match=r"gave no whole answer: .*raise retries or timeout"):
        make(retries=1).score([[5, 6, 7]], 4)


def test_a_slow_answer_is_given_up(vllm: StandIn) -> None:
    vllm.delay = lambda _: 2.0
    with pytest.raises(ScoringError, match=r"gave no whole answer: .*timed out.*raise retries or timeout"):
        VLLM(vllm.url, NAME, timeout=0.05, retries=1).score([[5, 6]], 4)
    assert len(vllm.asked) == 2
    vllm.delay = lambda _: 0.1
    assert len(VLLM(vllm.url, NAME, timeout=30).score([[5, 6]], 4)) == 1


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_that_is_away_is_named(kind: str, waits: list[float]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        ScoringError, match=rf"prompt 0 of \w+\('{url}'\): .*refused.*see that the server runs"
    ) as caught:
        client(kind, url, retries=9).score([[5, 6]], 4)
    assert waits == [0, 1, 2, 4, 8, 16, 32, 64, 120] and caught.value.done == {} and caught.value.index == 0
    assert pickle.loads(pickle.dumps(caught.value)).index == 0


def test_a_refusal_is_told_in_the_servers_words_and_not_repeated(vllm: StandIn) -> None:
    with pytest.raises(ScoringError) as caught:
        VLLM(vllm.url, NAME, concurrency=1).score(PROMPTS, 64)
    assert str(caught.value) == (
        f"prompt 0 of VLLM('{vllm.url}'): /v1/completions answered 400: Requested prompt logprobs of 64, which is "
        "greater than max allowed: 20 (parameter=prompt_logprobs, value=64); start the server with --max-logprobs 64, "
        "or ask for fewer"
    )
    assert len(vllm.asked) <= 2  # the next may be under way when the first fails
    vllm.faults = [
        Fault(vllm_error(400, "invalid", "requested prompt_logprobs of 21, which is greater than max allowed: 20"))
    ]
    with pytest.raises(ScoringError, match=r"400: requested .* with --max-logprobs 21, or ask"):  # by its Rust frontend
        VLLM(vllm.url, NAME).score([[5, 6]], 21)
    with pytest.raises(ScoringError, match=r"answered 400: Requested 21 token ids .*with --max-logprobs 21, or ask"):
        VLLM(vllm.url, NAME).score_ids([[5, 6]], [torch.arange(21).expand(2, 21)])
    assert VLLM(vllm.url, NAME).score([[5, 6]], 20)[0].ids.min(-1).values[0] >= 0
    assert VLLM(vllm.url, NAME).score_ids([[5, 6]], [torch.arange(20).expand(2, 20)])[0].ids[0, 19] == 19


def test_answers_that_came_are_not_lost(pair: tuple[StandIn, Make]) -> None:
    server, make = pair
    server.faults = [Fault(), Fault(), Fault((400, {"error": {"message": "prompt too long"}}))]
    with pytest.raises(
        ScoringError, match=r"prompt 2 of .*answered 400: prompt too long; change what it names"
    ) as caught:
        make(concurrency=1).score(PROMPTS, K)
    done = caught.value.done
    assert caught.value.index == 2 and {0, 1} <= done.keys() and 2 not in done
    rest = [i for i in range(len(PROMPTS)) if i not in done]
    done |= zip(rest, make().score([PROMPTS[i] for i in rest], K))
    for i, prompt in enumerate(PROMPTS):
        assert_same(done[i], truth(prompt))


def test_a_model_of_another_name_is_told(vllm: StandIn) -> None:
    message = r"404: The model `other` does not exist; model is 'other'; pass a name that http.*/v1/models lists"
    with pytest.raises(ScoringError, match=message):
        VLLM(vllm.url, "other").score([[5, 6]], 4)


def test_another_kind_of_server_is_told() -> None:
    with serving(VLLMStandIn(TEACHER)) as server, pytest.raises(ScoringError, match=r"404.*VLLM\(url, model\)"):
        SGLang(server.url).score([[5, 6]], 4)
    with serving(SGLangStandIn(TEACHER)) as server, pytest.raises(ScoringError, match=r"404.*SGLang\(url\)"):
        VLLM(server.url, NAME).score([[5, 6]], 4)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {"error": "Unauthorized"}), "answered 401: Unauthorized; pass api_key"),
        ((403, ""), "answered 403: nothing; pass an api_key that may use this server"),
        ((413, "<html>Too Large</html>"), "answered 413: <html>Too Large</html>; score shorter prompts"),
        ((422, {"detail": [{"msg": "bad"}]}), r"answered 422: \[{'msg': 'bad'}\]; change what it names"),
        ((200, "<html>welcome"), "answered b'<html>welcome', which is not JSON; see that url is that of the server"),
        ((200, {"choices": []}), "must"),
        ((200, {"id": "1"}), "must have choices or outputs or prompt_logprobs"),
        ((200, [1]), "answer is a list"),
    ],
)
def test_an_answer_that_is_none_is_told(vllm: StandIn, answer: Answer, message: str) -> None:
    vllm.faults = [Fault(answer)]
    with pytest.raises(ScoringError, match=rf"prompt 0 of VLLM.*{message}"):
        VLLM(vllm.url, NAME).score([[5, 6]], 4)


def test_a_redirection_is_told_and_not_followed(vllm: StandIn) -> None:
    vllm.faults = [Fault((307, ""), {"Location": vllm.url + "/elsewhere"})]
    with pytest.raises(ScoringError, match=rf"answered 307: {vllm.url}/elsewhere; pass the url to which it leads"):
        VLLM(vllm.url, NAME, api_key="secret").score([[5, 6]], 4)
    assert len(vllm.asked) == 1


def test_another_number_of_positions_is_refused(pair: tuple[StandIn, Make]) -> None:
    server, make = pair
    server.cut = 1
    with pytest.raises(
        ScoringError, match="answered for 3 positions, but the prompt has 4 tokens; see that it neither"
    ):
        make().score([[5, 6, 7, 8]], 4)


def test_progress_is_shown_where_asked(vllm: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    VLLM(vllm.url, NAME).score(PROMPTS, 4)
    assert capsys.readouterr().err == ""
    VLLM(vllm.url, NAME, progress=True).score(PROMPTS, 4)
    assert f"{len(PROMPTS)}/{len(PROMPTS)}" in capsys.readouterr().err


def test_a_connection_stays_open_for_the_next_call_until_the_client_is_closed(vllm: StandIn) -> None:
    with VLLM(vllm.url, NAME) as teacher:
        teacher.score([[5, 6]], 4)
        teacher.score([[5, 6]], 4)
        assert vllm.connections == 1
    assert_same(teacher.score([[5, 6]], 4)[0], truth([5, 6], 4))
    assert vllm.connections == 2


X = torch.tensor([[1, 2], [3, 4]])
REFUSALS: dict[str, tuple[Callable[[Server], object], type[Exception], str]] = {
    "prompts in a tensor": (
        lambda x: x.score(X, 4),
        TypeError,
        "input_ids is a torch.Tensor; it must be a list of prom",
    ),
    "no prompts": (lambda x: x.score([], 4), ValueError, "input_ids is empty"),
    "one prompt": (
        lambda x: x.score([1, 2], 4),
        TypeError,
        r"input_ids\[0\] is 1; .* a single prompt is \[\[1, 2, 3\]\]",
    ),
    "an empty prompt": (lambda x: x.score([[1], []], 4), ValueError, r"input_ids\[1\] is empty; a prompt must have"),
    "padding": (lambda x: x.score([[1, -100]], 4), ValueError, r"input_ids\[0\] has the id -100; leave out padding"),
    "text": (lambda x: x.score(["text"], 4), TypeError, r"input_ids\[0\] is 'text'"),
    "floats": (lambda x: x.score([torch.ones(2)], 4), TypeError, r"input_ids\[0\] is torch.float32; use one of int32"),
    "a batch as prompt": (
        lambda x: x.score([X], 4),
        ValueError,
        r"input_ids\[0\] has shape \(2, 2\); it must be \(T,\)",
    ),
    "k 0": (lambda x: x.score([[1]], 0), ValueError, "k is 0; it must be a positive int"),
    "k None": (lambda x: x.teacher(None), TypeError, "k is None; it must be an int"),
    "fewer ids": (lambda x: x.score_ids([[1], [2]], [X]), ValueError, "ids has 1 tensors and input_ids 2 prompts"),
    "ids of other positions": (
        lambda x: x.score_ids([[1]], [X]),
        ValueError,
        r"ids\[0\] has shape \(2, 2\) .*\(1, K\)",
    ),
    "ids without slots": (lambda x: x.score_ids([[1]], [X[:1, :0]]), ValueError, r"ids\[0\] has shape \(1, 0\)"),
    "ids in lists": (lambda x: x.score_ids([[1]], [[1]]), TypeError, r"ids\[0\] is a list; it must be a torch.Tensor"),
    "a packed batch": (
        lambda x: x.teacher(4)({"input_ids": X, "position_ids": X}),
        ValueError,
        "the batch has position_ids, which a server of token ids does not read; pad rows instead of packing them",
    ),
    "a mask of other rows": (
        lambda x: x.teacher(4)({"input_ids": X, "attention_mask": X[:1]}),
        ValueError,
        r"input_ids has shape \(2, 2\) and attention_mask \(1, 2\); both must be \(B, T\)",
    ),
    "a row of padding": (
        lambda x: x.teacher(4)({"input_ids": X, "attention_mask": torch.tensor([[1, 1], [0, 0]])}),
        ValueError,
        "attention_mask has no token in row 1; drop such rows",
    ),
    "a row with a gap": (
        lambda x: x.teacher(4)({"input_ids": X[:, [0, 0, 1]], "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 1]])}),
        ValueError,
        "attention_mask has padding within row 1; a server reads tokens without a gap",
    ),
    "a mask of packed rows": (
        lambda x: x.teacher(4)({"input_ids": X, "attention_mask": torch.tensor([[1, 2], [1, 1]])}),
        ValueError,
        "attention_mask has the value 2, as packed rows have; pad rows instead of packing them",
    ),
    "a batch without tokens": (lambda x: x.teacher(4)({"labels": X}), TypeError, "input_ids is a NoneType; it must be"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_errors(name: str, vllm: StandIn) -> None:
    call, kind, message = REFUSALS[name]
    with pytest.raises(kind, match=message):
        call(VLLM(vllm.url, NAME))
    assert vllm.asked == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url is 'localhost:8000'; it must begin with http:// or https://"),
        ({"url": "http:///v1"}, "name a host"),
        ({"model": ""}, "model is ''; it must be a str"),
        ({"concurrency": 0}, "concurrency is 0; it must be a positive int"),
        ({"concurrency": 2000}, "concurrency is 2000; it must be at most 1024"),
        ({"timeout": 1e30}, "timeout is 1e.30; it must be at most 9223372036 seconds"),
        ({"retries": -1}, "retries is -1; it must not be negative"),
        ({"retries": 1.5}, "retries is 1.5; it must be an int"),
        ({"timeout": 0}, "timeout is 0; it must be positive"),
        ({"api_key": 7}, "api_key is 7; it must be a str"),
        ({"progress": 1}, "progress is 1; it must be True or False"),
    ],
)
def test_options_are_refused_by_their_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        VLLM(**{"url": "http://localhost:8000", "model": NAME} | options)


@pytest.mark.parametrize("missing", ["tqdm", "urllib3"])
def test_a_missing_package_is_told_with_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("client", "http"):
        monkeypatch.delitem(sys.modules, f"topk_rkl.servers.{name}")
    monkeypatch.setitem(sys.modules, missing, None)
    wanted = rf"topk_rkl.servers.client needs {missing}.*; pip install 'topk-rkl\[servers\]'"
    with pytest.raises(ModuleNotFoundError, match=wanted):
        importlib.import_module("topk_rkl.servers.client")


@pytest.mark.slow
def test_the_lines_of_the_page_run(vllm: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs/servers.md").read_text().partition("## The client\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    student = tiny()
    before = [p.clone() for p in student.parameters()]
    scope = {"student": student, "data": rows(4), "collate": collate, "prompts": PROMPTS, "torch": torch}
    scope["tokenizer"] = Tokenizer(WordLevel({"yes": 0, "no": 1}))
    for block in blocks:
        replaced = {"http://localhost:8000": vllm.url, "Qwen/Qwen3-32B": NAME, "k=32": f"k={K}"}
        for printed, here in replaced.items():
            block = block.replace(printed, here)
        exec(block, scope)
    assert len(blocks) == 5 and scope["missing"] == []
    assert any(not torch.equal(*x) for x in zip(before, student.parameters()))
    stored = Store("store")
    for i, prompt in enumerate(PROMPTS):
        assert_same(scope["batch"][i, : len(prompt)], truth(prompt))
        assert stored[i].input_ids.tolist() == prompt and torch.equal(stored[i].support.ids, truth(prompt).ids)
        assert torch.equal(scope["supports"][i].ids[:-1], scope["ids"][i][:-1])

"""Servers over real sockets that answer as vLLM and SGLang do, from a tiny model, and fail when told to."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel

MAX_LOGPROBS = 20  # of vLLM, by default
NAME = "tiny"
Answer = tuple[int, Any]  # status, and JSON


@dataclass
class Fault:
    """What is wrong with an answer."""

    answer: Answer | None = None  # instead of the true one
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False  # breaks the connection within the body


class StandIn(ThreadingHTTPServer):
    """A server that keeps what it was asked. Each of `faults` is that of one request."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model.eval()
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []  # path, body, headers
        self.faults: list[Fault] = []
        self.delay: Callable[[list[int]], float] = lambda _: 0.0  # seconds, of a prompt
        self.cut = 0  # tokens that the server drops from a prompt
        self.connections = 0
        self.under_way = self.most_under_way = 0  # requests
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        yield
        with self.lock:
            self.under_way -= 1

    def log_probs(self, prompt: list[int]) -> Tensor:  # (T - 1, V): of the tokens after the first
        time.sleep(self.delay(prompt))
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt[self.cut :]])).logits[0, :-1]
        return logits.log_softmax(-1)

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        raise NotImplementedError


class VLLMStandIn(StandIn):
    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        if path not in ("/v1/completions", "/inference/v1/generate"):
            return 404, {"detail": "Not Found"}
        if body["model"] != NAME:
            return vllm_error(404, "NotFoundError", f"The model `{body['model']}` does not exist.")
        return self.scores(body) if "token_ids" in body else self.completion(body)

    def completion(self, body: dict[str, Any]) -> Answer:
        k, prompt = body["prompt_logprobs"], body["prompt"]
        if k > MAX_LOGPROBS:
            words = f"Requested prompt logprobs of {k}, which is greater than max allowed: {MAX_LOGPROBS}"
            return vllm_error(400, "BadRequestError", f"{words} (parameter=prompt_logprobs, value={k})")
        rows = [None, *(vllm_row(row, token, k) for row, token in zip(self.log_probs(prompt), prompt[self.cut + 1 :]))]
        choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length", "prompt_logprobs": rows}
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": NAME, "choices": [choice]}

    def scores(self, body: dict[str, Any]) -> Answer:
        sampling, prompt = body["sampling_params"], body["token_ids"]
        ids = torch.tensor(sampling["prompt_logprob_token_ids"])
        if ids.shape[1] > MAX_LOGPROBS:
            words = f"Requested {ids.shape[1]} token ids per row in prompt_logprob_token_ids, which is greater than max"
            more = f"Set max_logprobs (--max-logprobs) to at least {ids.shape[1]}."
            return vllm_error(400, "BadRequestError", f"{words} allowed: {MAX_LOGPROBS}. {more}")
        assert len(ids) == len(prompt) - 1 - sampling["prompt_logprob_start"]
        found = self.log_probs(prompt).gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
        file = io.BytesIO()
        numpy.save(file, found.numpy())
        encoded = base64.b64encode(file.getvalue()).decode()
        return 200, {"request_id": "1", "choices": [], "prompt_logprobs": None, "prompt_token_id_logprobs": encoded}


class SGLangStandIn(StandIn):
    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        if path != "/generate":
            return 404, {"detail": "Not Found"}
        prompt = body["input_ids"]
        rows = self.log_probs(prompt)
        tokens = [[None, prompt[0], None], *([float(row[i]), i, None] for row, i in zip(rows, prompt[1:]))]
        meta: dict[str, Any] = {"id": "1", "prompt_tokens": len(prompt) - self.cut, "input_token_logprobs": tokens}
        if body.get("top_logprobs_num"):
            best = (row.topk(body["top_logprobs_num"]) for row in rows)
            meta["input_top_logprobs"] = [None, *(sglang_row(x.values, x.indices) for x in best)]
        if body.get("token_ids_logprob"):
            ids = torch.tensor(body["token_ids_logprob"])
            meta["input_token_ids_logprobs"] = [None, *(sglang_row(row[ids], ids) for row in rows)]
        return 200, {"text": "x", "output_ids": [3], "meta_info": meta}


def vllm_row(
    row: Tensor,  # (V,)
    token: int,
    k: int,
) -> dict[str, Any]:
    """The token itself, then the K best: K or K + 1 entries."""
    order = row.argsort(descending=True).tolist()
    return {
        str(i): {"logprob": float(row[i]), "rank": 1 + order.index(i), "decoded_token": f"<{i}>"}
        for i in dict.fromkeys([token, *order[:k]])
    }


def vllm_error(status: int, kind: str, words: str) -> Answer:
    return status, {"error": {"message": words, "type": kind, "param": None, "code": status}}


def sglang_row(
    values: Tensor,  # (K,)
    ids: Tensor,  # (K,)
) -> list[list[Any]]:
    return [[value, i, None] for value, i in zip(values.tolist(), ids.tolist())]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, dict(self.headers)))
        fault = self.server.faults.pop(0) if self.server.faults else Fault()
        with self.server.counted():
            status, content = fault.answer or self.server.answer(self.path, body)
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**fault.headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(BrokenPipeError):  # of a client that gave up
            self.wfile.write(data[: len(data) // 2] if fault.cut else data)
        self.close_connection = fault.cut

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(server: StandIn) -> Iterator[StandIn]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

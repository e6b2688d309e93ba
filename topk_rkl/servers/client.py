"""Teachers behind vLLM and SGLang: the K best tokens after each token of a prompt, asked of a server over HTTP.

with VLLM("http://localhost:8000", "Qwen/Qwen3-32B") as server:
    supports = server.score(prompts, k=32)
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.servers.prompts import (
    packed,
    require_batch,
    require_ids,
    require_prompts,
    taken,
)
from topk_rkl.servers.sglang import from_sglang
from topk_rkl.servers.vllm import from_vllm, from_vllm_scores
from topk_rkl.support import Support

try:
    from tqdm import tqdm

    from topk_rkl.servers.http import Http, require_word
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"topk_rkl.servers.client needs {error.name}, which is not installed; pip install 'topk-rkl[servers]'",
        name=error.name,
    ) from error

__all__ = ["VLLM", "SGLang", "ScoringError", "Server"]

MOST_THREADS = 1024


class ScoringError(RuntimeError):
    """A prompt was not scored. No further prompt is asked for, and the answers that came are not lost.

    `index` is the prompt's place in `input_ids`. `done` has the supports of the prompts that were scored, by place.
    """

    def __init__(self, message: str, index: int = 0) -> None:  # a pickled error is made of its message alone
        super().__init__(message)
        self.index = index
        self.done: dict[int, Support] = {}


class Server(ABC):
    """What `VLLM` and `SGLang` have in common.

    A request has one prompt, and the server makes batches of the requests that are under way. A request is tried again
    where the connection fails or breaks, and at the statuses 429, 500, 502, 503 and 504; Retry-After is respected.
    Proxies that the environment names are not used. Connections stay open for the next call, up to `close` or the end
    of a `with` block.

    Args:
        url: of the server, such as "http://localhost:8000", with or without "/v1".
        concurrency: how many requests are under way at once.
        retries: how often a request is tried again: after 0, 1, 2, 4, ... seconds, 120 at most.
        timeout: seconds that the server may take for an answer.
        api_key: the bearer token, where the server wants one.
        progress: shows a bar of the prompts.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self,
        url: str,
        *,
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 600.0,
        api_key: str | None = None,
        progress: bool = False,
    ) -> None:
        self.concurrency = checks.require_positive_integer("concurrency", concurrency)
        if self.concurrency > MOST_THREADS:
            raise ValueError(f"concurrency is {concurrency}; it must be at most {MOST_THREADS}, a thread per request")
        checks.require_flag("progress", progress)
        self.progress = progress
        self._http = Http(url, self.concurrency, retries, timeout, api_key)

    def score(self, input_ids: Sequence[Sequence[int]], k: int) -> list[Support]:
        """The K best tokens after each token of the prompts.

        `Support.stack([x.pad(length) for x in supports])` makes a batch of them.

        Args:
            input_ids: the prompts, each a list of T token ids, or a (T,) integer tensor.
            k: how many tokens per position. vLLM gives up to 20, unless it was started with `--max-logprobs`.

        Returns:
            A support of (T, K) per prompt, in the order of the prompts. Position t speaks of the token after token t,
            and the last position is empty.

        Raises:
            TypeError, ValueError: an argument is not as above.
            ScoringError: the server refused a prompt, or did not answer.
        """
        prompts, k = require_prompts(input_ids), checks.require_positive_integer("k", k)
        return self._all([partial(self._top, prompt, k) for prompt in prompts])

    def score_ids(self, input_ids: Sequence[Sequence[int]], ids: Sequence[Tensor]) -> list[Support]:
        """The log-probs of given tokens, such as the student's K best, after each token of the prompts.

        Args:
            input_ids: as of `score`.
            ids: a (T, K) integer tensor per prompt, negative where a slot is empty. The last row is not asked for.

        Returns:
            As of `score`, with these ids.

        Raises:
            TypeError, ValueError, ScoringError: as of `score`.
        """
        prompts = require_prompts(input_ids)
        return self._all([partial(self._on_ids, *pair) for pair in zip(prompts, require_ids(ids, prompts))])

    def teacher(self, k: int) -> Callable[[Mapping[str, Any]], Support]:
        """A teacher for `topk_rkl.trainers.transformers.distill`, whose training step waits for the answers.

        Args:
            k: as of `score`.

        Returns:
            A function of a batch: `input_ids`, (B, T) integers, and `attention_mask`, (B, T), where there is padding on
            either side. It gives a support of (B, T, K) on their device, empty at padding.
        """
        return partial(self._batch, k=checks.require_positive_integer("k", k))

    def close(self) -> None:
        """Closes the connections. A later call opens others."""
        self._http.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._http.url!r})"

    @abstractmethod
    def _best(self, prompt: list[int], k: int) -> Support:
        """What the server says of (T, K), asked in one request."""

    @abstractmethod
    def _scored(
        self,
        prompt: list[int],
        ids: Tensor,  # (T - 1, K), with an id at least; negative where empty
    ) -> Support:
        """What the server says of (T, U), these ids or more at each position, asked in one request."""

    @abstractmethod
    def _remedy(self, status: int, words: str) -> str | None:
        """What to do where a server of this kind answers so."""

    def _top(self, prompt: list[int], k: int) -> Support:
        return _require_positions(self._best(prompt, k), prompt)

    def _on_ids(
        self,
        prompt: list[int],
        ids: Tensor,  # (T, K)
    ) -> Support:  # (T, K)
        if not (ids[:-1] >= 0).any():
            return Support(torch.full_like(ids, -1), torch.full(ids.shape, -torch.inf))
        return taken(_require_positions(self._scored(prompt, ids[:-1]), prompt), ids)

    def _batch(self, inputs: Mapping[str, Any], k: int) -> Support:
        ids, kept = require_batch(inputs)
        found = Support.cat(self.score([row[x].tolist() for row, x in zip(ids, kept)], k)).to(ids.device)
        batch = found.ids.new_full((*ids.shape, k), -1), found.log_probs.new_full((*ids.shape, k), -torch.inf)
        for padded, values in zip(batch, found.tensors):
            padded[kept] = values
        return Support(*batch)

    def _all(self, asks: list[Callable[[], Support]]) -> list[Support]:
        """The answers in the order of the prompts, asked for by several threads."""
        pool = ThreadPoolExecutor(self.concurrency)
        futures = [pool.submit(self._answer, i, ask) for i, ask in enumerate(asks)]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), unit="prompt", disable=not self.progress):
                future.result()
        except ScoringError as error:
            pool.shutdown(cancel_futures=True)  # waits for the requests under way
            error.done = {i: x.result() for i, x in enumerate(futures) if _succeeded(x)}
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return [x.result() for x in futures]

    def _answer(self, index: int, ask: Callable[[], Support]) -> Support:
        try:
            return ask()
        except Exception as error:  # an answer may be anything
            raise ScoringError(f"prompt {index} of {self}: {error}", index) from error

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._http.post(path, body, self._remedy)


class VLLM(Server):
    """A vLLM server, as `vllm serve` starts it.

    `score` asks its `/v1/completions` for prompt_logprobs. `score_ids` asks its `/inference/v1/generate`, which needs
    vLLM 0.32 or later with VLLM_USE_V2_MODEL_RUNNER=1, and K of at most `--max-logprobs`. Other options are those of
    `Server`.

    Args:
        url: as of `Server`.
        model: the name that the server gives the model.
        **options: those of `Server`.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(self, url: str, model: str, **options: Any) -> None:
        super().__init__(url, **options)
        self.model = require_word("model", model)

    def _best(self, prompt: list[int], k: int) -> Support:
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k}
        return from_vllm(self._post("/v1/completions", body), k)

    def _scored(
        self,
        prompt: list[int],
        ids: Tensor,  # (T - 1, K)
    ) -> Support:
        asked = packed(ids)
        sampling = {
            "max_tokens": 1, "temperature": 1.0, "detokenize": False, "prompt_logprob_start": 0,
            "prompt_logprob_token_ids": asked.tolist(),
        }  # fmt: skip
        body = {"model": self.model, "token_ids": prompt, "sampling_params": sampling}
        return from_vllm_scores(self._post("/inference/v1/generate", body), asked)

    def _remedy(self, status: int, words: str) -> str | None:
        wanted = re.search(r"requested \D*(\d+).*greater than max allowed", words, re.IGNORECASE)  # in Python or Rust
        if wanted:
            return f"start the server with --max-logprobs {wanted[1]}, or ask for fewer"
        if status == 404 and "model" in words.lower():
            return f"model is {self.model!r}; pass a name that {self._http.url}/v1/models lists"
        if status == 404:
            return (
                "see that url is that of a vLLM server, which is of 0.32 or later for score_ids; else take SGLang(url)"
            )
        return None


class SGLang(Server):
    """An SGLang server, as `python -m sglang.launch_server` starts it. `/generate` is asked.

    A request of `score_ids` has one list of ids for all positions: the U different ones of the prompt. The server
    computes and sends T U log-probs, up to K T^2 where no two positions share an id; vLLM sends T K.
    """

    def _best(self, prompt: list[int], k: int) -> Support:
        return from_sglang(self._post("/generate", {**_scoring(prompt), "top_logprobs_num": k}), k)

    def _scored(
        self,
        prompt: list[int],
        ids: Tensor,  # (T - 1, K)
    ) -> Support:
        asked = ids[ids >= 0].unique().tolist()
        answer = self._post("/generate", {**_scoring(prompt), "token_ids_logprob": asked})
        return from_sglang(answer, len(asked), scored=True)

    def _remedy(self, status: int, words: str) -> str | None:  # noqa: ARG002
        return "see that url is that of an SGLang server; else take VLLM(url, model)" if status == 404 else None


def _scoring(prompt: list[int]) -> dict[str, Any]:
    sampling = {"max_new_tokens": 1, "temperature": 1.0}
    return {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}


def _require_positions(support: Support, prompt: list[int]) -> Support:
    if len(support) != len(prompt):
        raise ValueError(
            f"the server answered for {len(support)} positions, but the prompt has {len(prompt)} tokens; see that it "
            "neither cuts prompts nor adds tokens to them"
        )
    return support


def _succeeded(future: Future[Support]) -> bool:
    return not future.cancelled() and future.exception() is None

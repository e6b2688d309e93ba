"""Answers of inference servers as a `Support`: decoded JSON, or the objects of a server's library.

from topk_rkl.servers import alignment, from_vllm

support = from_vllm(response.json(), k=32)  # (T, 32), a position per token of the prompt
alignment(support, input_ids)

No server's package is imported. Tensors are on the CPU, ids int32 and log_probs float32, and a row is in the order
(log-prob descending, id ascending). Position t speaks of the token after t, so the last one is empty where the server
says nothing of it. An argument that is not as a function says raises TypeError or ValueError. docs/servers.md has what
to ask of each server, and the traps.
"""

from topk_rkl.servers.llama_cpp import from_llama_cpp
from topk_rkl.servers.openai import from_openai
from topk_rkl.servers.sglang import from_sglang
from topk_rkl.servers.shifts import alignment
from topk_rkl.servers.tinker import from_tinker
from topk_rkl.servers.trtllm import from_trtllm
from topk_rkl.servers.vllm import from_vllm, from_vllm_scores

__all__ = [
    "alignment", "from_llama_cpp", "from_openai", "from_sglang", "from_tinker", "from_trtllm", "from_vllm",
    "from_vllm_scores",
]  # fmt: skip

"""The CUDA part of the compiled extension: the renormalised reverse KL, and K up to MAX_K.

float64 goes elsewhere: `choose` sees to it. Where the extension was built for the host, as the tests without a GPU do,
its kernels run on CPU tensors.
"""

from typing import Any

import torch
from torch import Tensor

import topk_rkl._cuda as _cuda
from topk_rkl.backends.compiled import Compiled
from topk_rkl.divergence import REVERSE_CODE, Code

HOST: bool = _cuda.HOST
MAX_K: int = _cuda.MAX_K
SLABS = True  # see topk_rkl/rows.py


def refusal(k: int, logits: Tensor) -> str | None:
    if logits.device.type != ("cpu" if HOST else "cuda"):
        return f"the logits are on {logits.device}; move them to a GPU, or use 'native' or 'reference'"
    if k > MAX_K:
        return f"K = {k}; it takes K up to {MAX_K}, the 'reference' backend any"
    return None


def objective_refusal(divergence: Code, mass: str) -> str | None:
    if mass != "renormalized" or tuple(divergence) != REVERSE_CODE:
        return "it has kernels for the renormalised ReverseKL() alone; use 'auto' or 'reference'"
    return None


def _call(op: str, like: Tensor, *arguments: Any) -> None:
    device, stream = (0, 0) if HOST else (like.get_device(), torch.cuda.current_stream(like.device).cuda_stream)
    scratch_bytes = getattr(_cuda, f"{op}_scratch", lambda *_: 0)(arguments, device)
    scratch = like.new_empty(-(-scratch_bytes // 8), dtype=torch.int64)
    getattr(_cuda, op)(arguments, (device, stream, scratch.data_ptr()))


_ops = Compiled("cuda", _call, max_k=MAX_K, strided_hidden=True, objective_refusal=objective_refusal)
select, support_loss, select_loss, scatter = _ops.select, _ops.support_loss, _ops.select_loss, _ops.scatter
linear_loss, linear_weight_grad = _ops.linear_loss, _ops.linear_weight_grad

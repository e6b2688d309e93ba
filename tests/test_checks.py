"""Promise: errors. Every refusal names the argument, the value seen and what to do, before any launch."""

import contextlib
import math
import os
import random
import re
import tempfile
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests import tiny_models, tiny_teacher  # isort: skip

from topk_rkl import (
    AlphaBeta,
    ForwardKL,
    JensenShannon,
    LinearTopKDivergenceLoss,
    LinearTopKReverseKLLoss,
    Mixture,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    Support,
    TopKDivergenceLoss,
    TopKReverseKLLoss,
    generalized_jsd,
    linear_teacher_topk,
    linear_topk_divergence,
    linear_topk_reverse_kl,
    ops,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
)
from topk_rkl.diagnostics import linear_topk_diagnostics, topk_diagnostics
from topk_rkl.divergence import Divergence
from topk_rkl.extraction import extract
from topk_rkl.loss import causal_topk_reverse_kl, linear_causal_topk_reverse_kl
from topk_rkl.overwrite import require_overwritable
from topk_rkl.plot import save_html, save_png, token_report
from topk_rkl.recipe import builders, composition, rewards, rollout
from topk_rkl.recipe.builders import linear_fixed_ids
from topk_rkl.recipe.rewards import return_to_go
from topk_rkl.recipe.weighting import aggregate, special_token_mask
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
from topk_rkl.servers.client import VLLM, SGLang
from topk_rkl.store import Collator, Header, readers as store_readers
from topk_rkl.tokenizers import check_tokenizers, tokenizer_hash

Z = torch.randn(3, 40)
W = torch.randn(3, 40)
IDS = torch.arange(5).expand(3, 5)
S = Support(IDS, torch.randn(3, 5))
HEAD = torch.randn(50, 40)
YES_NO = Tokenizer(WordLevel({"yes": 0, "no": 1}))
REPORT = token_report(Z, S, torch.tensor([1, 2, 3]), lambda ids: ["a"] * len(ids))


def sharded(**marks: object) -> torch.Tensor:
    """What is left of a parameter under a trainer that keeps it elsewhere."""
    head = torch.empty(0)
    for name, value in marks.items():
        setattr(head, name, value)
    return head


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*_: object, **__: object) -> None:
        raise AssertionError("an op ran before the refusal")

    losses = ("support_loss", "select_loss", "mass_loss", "linear_loss", "linear_mass_loss")
    for name in ("select", "tail_logit", "scatter", "mass_grad", "linear_select", "linear_logits", *losses):
        monkeypatch.setattr(ops, name, launched)


REFUSALS = {
    "student not a tensor": (lambda: topk_reverse_kl([1.0], W, k=3), TypeError, "student_logits is a list"),
    "student int": (
        lambda: topk_reverse_kl(Z.int(), W, k=3),
        TypeError,
        "student_logits is torch.int32; use one of bfloat16",
    ),
    "student fp8": (lambda: topk_reverse_kl(Z.to(torch.float8_e4m3fn), W, k=3), TypeError, "float8_e4m3fn"),
    "student sparse": (lambda: topk_reverse_kl(Z.to_sparse(), W, k=3), TypeError, "layout torch.sparse_coo.*to_dense"),
    "student 0-d": (
        lambda: topk_reverse_kl(Z[0, 0], W, k=3),
        ValueError,
        r"student_logits has shape \(\).*\(\.\.\., V\)",
    ),
    "student without vocabulary": (lambda: topk_reverse_kl(Z[:, :0], W, k=3), ValueError, r"shape \(3, 0\)"),
    "teacher a plain tuple": (lambda: topk_reverse_kl(Z, (IDS, W)), TypeError, r"wrap it: Support\(ids, log_probs\)"),
    "teacher None": (lambda: topk_reverse_kl(Z, None, k=3), TypeError, "teacher is a NoneType"),
    "teacher requires grad": (
        lambda: topk_reverse_kl(Z, W.clone().requires_grad_(), k=3),
        ValueError,
        r"teacher requires grad.*teacher.detach\(\)",
    ),
    "teacher_topk requires grad": (
        lambda: teacher_topk(W.clone().requires_grad_(), 3),
        ValueError,
        r"teacher_logits requires grad.*teacher_logits.detach\(\)",
    ),
    "support requires grad": (
        lambda: topk_reverse_kl(Z, Support(IDS, torch.randn(3, 5, requires_grad=True))),
        ValueError,
        r"teacher.log_probs requires grad",
    ),
    "teacher of other rows": (
        lambda: topk_reverse_kl(Z, W[:2], k=3),
        ValueError,
        r"teacher has shape \(2, 40\).*\(3, 40\)",
    ),
    "teacher on another device": (
        lambda: topk_reverse_kl(Z, W.to("meta"), k=3),
        ValueError,
        "teacher is on meta.*on cpu",
    ),
    "no k": (lambda: topk_reverse_kl(Z, W), ValueError, "k is None.*such as k=32"),
    "k 0": (lambda: topk_reverse_kl(Z, W, k=0), ValueError, "k is 0; it must be between 1 and V = 40"),
    "k above V": (lambda: teacher_topk(W, 41), ValueError, "k is 41; it must be between 1 and V = 40"),
    "k a float": (lambda: topk_reverse_kl(Z, W, k=3.0), TypeError, "k is 3.0; it must be an int"),
    "k a bool": (lambda: topk_reverse_kl(Z, W, k=True), TypeError, "k is True"),
    "k with a support": (
        lambda: topk_reverse_kl(Z, Support(IDS, W[:, :5]), k=5),
        ValueError,
        "k is 5, but teacher is a Support",
    ),
    "ids float": (lambda: topk_reverse_kl(Z, Support(W[:, :5], W[:, :5])), TypeError, "teacher.ids is torch.float32"),
    "log_probs int": (lambda: topk_reverse_kl(Z, Support(IDS, IDS)), TypeError, "teacher.log_probs is torch.int64"),
    "support of two shapes": (lambda: topk_reverse_kl(Z, Support(IDS, W[:, :4])), ValueError, r"\(3, 5\).*\(3, 4\)"),
    "support of no slot": (lambda: topk_reverse_kl(Z, Support(IDS[:, :0], W[:, :0])), ValueError, "K of at least 1"),
    "support of other rows": (
        lambda: topk_reverse_kl(Z[:2], Support(IDS, W[:, :5])),
        ValueError,
        r"teacher.ids.*shape \(2, any\)",
    ),
    "weights of another shape": (
        lambda: topk_reverse_kl(Z, W, k=3, weights=torch.ones(3, 1)),
        ValueError,
        r"weights has shape \(3, 1\).*shape \(3,\)",
    ),
    "weights a list": (lambda: topk_reverse_kl(Z, W, k=3, weights=[1, 1, 1]), TypeError, "weights is a list"),
    "weights require grad": (
        lambda: topk_reverse_kl(Z, W, k=3, weights=torch.ones(3, requires_grad=True)),
        ValueError,
        "weights requires grad",
    ),
    "weights complex": (
        lambda: topk_reverse_kl(Z, W, k=3, weights=torch.ones(3) * 1j),
        TypeError,
        "weights is torch.complex64",
    ),
    "temperature 0": (
        lambda: topk_reverse_kl(Z, W, k=3, temperature=0),
        ValueError,
        "temperature is 0; it must be positive",
    ),
    "temperature 0 of 16 bits, to which 1e-30 is 0": (
        lambda: topk_reverse_kl(Z, W, k=3, temperature=numpy.float16(0)),
        ValueError,
        "temperature is 0.0; it must be positive",
    ),
    "temperature negative": (lambda: TopKReverseKLLoss(3, temperature=-1.0), ValueError, "temperature is -1.0"),
    "temperature nan": (lambda: topk_reverse_kl(Z, W, k=3, temperature=float("nan")), ValueError, "temperature is nan"),
    "temperature a tensor": (
        lambda: TopKReverseKLLoss(3, temperature=torch.ones(())),
        TypeError,
        "temperature is a torch.Tensor",
    ),
    "reduction": (
        lambda: topk_reverse_kl(Z, W, k=3, reduction="avg"),
        ValueError,
        "reduction is 'avg'; use one of none, sum, mean",
    ),
    "denominator without mean": (
        lambda: topk_reverse_kl(Z, W, k=3, reduction="sum", denominator=3),
        ValueError,
        "denominator is given with reduction='sum'",
    ),
    "denominator of one dimension": (
        lambda: topk_reverse_kl(Z, W, k=3, denominator=torch.ones(1)),
        ValueError,
        r"denominator has shape \(1,\)",
    ),
    "denominator requires grad": (
        lambda: topk_reverse_kl(Z, W, k=3, denominator=torch.ones((), requires_grad=True)),
        ValueError,
        "denominator requires grad",
    ),
    "denominator infinite": (
        lambda: topk_reverse_kl(Z, W, k=3, denominator=float("inf")),
        ValueError,
        "denominator is inf",
    ),
    "overwriting a leaf": (
        lambda: topk_reverse_kl(Z.clone().requires_grad_(), W, k=3, overwrite_student_logits=True),
        ValueError,
        "overwrite_student_logits=True.*a leaf.*pass a non-leaf",
    ),
    "overwriting a view of a leaf": (
        lambda: topk_divergence(
            Z.clone().requires_grad_()[:, :-1].t().t(), W, k=3, mass="tail", overwrite_student_logits=True
        ),
        ValueError,
        "overwrite_student_logits=True.*a leaf.*pass a non-leaf",
    ),
    "overwriting an expanded view": (
        lambda: topk_reverse_kl(Z[:1].expand(3, -1), W, k=3, overwrite_student_logits=True),
        ValueError,
        "overwrite_student_logits=True.*overlap",
    ),
    "overwriting a sliding window": (
        lambda: topk_reverse_kl(Z.as_strided((3, 40), (20, 1)), W, k=3, overwrite_student_logits=True),
        ValueError,
        "overlap",
    ),
    "aggregate mode": (lambda: aggregate(Z, Z, "mean"), ValueError, "mode is 'mean'; use one of token-mean"),
    "aggregate shapes": (lambda: aggregate(Z, Z[0], "token-mean"), ValueError, r"both must be \(B, T\)"),
    "aggregate norm": (
        lambda: aggregate(Z, Z, "token-mean", norm=3),
        ValueError,
        "norm is given with mode='token-mean'",
    ),
    "aggregate norm 0": (
        lambda: aggregate(Z, Z, "seq-mean-token-sum-norm", norm=0),
        ValueError,
        "norm is 0; it must be positive",
    ),
    "aggregate norm packed": (
        lambda: aggregate(Z, Z, "seq-mean-token-sum-norm", cu_seqlens=IDS[0]),
        ValueError,
        "norm is None with cu_seqlens.*pass norm",
    ),
    "cu_seqlens floats": (lambda: aggregate(Z, Z, cu_seqlens=Z[0]), TypeError, "cu_seqlens is torch.float32"),
    "cu_seqlens 2-d": (lambda: special_token_mask(IDS, [1], cu_seqlens=IDS), ValueError, r"cu_seqlens has shape \("),
    "cu_seqlens empty": (lambda: return_to_go(Z, cu_seqlens=IDS[0, :0]), ValueError, r"it must be \(sequences \+ 1,\)"),
    "aggregate denominator": (lambda: aggregate(Z, Z, "token-sum", denominator=3), ValueError, "divides by nothing"),
    "special tokens float": (lambda: special_token_mask(Z, [1]), TypeError, "response_ids is torch.float32"),
    "special tokens text": (lambda: special_token_mask(IDS, "<think>"), TypeError, "token_ids is a str"),
    "special tokens occurrences": (
        lambda: special_token_mask(IDS, [1], "last"),
        ValueError,
        "occurrences is 'last'; use one of first, all",
    ),
    "linear: hidden of another width": (
        lambda: linear_topk_reverse_kl(Z[:, :7], HEAD, S),
        ValueError,
        r"student_weight has shape \(50, 40\) and student_hidden \(3, 7\); the head must be \(V, H\)",
    ),
    "linear: hidden int": (lambda: linear_topk_reverse_kl(IDS, HEAD, S), TypeError, "student_hidden is torch.int64"),
    "linear: head transposed": (lambda: linear_topk_reverse_kl(Z, HEAD.t(), S), ValueError, r"shape \(40, 50\)"),
    "linear: head flattened by a shard": (
        lambda: linear_topk_reverse_kl(Z, HEAD.flatten(), S),
        ValueError,
        r"student_weight has shape \(2000,\).*one that FSDP flattened is whole within the forward of its module",
    ),
    "linear: quantised head": (
        lambda: linear_topk_reverse_kl(Z, HEAD.to(torch.int8), S),
        TypeError,
        "student_weight is torch.int8; a quantised head must be given dequantised",
    ),
    "linear: float8 head": (
        lambda: linear_topk_reverse_kl(Z, HEAD.to(torch.float8_e4m3fn), S),
        TypeError,
        "student_weight is torch.float8_e4m3fn; a quantised head must be given dequantised",
    ),
    "linear: 4-bit head of bitsandbytes": (
        lambda: linear_topk_reverse_kl(Z, torch.zeros(HEAD.numel() // 2, 1, dtype=torch.uint8), S),
        TypeError,
        "student_weight is torch.uint8; a quantised head must be given dequantised",
    ),
    "linear: 4-bit head of bitsandbytes stored as bfloat16": (
        lambda: linear_topk_reverse_kl(Z, sharded(quant_state="nf4"), S),
        TypeError,
        "student_weight is a torch.Tensor; a quantised head must be given dequantised",
    ),
    "linear: DTensor head": (
        lambda: linear_topk_reverse_kl(Z, sharded(full_tensor=None), S),
        TypeError,
        r"student_weight is a DTensor; pass student_weight.full_tensor\(\)",
    ),
    "linear: ZeRO-3 head": (
        lambda: linear_topk_reverse_kl(Z, sharded(ds_id=3), S),
        ValueError,
        "student_weight is partitioned by DeepSpeed.*take the loss within the forward of the head's module",
    ),
    "linear: mixed dtypes": (
        lambda: linear_topk_reverse_kl(Z.bfloat16(), HEAD.double(), S),
        TypeError,
        "student_weight is torch.float64 and student_hidden torch.bfloat16; float64 goes with float64 alone",
    ),
    "linear: mixed devices": (
        lambda: linear_topk_reverse_kl(Z, HEAD.to("meta"), S),
        ValueError,
        "student_weight is on meta and student_hidden on cpu",
    ),
    "linear: bias of another size": (
        lambda: linear_topk_reverse_kl(Z, HEAD, S, student_bias=torch.randn(40)),
        ValueError,
        r"student_bias has shape \(40,\); it must be \(V,\), here \(50,\)",
    ),
    "linear: bias of another dtype": (
        lambda: linear_topk_reverse_kl(Z, HEAD, S, student_bias=torch.randn(50).double()),
        TypeError,
        "student_bias is torch.float64 and student_hidden torch.float32; float64 goes",
    ),
    "linear: support of other rows": (
        lambda: linear_topk_reverse_kl(Z[:2], HEAD, S),
        ValueError,
        r"teacher.ids has shape \(3, 5\) and student_hidden \(2, 40\)",
    ),
    "linear: weights of other rows": (
        lambda: linear_topk_reverse_kl(Z, HEAD, S, weights=torch.ones(4)),
        ValueError,
        r"weights has shape \(4,\) and student_hidden \(3, 40\)",
    ),
    "linear: k beside a support": (lambda: linear_topk_reverse_kl(Z, HEAD, S, k=3), ValueError, "leave k out"),
    "linear: teacher a tuple": (lambda: linear_topk_reverse_kl(Z, HEAD, (Z, HEAD), k=3), TypeError, "wrap it"),
    "linear: logit_scale": (
        lambda: linear_topk_reverse_kl(Z, HEAD, S, logit_scale=float("nan")),
        ValueError,
        "logit_scale is nan; it must be finite",
    ),
    "linear: softcap 0": (
        lambda: linear_topk_reverse_kl(Z, HEAD, S, softcap=0.0),
        ValueError,
        "softcap is 0.0; it must be positive, at least 1e-30, or None for no cap",
    ),
    "linear: softcap tiny": (
        lambda: linear_teacher_topk(Z, HEAD, 3, softcap=1e-31),
        ValueError,
        "softcap is 1e-31; it must be positive, at least 1e-30",
    ),
    "linear: logit_scale huge": (
        lambda: LinearTopKReverseKLLoss(logit_scale=-1e31),
        ValueError,
        "logit_scale is -1e[+]31; its size must be 0, or between 1e-30 and 1e[+]30",
    ),
    "linear: logit_scale tiny": (
        lambda: linear_fixed_ids(Z, HEAD, [1, 2], logit_scale=1e-31),
        ValueError,
        "logit_scale is 1e-31; its size",
    ),
    "linear: sparse gradient of a head that is made of others": (
        lambda: linear_topk_reverse_kl(Z, HEAD + HEAD.clone().requires_grad_(), S, weight_grad="sparse"),
        ValueError,
        "student_weight is no leaf but the result of AddBackward0 .*use weight_grad='dense', or pass the parameter",
    ),
    "linear: weight_grad": (
        lambda: LinearTopKReverseKLLoss(weight_grad="none"),
        ValueError,
        "weight_grad is 'none'; use one of dense, sparse",
    ),
    "divergence a class": (
        lambda: topk_divergence(Z, W, k=3, divergence=ForwardKL),
        TypeError,
        r"divergence is the class ForwardKL; pass an instance, such as ForwardKL\(",
    ),
    "divergence of no kind": (
        lambda: topk_divergence(Z, W, k=3, divergence=Divergence()),
        TypeError,
        "divergence is a topk_rkl.divergence.Divergence; use ReverseKL",
    ),
    "divergence a name": (
        lambda: topk_divergence(Z, W, k=3, divergence="jsd"),
        TypeError,
        r"divergence is a str; use ReverseKL\(\)",
    ),
    "divergence beta": (
        lambda: JensenShannon(1.0),
        ValueError,
        "^beta is 1.0; it must be between 0 and 1.*generalized_jsd",
    ),
    "divergence lam": (
        lambda: Mixture(-0.1),
        ValueError,
        "^lam is -0.1; it must be from 0",
    ),
    "divergence skew lam": (
        lambda: SkewForwardKL(1),
        ValueError,
        "^lam is 1; it must be at least 0 and below 1",
    ),
    "divergence alpha": (
        lambda: AlphaBeta(float("inf"), 0),
        ValueError,
        "^alpha is inf; it must be finite",
    ),
    "divergence second number": (lambda: AlphaBeta(0, float("nan")), ValueError, "^beta is nan; it must be finite"),
    "divergence clamp of one": (
        lambda: ReverseKL(clamp=5.0),
        TypeError,
        r"^clamp is 5.0; it must be \(low, high\)",
    ),
    "divergence clamp upside down": (
        lambda: ReverseKL(clamp=(1, -1)),
        ValueError,
        r"^clamp is \(1, -1\); it must be \(low, high\) with low <= high",
    ),
    "mass unknown": (
        lambda: topk_divergence(Z, W, k=3, mass="full"),
        ValueError,
        "mass is 'full'; use one of renormalized, tail",
    ),
    "mass raw of a divergence without": (
        lambda: topk_divergence(Z, W, k=3, divergence=JensenShannon(), mass="raw"),
        ValueError,
        r"mass='raw' is for ReverseKL\(\) without clamp, .* JensenShannon\(beta=0.5\); use mass='tail'",
    ),
    "mass ema_pg of a mixture": (
        lambda: topk_divergence(Z, W, k=3, divergence=Mixture(0.5), mass="ema_pg", sampled_ids=IDS[:, 0]),
        ValueError,
        "mass='ema_pg' is for",
    ),
    "mass of a function": (
        lambda: topk_divergence(Z, W, k=3, divergence=lambda p, q: p - q, mass="raw"),
        ValueError,
        "mass='raw' is for",
    ),
    "mass ema_pg without samples": (
        lambda: topk_divergence(Z, W, k=3, mass="ema_pg"),
        ValueError,
        "sampled_ids is None, but 'ema_pg' needs",
    ),
    "samples that nothing uses": (
        lambda: topk_divergence(Z, W, k=3, sampled_ids=IDS[:, 0]),
        ValueError,
        "sampled_ids is given, but mass='renormalized'.*leave it out",
    ),
    "samples of other positions": (
        lambda: topk_divergence(Z, W, k=3, mass="ema_pg", sampled_ids=IDS),
        ValueError,
        r"sampled_ids has shape \(3, 5\)",
    ),
    "mass ema_pg with a support": (
        lambda: topk_divergence(Z, S, mass="ema_pg", sampled_ids=IDS[:, 0]),
        ValueError,
        "teacher is a Support with mass='ema_pg'",
    ),
    "diagnostics with a support and a temperature": (
        lambda: topk_diagnostics(Z, S, ("top1_agreement", "teacher_mass"), temperature=3),
        ValueError,
        "temperature is 3 with 'teacher_mass' and a Support, .*pass teacher logits",
    ),
    "advantage with a support and a temperature": (
        lambda: linear_topk_diagnostics(Z, HEAD, S, ["overlap_token_advantage"], temperature=0.5),
        ValueError,
        "temperature is 0.5 with 'overlap_token_advantage' and a Support",
    ),
    "mass with a support and a temperature": (
        lambda: linear_topk_divergence(Z, HEAD, S, mass="tail", temperature=0.5),
        ValueError,
        "temperature is 0.5 with mass='tail' and a Support, .*pass teacher logits",
    ),
    "mass with a sparse gradient": (
        lambda: linear_topk_divergence(Z, HEAD, S, mass="tail", weight_grad="sparse"),
        ValueError,
        "weight_grad is 'sparse' with mass='tail'",
    ),
    "diagnostics a str": (
        lambda: topk_diagnostics(Z, W, "student_mass", k=3),
        TypeError,
        "names is 'student_mass'; it must be a sequence",
    ),
    "diagnostics unknown": (
        lambda: topk_diagnostics(Z, W, ("entropy",), k=3),
        ValueError,
        "names has 'entropy'; use some of student_mass",
    ),
    "diagnostics of teacher logits": (
        lambda: topk_diagnostics(Z, S, ("teacher_entropy",)),
        ValueError,
        "'teacher_entropy', but teacher is a Support",
    ),
    "diagnostics without samples": (
        lambda: linear_topk_diagnostics(Z, HEAD, S, ("sampled_in_support",)),
        ValueError,
        "sampled_ids is None, but 'sampled_in_support' needs",
    ),
    "samples that no diagnostic uses": (
        lambda: topk_diagnostics(Z, S, ("student_mass",), sampled_ids=IDS[:, 0]),
        ValueError,
        "sampled_ids is given, but names has none that uses it; leave it out, or ask for one of sampled_log_prob",
    ),
    "diagnostics of a support with k": (
        lambda: topk_diagnostics(Z, S, ("student_mass",), k=5),
        ValueError,
        "k is 5, but teacher is a Support",
    ),
    "linear teacher requires grad": (
        lambda: linear_teacher_topk(Z, HEAD.clone().requires_grad_(), 3),
        ValueError,
        r"teacher_weight requires grad.*teacher_weight.detach\(\)",
    ),
    "linear teacher k": (lambda: linear_teacher_topk(Z, HEAD, 51), ValueError, "k is 51; .*between 1 and V = 50"),
    "linear teacher chunk_rows": (
        lambda: linear_teacher_topk(Z, HEAD, 3, chunk_rows=0),
        ValueError,
        "chunk_rows is 0; it must be a positive int",
    ),
    "linear teacher logits_dtype": (
        lambda: linear_teacher_topk(Z, HEAD, 3, logits_dtype=torch.bfloat16),
        ValueError,
        "logits_dtype is torch.bfloat16; use None, or torch.float32 with teacher_hidden of torch.float32",
    ),
    "linear fixed_ids of other positions": (
        lambda: linear_fixed_ids(Z, HEAD, IDS[:2]),
        ValueError,
        r"ids has shape \(2, 5\) and teacher_hidden \(3, 40\); ids must be",
    ),
    "linear fixed_ids outside": (
        lambda: linear_fixed_ids(Z, HEAD, [50]),
        ValueError,
        "from 0 to V - 1 = 49",
    ),
    "linear teacher bias": (
        lambda: linear_teacher_topk(Z, HEAD, 3, bias=torch.randn(3)),
        ValueError,
        r"bias has shape \(3,\)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_errors(name: str) -> None:
    call, kind, message = REFUSALS[name]
    with pytest.raises(kind, match=message):
        call()


H, B, Y = torch.randn(3, 16), torch.randn(50), torch.tensor([1, 2, 3])
HEAD_16 = torch.randn(50, 16)
SAMPLED = {"weights": torch.ones(3), "temperature": 1.0, "reduction": "mean", "denominator": 2.0}
LOSS = {**SAMPLED, "teacher_temperature": 1.0}
ANY = {**LOSS, "divergence": ReverseKL(), "mass": "renormalized"}
WATCHED = {
    "names": ("student_mass", "sampled_log_prob"), "temperature": 1.0, "teacher_temperature": 1.0, "sampled_ids": Y,
    "teacher": W, "k": 3,
}  # fmt: skip
DENSE = {"student_logits": Z, "teacher": W, "k": 3, "overwrite_student_logits": False}
OPTIONS = {"logit_scale": 1.0, "softcap": 30.0, "weight_grad": "dense"}
LINEAR = {"student_hidden": H, "student_weight": HEAD_16, "student_bias": B, "teacher": W, "k": 3, **OPTIONS}
LABELLED = {
    "teacher": W[None], "labels": Y[None], "num_items_in_batch": 2.0, "world_size": 1, "ignore_index": -100,
    "weights": torch.ones(1, 3), "k": 3,
}  # fmt: skip


EXTRACTION = {
    "model": tiny_models.tiny(), "tokenizer": tiny_teacher.tokenizer(), "rows": [{"input_ids": [1, 2]}], "k": 3,
    "dtype": "float32", "temperature": 1.0, "batch_tokens": 8, "shard_mb": 1.0, "full_logits": False, "progress": False,
}  # fmt: skip


def extracted(**given: Any) -> object:
    with tempfile.TemporaryDirectory() as folder:
        return extract(out=folder, **given)


SIDES = {"student_log_probs": Z, "teacher_log_probs": W}
SERVED = {"concurrency": 4, "retries": 2, "timeout": 9.0, "api_key": "key", "progress": False}


class Unasked(SGLang):
    """A client whose server is not asked."""

    def _all(self, _: object) -> None:
        raise AssertionError("the server was asked before the refusal")


LISTED = {"7": {"logprob": -0.5}, "3": {"logprob": -1.5}}
TRIPLES = [None, [[-0.5, 7, None], [-1.5, 3, None]]]
CHOICES = [{"logprobs": {"tokens": ["token_id:7"], "top_logprobs": [{"token_id:7": -0.5, "token_id:3": -1.5}]}}] * 2
TOKENS = {"answer": {"choices": CHOICES}, "k": 2, "choice": 0, "ambiguous": "drop"}
CALLS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "teacher_topk": (teacher_topk, {"teacher_logits": W, "k": 3, "normalize": False}),
    "topk_reverse_kl": (topk_reverse_kl, LOSS | DENSE),
    "topk_divergence": (topk_divergence, ANY | DENSE),
    "topk_divergence on samples": (topk_divergence, ANY | DENSE | {"mass": "ema_pg", "sampled_ids": Y}),
    "topk_divergence on a support": (topk_divergence, ANY | {"student_logits": Z, "teacher": S}),
    "linear_teacher_topk": (
        linear_teacher_topk,
        {
            "teacher_hidden": H,
            "teacher_weight": HEAD_16,
            "k": 3,
            "bias": B,
            "chunk_rows": 2,
            "softcap": 30.0,
            "normalize": True,
            "logits_dtype": torch.float32,
        },
    ),
    "linear_fixed_ids": (
        linear_fixed_ids,
        {
            "teacher_hidden": H,
            "teacher_weight": HEAD_16,
            "ids": [1, 2],
            "bias": B,
            "logit_scale": 2.0,
            "normalize": True,
        },
    ),
    "linear_topk_reverse_kl": (linear_topk_reverse_kl, LOSS | LINEAR),
    "linear_topk_divergence": (linear_topk_divergence, ANY | LINEAR),
    "causal_topk_reverse_kl": (causal_topk_reverse_kl, {**LABELLED, "student_logits": Z[None]}),
    "linear_causal_topk_reverse_kl": (
        linear_causal_topk_reverse_kl,
        {**LABELLED, "student_hidden": H[None], "student_weight": HEAD_16, "student_bias": B},
    ),
    "TopKReverseKLLoss": (
        TopKReverseKLLoss,
        {
            "k": 3,
            "temperature": 1.0,
            "teacher_temperature": 1.0,
            "reduction": "mean",
            "overwrite_student_logits": False,
        },
    ),
    "LinearTopKReverseKLLoss": (
        LinearTopKReverseKLLoss,
        {"k": 3, "temperature": 1.0, "teacher_temperature": 1.0, "reduction": "mean", **OPTIONS},
    ),
    "TopKDivergenceLoss": (
        TopKDivergenceLoss,
        {"k": 3, "divergence": ReverseKL(), "mass": "tail", "overwrite_student_logits": False},
    ),
    "LinearTopKDivergenceLoss": (
        LinearTopKDivergenceLoss,
        {"k": 3, "divergence": ReverseKL(), "mass": "tail", **OPTIONS},
    ),
    "topk_diagnostics": (topk_diagnostics, {"student_logits": Z, **WATCHED}),
    "linear_topk_diagnostics": (
        linear_topk_diagnostics,
        {
            "student_hidden": H,
            "student_weight": HEAD_16,
            "student_bias": B,
            "logit_scale": 1.0,
            "softcap": 30.0,
            **WATCHED,
        },
    ),
    "topk_diagnostics on a support": (
        topk_diagnostics,
        {"student_logits": Z, "teacher": S, "names": ["teacher_mass"], "temperature": 1.0},
    ),
    "generalized_jsd": (generalized_jsd, {"beta": 0.5}),
    "ReverseKL": (ReverseKL, {"clamp": (-1, 1)}),
    "JensenShannon": (JensenShannon, {"beta": 0.5}),
    "Mixture": (Mixture, {"lam": 0.5}),
    "SkewForwardKL": (SkewForwardKL, {"lam": 0.5}),
    "SkewReverseKL": (SkewReverseKL, {"lam": 0.5}),
    "AlphaBeta": (lambda alpha: AlphaBeta(alpha, 1), {"alpha": 0.5}),
    "ids of a support": (lambda ids: topk_reverse_kl(Z, Support(ids, S.log_probs)), {"ids": IDS}),
    "log_probs of a support": (lambda log_probs: Support(IDS, log_probs).unique(), {"log_probs": S.log_probs}),
    "student_topk": (builders.student_topk, {"student_logits": Z, "teacher_logits": W, "k": 3, "normalize": True}),
    "teacher_top_p": (builders.teacher_top_p, {"teacher_logits": W, "p": 0.9, "k": 3, "normalize": True}),
    "fixed_ids": (builders.fixed_ids, {"teacher_logits": W, "ids": [1, 2], "normalize": True}),
    "with_sampled": (builders.with_sampled, {"support": S, "sampled_ids": Y, "teacher": W}),
    "union": (builders.union, {"first": S, "second": S}),
    "intersection": (builders.intersection, {"first": S, "second": S}),
    "difference": (builders.difference, {"first": S, "second": S}),
    "remap": (builders.remap, {"support": S, "mapping": {1: 2}, "student_vocab": 40}),
    "remap by a table": (builders.remap, {"support": S, "mapping": torch.arange(40), "student_vocab": 40}),
    "mixture": (composition.mixture, {"teachers": [W, Z], "weights": [1, 2], "k": 3}),
    "a teacher of a mixture": (lambda teachers: composition.mixture([W, teachers], [1, 2], k=3), {"teachers": W}),
    "a weight of a mixture": (lambda weights: composition.mixture([W, Z], [1, weights], k=3), {"weights": 1.0}),
    "residual": (composition.residual, {"partial": W, "full": Z, "lam": 1.0, "clip": 2.0, "k": 3}),
    "extrapolation": (composition.extrapolation, {"teacher": W, "base": Z, "lam": 1.0, "k": 3}),
    "taid": (composition.taid, {"student_logits": Z, "teacher": W, "t": 0.5, "k": 3}),
    "veto": (composition.veto, {"student_logits": Z, "teacher": W, "beta": 0.5, "k": 3}),
    "log_ratio": (rewards.log_ratio, {**SIDES, "clip": (-1, 1)}),
    "tanh_log_ratio": (rewards.tanh_log_ratio, {**SIDES, "tau": 1.0}),
    "power_difference": (rewards.power_difference, {**SIDES, "alpha": 1.0}),
    "box_cox": (rewards.box_cox, {**SIDES, "alpha": 1.0}),
    "probability_difference": (rewards.probability_difference, SIDES),
    "extrapolated_log_ratio": (rewards.extrapolated_log_ratio, {**SIDES, "base_log_probs": Z, "lam": 1.0}),
    "contrast": (rewards.contrast, {"right_log_probs": Z, "wrong_log_probs": [Z, W]}),
    "return_to_go": (rewards.return_to_go, {"rewards": Z, "mask": torch.ones(3, 40), "gamma": 0.9}),
    **{
        name: (call, {"cu_seqlens": torch.tensor([0, 2, 3])})
        for name, call in {
            "packed returns": lambda cu_seqlens: return_to_go(Z, cu_seqlens=cu_seqlens),
            "packed aggregate": lambda cu_seqlens: aggregate(Z, W, cu_seqlens=cu_seqlens),
            "packed special_token_mask": lambda cu_seqlens: special_token_mask(IDS, [1], cu_seqlens=cu_seqlens),
        }.items()
    },
    "k1": (rewards.k1, SIDES),
    "k2": (rewards.k2, SIDES),
    "k3": (rewards.k3, SIDES),
    "top_p_filter": (rollout.top_p_filter, {"logits": Z, "top_p": 0.9, "temperature": 1.0}),
    "sample_top_p": (rollout.sample_top_p, {"logits": Z, "top_p": 0.9, "generator": torch.Generator()}),
    "sampled_token_loss": (rollout.sampled_token_loss, {**SAMPLED, "student_logits": Z, "teacher_logits": W, "ids": Y}),
    "aggregate": (aggregate, {"per_token": Z, "mask": W, "mode": "seq-mean-token-sum-norm", "norm": 4.0}),
    "denominator of aggregate": (lambda denominator: aggregate(Z, W, denominator=denominator), {"denominator": 3.0}),
    "special_token_mask": (special_token_mask, {"response_ids": IDS, "token_ids": [1, 2], "occurrences": "first"}),
    "extract": (extracted, EXTRACTION),
    "check_tokenizers": (
        check_tokenizers,
        {"student": YES_NO, "teacher": YES_NO, "student_vocab": 2, "teacher_vocab": 2, "probe": ["yes"]},
    ),
    "tokenizer_hash": (tokenizer_hash, {"tokenizer": YES_NO}),
    "require of a report": (check_tokenizers(YES_NO, YES_NO, probe=["yes"]).require, {"worst": "same"}),
    "token_report": (
        token_report,
        {
            "student_logits": Z,
            "support": S,
            "input_ids": Y,
            "tokenizer": lambda ids: ["a"] * len(ids),
            "weights": torch.ones(3),
            "temperature": 1.0,
            "teacher_temperature": 1.0,
        },
    ),
    "save_html": (lambda report, title: save_html(report, os.devnull, title=title), {"report": REPORT, "title": "a"}),
    "save_png": (
        lambda report, positions: save_png(report, os.devnull, positions),
        {"report": REPORT, "positions": [(0, 1)]},
    ),
    "VLLM": (VLLM, {"url": "http://localhost", "model": "name", **SERVED}),
    "SGLang": (SGLang, {"url": "http://localhost", **SERVED}),
    "score": (Unasked("http://localhost").score, {"input_ids": [[1, 2]], "k": 3}),
    "score_ids": (Unasked("http://localhost").score_ids, {"input_ids": [[1, 2, 3]], "ids": [IDS]}),
    "teacher": (Unasked("http://localhost").teacher, {"k": 3}),
    "from_vllm": (
        from_vllm,
        {"answer": {"choices": [{"prompt_logprobs": [None, LISTED]}] * 2}, "k": 2, "part": "prompt", "choice": 0},
    ),
    "from_vllm_scores": (
        from_vllm_scores,
        {
            "answer": {"prompt_token_id_logprobs": W[:2, :2] - 9},
            "token_ids": torch.tensor([[1, 2], [3, 4]]),
            "start": 1,
        },
    ),
    "from_sglang": (
        from_sglang,
        {
            "answer": {"meta_info": {"input_top_logprobs": TRIPLES, "input_token_ids_logprobs": TRIPLES}},
            "k": 2,
            "part": "prompt",
            "scored": False,
            "start": 0,
        },
    ),
    "from_openai": (from_openai, TOKENS),
    "tokenizer of from_openai": (lambda tokenizer: from_openai(**TOKENS, tokenizer=tokenizer), {"tokenizer": None}),
    "from_llama_cpp": (from_llama_cpp, TOKENS),
    "tokenizer of from_llama_cpp": (
        lambda tokenizer: from_llama_cpp(**TOKENS, tokenizer=tokenizer),
        {"tokenizer": None},
    ),
    "from_trtllm": (
        from_trtllm,
        {"answer": {"outputs": [{"prompt_logprobs": [LISTED]}] * 2}, "k": 2, "part": "prompt", "choice": 0},
    ),
    "from_tinker": (from_tinker, {"answer": {"topk_prompt_logprobs": [None, [(7, -0.5), (3, -1.5)]]}, "k": 2}),
    "alignment": (
        alignment,
        {
            "support": Support(IDS[:1].expand(20, 5), W[:1, :5].expand(20, 5)),
            "input_ids": Y[:1].expand(20),
            "at_least": 9,
        },
    ),
    "Header": (
        lambda **given: Header(teacher="a", **given),
        {
            "k": 2,
            "vocab_size": 9,
            "tokenizer": "b",
            "source": "c",
            "temperature": 1.0,
            "normalized": True,
            "log_probs_dtype": "float16",
        },
    ),
    "Collator": (Collator, {"pad_token_id": 0, "label_pad": -100, "max_length": 4, "pad_to_multiple_of": 2}),
    "axolotl": (lambda speaks_of: store_readers.axolotl([], speaks_of=speaks_of), {"speaks_of": "next"}),
}


def hostile(value: Any) -> dict[str, object]:
    """What may stand in the place of an argument, the tensors like its own."""
    x = value if isinstance(value, torch.Tensor) else torch.tensor(2.0)
    rows, floats = x if x.dim() else x[None], x.float()
    numbers = {
        "nan": math.nan, "inf": math.inf, "negative": -1.5, "zero": 0, "huge": 2**60, "beyond float": 10**400,
        "complex": 2 + 1j, "bool": True, "fraction": Fraction(1, 2), "decimal": Decimal("0.5"),
        "numpy int": numpy.int64(2), "numpy float": numpy.float32(0.5), "numpy bool": numpy.bool_(True),
    }  # fmt: skip
    others = {
        "None": None, "text": "text", "object": object(), "class": int, "list": [1.5], "empty": [], "dict": {"a": 1},
        "array": numpy.array([1, 2]), "words": numpy.array(["a", "b"]), "tuple": (x, x), "support": Support(None, None),
    }  # fmt: skip
    sharded = x.clone()
    sharded.full_tensor = None
    tensors = {
        "sharded": sharded,
        "meta": x.to("meta"), "sparse": rows.to_sparse(), "nested": torch.nested.nested_tensor([rows, rows]),
        "jagged": torch.nested.nested_tensor([rows, rows], layout=torch.jagged), "0-d": x.flatten()[0],
        "of another rank": x[..., None].expand(*x.shape, 7), "of other rows": rows.repeat(3, *[1] * (rows.dim() - 1)),
        "complex tensor": floats * 1j, "float8": floats.to(torch.float8_e4m3fn), "bool tensor": floats > 0,
        "uint16": floats.abs().to(torch.uint16), "int tensor": floats.long(), "double": floats.double(),
        "grad": floats.clone().requires_grad_(),
    }  # fmt: skip
    return numbers | others | tensors


NUMBER = {"zero", "negative", "huge", "numpy int", "numpy float"}
ROWS = {"of another rank", "of other rows", "meta"}  # of the argument that says how many positions there are
RIGHT = {  # what else may stand there; every dtype but float8 is right where floats are
    "k": {"numpy int", "huge", "None"}, "chunk_rows": {"numpy int", "huge", "None"},
    "divergence": {"None"}, "student_vocab": {"numpy int", "huge", "None"},
    "teacher_vocab": {"numpy int", "huge", "None"},
    "ids": {"int tensor", "array"}, "sampled_ids": {"int tensor"},
    "response_ids": ROWS | {"int tensor"}, "token_ids": {"empty", "array", "int tensor"},
    "mapping": {"of other rows", "int tensor"}, "temperature": NUMBER - {"zero", "negative"} | {"0-d", "of other rows"},
    "teacher_temperature": NUMBER - {"zero", "negative"} | {"None", "0-d", "of other rows"},
    "denominator": NUMBER | {"None", "0-d", "int tensor"}, "num_items_in_batch": NUMBER | {"None", "0-d", "int tensor"},
    "labels": {"int tensor"}, "world_size": {"numpy int", "huge"}, "ignore_index": NUMBER - {"negative", "numpy float"},
    "norm": NUMBER - {"zero", "negative"} | {"None"},
    "logit_scale": NUMBER, "softcap": NUMBER - {"zero", "negative"} | {"None"}, "lam": NUMBER, "alpha": NUMBER,
    "beta": NUMBER - {"negative"}, "tau": NUMBER - {"zero", "negative"}, "t": {"zero", "numpy float"},
    "clip": NUMBER - {"zero", "negative"} | {"None"}, "clamp": {"None"}, "gamma": {"zero", "numpy float"},
    "p": {"numpy float"}, "top_p": {"numpy float"}, "normalize": {"bool"}, "overwrite_student_logits": {"bool"},
    "weights": NUMBER - {"negative"} | {"None", "bool tensor", "0-d", "of other rows", "tuple"},
    "mask": {"None", "bool tensor", "grad"}, "names": {"empty"}, "generator": {"None"},
    "teacher_logits": ROWS, "logits": ROWS | {"grad"}, "teacher_hidden": {"of other rows"}, "bias": {"None"},
    "student_bias": {"None", "grad"}, "student_logits": {"grad"}, "student_hidden": {"grad"},
    "student_weight": {"grad"}, "student_log_probs": {"grad"}, "teacher_log_probs": {"grad"},
    "input_ids": {"int tensor", "of other rows"}, "title": {"text"}, "positions": {"None", "empty"},
    "logits_dtype": {"None"}, "batch_tokens": {"numpy int", "huge"}, "shard_mb": NUMBER - {"zero", "negative"},
    "full_logits": {"bool"}, "progress": {"bool"},
    "cu_seqlens": {"None", "int tensor", "of other rows"},  # how many sequences there are is free
    "concurrency": {"numpy int"}, "retries": NUMBER - {"negative", "numpy float"}, "api_key": {"text", "None"},
    "timeout": NUMBER - {"zero", "negative", "huge"}, "model": {"text"},
    "choice": {"zero"}, "scored": {"bool"}, "start": {"zero", "numpy int"}, "at_least": {"numpy int"},
    "vocab_size": {"numpy int"}, "tokenizer": {"text", "None"}, "source": {"text"}, "normalized": {"bool"},
    "pad_token_id": NUMBER - {"negative", "numpy float"}, "max_length": {"numpy int", "huge", "None"},
    "pad_to_multiple_of": {"numpy int", "huge", "None"},
    "base_log_probs": {"grad"}, "right_log_probs": {"grad"}, "rewards": {"grad"}, "per_token": {"grad"},
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:K = 1", "ignore:The PyTorch API of nested tensors")
def test_every_argument_is_right_or_refused_by_its_name(name: str) -> None:
    function, arguments = CALLS[name]
    for argument, value in arguments.items():
        for label, other in hostile(value).items():
            message = None
            try:
                function(**arguments | {argument: other})
            except (TypeError, ValueError) as error:
                message = str(error)
            except AssertionError:  # an op ran
                pass
            if message is None:
                assert label in RIGHT.get(argument, set()) | {"double"}, f"{argument}: {label} is taken"
            else:
                assert re.search(rf"\b{argument}\b", message), f"{argument}: {label} is refused by {message!r}"


def test_views_that_do_not_overlap_may_be_overwritten() -> None:
    for view in (Z, Z[:, :-1], Z.t(), Z[::2, ::3], Z[:1].expand(1, -1), torch.randn(2, 3, 4)[:, :, 1:]):
        with pytest.raises(AssertionError, match="an op ran"):
            topk_reverse_kl(view, torch.randn(view.shape), k=2, overwrite_student_logits=True)


def test_a_view_overlaps_itself_where_two_elements_have_one_address() -> None:
    memory, found = torch.arange(4_000), set()
    for _ in range(500):
        shape, strides = ([random.randint(low, high) for _ in range(3)] for low, high in ((1, 5), (0, 20)))
        addresses = memory.as_strided(shape, strides).flatten()
        overlaps = len(addresses.unique()) < len(addresses)
        with pytest.raises(ValueError, match="overlap") if overlaps else contextlib.nullcontext():
            require_overwritable(memory.as_strided(shape, strides))
        found.add(overlaps)
    assert found == {True, False}
    require_overwritable(torch.empty_strided((100_000, 150_000), (150_001, 150_000), device="meta")[:149_000])

"""Promise: errors. Every refusal names the argument, the value seen and what to do, before any launch."""

import pytest
import torch

from topk_rkl import (
    AlphaBeta,
    ForwardKL,
    JensenShannon,
    LinearTopKReverseKLLoss,
    Mixture,
    ReverseKL,
    SkewForwardKL,
    Support,
    TopKReverseKLLoss,
    linear_teacher_topk,
    linear_topk_divergence,
    linear_topk_reverse_kl,
    ops,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
)
from topk_rkl.weighting import aggregate, special_token_mask

Z = torch.randn(3, 40)
W = torch.randn(3, 40)
IDS = torch.arange(5).expand(3, 5)
S = Support(IDS, torch.randn(3, 5))
HEAD = torch.randn(50, 40)


def sharded(**marks: object) -> torch.Tensor:
    """What is left of a parameter under a trainer that keeps it elsewhere."""
    head = torch.empty(0)
    for name, value in marks.items():
        setattr(head, name, value)
    return head


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*_: object) -> None:
        raise AssertionError("an op ran before the refusal")

    losses = ("support_loss", "select_loss", "mass_loss", "sparse_head", "linear_mass_loss")
    for name in ("select", "rest", "scatter", "spread", "linear_select", *losses):
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
    "temperature negative": (lambda: TopKReverseKLLoss(3, temperature=-1.0), ValueError, "temperature is -1.0"),
    "temperature nan": (lambda: topk_reverse_kl(Z, W, k=3, temperature=float("nan")), ValueError, "temperature is nan"),
    "temperature a tensor": (
        lambda: topk_reverse_kl(Z, W, k=3, temperature=torch.ones(())),
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
    "aggregate denominator": (lambda: aggregate(Z, Z, "token-sum", denominator=3), ValueError, "divides by nothing"),
    "special tokens float": (lambda: special_token_mask(Z, [1]), TypeError, "response_ids is torch.float32"),
    "special tokens text": (lambda: special_token_mask(IDS, "<think>"), TypeError, "token_ids is a str"),
    "special tokens occurrences": (
        lambda: special_token_mask(IDS, [1], "last"),
        ValueError,
        "occurrences is 'last'; use 'first' or 'all'",
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
        r"student_weight has shape \(2000,\).*a sharded one: gathered first",
    ),
    "linear: quantised head": (
        lambda: linear_topk_reverse_kl(Z, HEAD.to(torch.int8), S),
        TypeError,
        "student_weight is torch.int8; a quantised head must be given dequantised",
    ),
    "linear: DTensor head": (
        lambda: linear_topk_reverse_kl(Z, sharded(full_tensor=None), S),
        TypeError,
        r"student_weight is sharded, a DTensor; pass student_weight.full_tensor\(\)",
    ),
    "linear: ZeRO-3 head": (
        lambda: linear_topk_reverse_kl(Z, sharded(ds_id=3), S),
        ValueError,
        "student_weight is partitioned by DeepSpeed.*GatheredParameters",
    ),
    "linear: mixed dtypes": (
        lambda: linear_topk_reverse_kl(Z.bfloat16(), HEAD, S),
        TypeError,
        "student_weight is torch.float32 and student_hidden torch.bfloat16; cast one",
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
        lambda: linear_topk_reverse_kl(Z, HEAD, S, student_bias=torch.randn(50).half()),
        TypeError,
        "student_bias is torch.float16 and student_hidden torch.float32",
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
        "softcap is 0.0; it must be positive, or None for no cap",
    ),
    "linear: weight_grad": (
        lambda: LinearTopKReverseKLLoss(weight_grad="none"),
        ValueError,
        "weight_grad is 'none'; use 'dense' or 'sparse'",
    ),
    "divergence a class": (
        lambda: topk_divergence(Z, W, k=3, divergence=ForwardKL),
        TypeError,
        r"divergence is the class ForwardKL; pass an instance, such as ForwardKL\(",
    ),
    "divergence a name": (
        lambda: topk_divergence(Z, W, k=3, divergence="jsd"),
        TypeError,
        r"divergence is a str; use ReverseKL\(\)",
    ),
    "divergence beta": (
        lambda: topk_divergence(Z, W, k=3, divergence=JensenShannon(1.0)),
        ValueError,
        "divergence.beta is 1.0; it must be between 0 and 1.*generalized_jsd",
    ),
    "divergence lam": (
        lambda: topk_divergence(Z, W, k=3, divergence=Mixture(-0.1)),
        ValueError,
        "divergence.lam is -0.1; it must be from 0",
    ),
    "divergence skew lam": (
        lambda: linear_topk_divergence(Z, HEAD, S, divergence=SkewForwardKL(1)),
        ValueError,
        "divergence.lam is 1; it must be at least 0 and below 1",
    ),
    "divergence alpha": (
        lambda: topk_divergence(Z, W, k=3, divergence=AlphaBeta(float("inf"), 0)),
        ValueError,
        "divergence.alpha is inf; it must be finite",
    ),
    "divergence clamp of one": (
        lambda: topk_divergence(Z, W, k=3, divergence=ReverseKL(clamp=5.0)),
        TypeError,
        r"divergence.clamp is 5.0; it must be \(low, high\)",
    ),
    "divergence clamp upside down": (
        lambda: topk_divergence(Z, W, k=3, divergence=ReverseKL(clamp=(1, -1))),
        ValueError,
        r"divergence.clamp is \(1, -1\); it must be \(low, high\) with low <= high",
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
        lambda: topk_divergence(Z, W, k=3, diagnostics="student_mass"),
        TypeError,
        "diagnostics is 'student_mass'; it must be a sequence",
    ),
    "diagnostics unknown": (
        lambda: topk_divergence(Z, W, k=3, diagnostics=("entropy",)),
        ValueError,
        "diagnostics has 'entropy'; use some of student_mass",
    ),
    "diagnostics of teacher logits": (
        lambda: topk_divergence(Z, S, diagnostics=("teacher_entropy",)),
        ValueError,
        "'teacher_entropy', but teacher is a Support",
    ),
    "diagnostics without samples": (
        lambda: linear_topk_divergence(Z, HEAD, S, diagnostics=("sampled_in_support",)),
        ValueError,
        "sampled_ids is None, but 'sampled_in_support' needs",
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


def test_views_that_do_not_overlap_may_be_overwritten() -> None:
    for view in (Z, Z[:, :-1], Z.t(), Z[::2, ::3], Z[:1].expand(1, -1), torch.randn(2, 3, 4)[:, :, 1:]):
        with pytest.raises(AssertionError, match="an op ran"):
            topk_reverse_kl(view, torch.randn(view.shape), k=2, overwrite_student_logits=True)

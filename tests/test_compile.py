"""Promise: compile. The public functions under torch.compile(fullgraph=True), with numbers that change by the call."""

import ast
import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import ConstructorMoverPass
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import topk_rkl
from topk_rkl import (
    AlphaBeta,
    JensenShannon,
    Mixture,
    ReverseKL,
    linear_teacher_topk,
    linear_topk_divergence,
    linear_topk_reverse_kl,
    ops,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
)
from topk_rkl.diagnostics import topk_diagnostics
from topk_rkl.objective import pack
from topk_rkl.recipe import builders, composition, rewards, rollout, weighting

V, K, H = 50, 6, 8
HEAD = torch.randn(V, H, generator=torch.Generator().manual_seed(1))

Call = Callable[[Tensor, Tensor, float], Tensor]


def diagnosed(z: Tensor, w: Tensor, t: float) -> Tensor:
    names = ("student_mass", "teacher_mass", "overlap_count", "overlap_token_advantage", "top1_agreement",
             "student_entropy", "teacher_entropy", "max_log_ratio")  # fmt: skip
    found = topk_diagnostics(z, w, names, k=K, temperature=1 + t)
    return topk_reverse_kl(z, w, k=K, temperature=1 + t) + sum(x.float().sum() for x in found.values())


def rewarded(z: Tensor, w: Tensor, t: float) -> Tensor:
    log_p, log_q = -z.abs(), -w.abs()
    given = (
        rewards.log_ratio(log_p, log_q, clip=(-t, t)),
        rewards.tanh_log_ratio(log_p, log_q, tau=t),
        rewards.power_difference(log_p, log_q, alpha=t),
        rewards.box_cox(log_p, log_q, alpha=t),
        rewards.extrapolated_log_ratio(log_p, log_q, log_q * 2, lam=t),
        rewards.return_to_go(log_q, gamma=t),
    )
    return sum((x * z).sum() for x in given)


def tokens(z: Tensor, w: Tensor, n: int) -> Tensor:
    return topk_reverse_kl(z, w, k=K, denominator=n)


def annealed(z: Tensor, w: Tensor, t: float) -> Tensor:
    """Distillation takes over from cross entropy, while a number changes in each place where one becomes a tensor."""
    kinds = "denominator", "logit options of the tail", "residual", "rewards", "sampled token"
    return (1 - t) * z.logsumexp(-1).mean() + t * sum(CALLS[kind](z, w, t) for kind in kinds)


# A function of the logits and of one number t, from 0 to 1, which changes at every call.
CALLS: dict[str, Call] = {
    "temperature": lambda z, w, t: topk_reverse_kl(z, w, k=K, temperature=1 + t),
    "temperature of a Support": lambda z, w, t: topk_reverse_kl(z, teacher_topk(w, K), temperature=1 + t),
    "temperature of the tail": lambda z, w, t: topk_divergence(z, w, k=K, mass="tail", temperature=1 + t),
    "denominator": lambda z, w, t: topk_reverse_kl(z, w, k=K, denominator=10 * t),
    "logit options": lambda z, w, t: linear_topk_reverse_kl(
        z[:, :H], HEAD, w, k=K, logit_scale=1 + t, softcap=2 - t
    ),
    "logit options of the tail": lambda z, w, t: linear_topk_divergence(
        z[:, :H], HEAD, w, k=K, mass="tail", softcap=1 + t, temperature=2 - t
    ),
    "logit options of a teacher": lambda z, w, t: topk_reverse_kl(
        z, linear_teacher_topk(w[:, :H], HEAD, K, softcap=1 + t, logit_scale=2 - t)
    ),
    "clamp": lambda z, w, t: topk_divergence(z, w, k=K, divergence=ReverseKL(clamp=(-t, t))),
    "JensenShannon": lambda z, w, t: topk_divergence(z, w, k=K, divergence=JensenShannon(t)),
    "Mixture": lambda z, w, t: topk_divergence(z, w, k=K, divergence=Mixture(t)),
    "AlphaBeta": lambda z, w, t: topk_divergence(z, w, k=K, divergence=AlphaBeta(t, 1 - t), mass="tail"),
    "diagnostics": diagnosed,
    "nucleus of the teacher": lambda z, w, t: topk_reverse_kl(z, builders.teacher_top_p(w, t, K)),
    "mixture": lambda z, w, t: topk_reverse_kl(z, composition.mixture([w, -w], [t, 1 - t], k=K)),
    "residual": lambda z, w, t: topk_reverse_kl(z, composition.residual(w, -w, lam=1 + t, clip=t, k=K)),
    "extrapolation": lambda z, w, t: topk_reverse_kl(z, composition.extrapolation(w, -w, lam=1 + t, k=K)),
    "taid": lambda z, w, t: topk_reverse_kl(z, composition.taid(z, w, t=t, k=K)),
    "veto": lambda z, w, t: topk_reverse_kl(z, composition.veto(z, w, beta=t, k=K)),
    "rewards": rewarded,
    "aggregate": lambda z, w, t: weighting.aggregate(z, w > 0, denominator=t)
    + weighting.aggregate(z, w > 0, "seq-mean-token-sum-norm", norm=t),
    "nucleus": lambda z, w, t: rollout.top_p_filter(z + w, t, 1 + t).softmax(-1).square().sum(),
    "sampled token": lambda z, w, t: rollout.sampled_token_loss(z, w, w.argmax(-1), temperature=1 + t),
}  # fmt: skip

SCHEDULE = (0.1, 0.2, 0.3)


def value_and_gradient(call: Call, t: float, n: int) -> tuple[Tensor, Tensor]:  # (), (n, V)
    z, w = torch.randn(2, n, V, generator=torch.Generator().manual_seed(round(100 * t) + n))
    loss = call(z.requires_grad_(), w, t)
    loss.backward()
    return loss.detach(), z.grad


@functools.cache
def compilations() -> int:
    """Of plain PyTorch over the schedule: two, but older torch compiles 1 + t anew for every t."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, t: x * (1 + t), backend=counter, fullgraph=True)
    for t in SCHEDULE:
        compiled(torch.ones(2), t)
    return counter.frame_count


def compare(compiled: Call, call: Call, t: float, n: int = 4) -> None:
    for got, want in zip(value_and_gradient(compiled, t, n), value_and_gradient(call, t, n), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_compile_with_a_number_that_changes(name: str) -> None:
    most = compilations()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name], backend=counter, fullgraph=True)
    for t in SCHEDULE:
        compare(compiled, CALLS[name], t)
    assert counter.frame_count <= most


@pytest.mark.slow
@pytest.mark.parametrize("name", ["temperature", "logit options of the tail", "diagnostics", "sampled token"])
def test_compile_with_every_size_dynamic(name: str) -> None:
    most = compilations()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name], backend=counter, fullgraph=True, dynamic=True)
    for t, n in zip(SCHEDULE, (4, 5, 7), strict=True):
        compare(compiled, CALLS[name], t, n)
    assert counter.frame_count <= most


@pytest.mark.slow
def test_compile_with_a_number_of_tokens_as_denominator() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tokens, backend=counter, fullgraph=True)
    for n in (100, 120, 90):
        compare(compiled, tokens, n)
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_compile_with_inductor_keeps_no_old_number(monkeypatch, tmp_path) -> None:
    """Each call alone is right with aot_eager; Inductor is given some at once, since it takes long to begin."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # without what another run left
    torch._dynamo.reset()
    compiled = torch.compile(annealed, fullgraph=True)
    for t in (*SCHEDULE, 0.4):
        compare(compiled, annealed, t)


def test_cuda_graphs_repeat_no_old_number(monkeypatch) -> None:
    """An op reads its objective on the host, which no CUDA graph would do again: it is left out of graphs, and what it
    reads stays there. Of an op without one a graph may be captured."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        logits = torch.empty(4, V, device="cuda")
        slots = torch.empty(4, K, dtype=torch.int32, device="cuda"), torch.empty(4, K, device="cuda")
        call = partial(ops.support_loss, logits, *slots, None)
        traced = make_fx(
            lambda: (call(pack(temperature=0.7, softcap=3.0), "auto"), call(None, "auto")), select_decomp_table()
        )()
    ConstructorMoverPass("cuda", allow_inputs=True, allow_outputs=True)(traced.graph)
    nodes = {node.target: node for node in traced.graph.nodes if node.op == "call_function"}
    under_objective, plain = (getattr(torch.ops.topk_rkl.support_loss, x) for x in ("objective", "default"))
    assert torch.Tag.cudagraph_unsafe in under_objective.tags and torch.Tag.cudagraph_unsafe not in plain.tags
    assert nodes[under_objective].args[4] is not None and nodes[plain].args[4] is None
    made = [node.kwargs["device"].type for node in traced.graph.nodes if "device" in node.kwargs]
    assert made and set(made) == {"cpu"}


# Each has a Function whose forward pass ends with a conversion.
CONVERTING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a temperature per position": lambda z, w: topk_reverse_kl(z, w, k=K, temperature=w[..., 0].abs() + 1),
    "the baseline": lambda z, w: rollout.sampled_token_loss(z, w, w.argmax(-1)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONVERTING)
def test_no_forward_pass_returns_a_tensor_that_has_another_name(name: str, dtype: torch.dtype) -> None:
    """torch 2.11 gives it a gradient of 0 (pytorch/pytorch#180642); others have the same graph."""
    bodies = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        bodies.extend(body for place, body in graph.named_children() if place.startswith("fwd_body"))
        return graph.forward

    torch._dynamo.reset()
    call = CONVERTING[name]
    z, w = torch.randn(2, 4, V, dtype=dtype)
    leaf, eager = z.clone().requires_grad_(), z.clone().requires_grad_()
    torch.compile(call, backend=keep, fullgraph=True)(leaf, w).backward()
    call(eager, w).backward()
    torch.testing.assert_close(leaf.grad, eager.grad)
    assert bodies
    for body in bodies:
        *nodes, last = body.graph.nodes
        values = [id(x.meta["example_value"]) for x in nodes if isinstance(x.meta.get("example_value"), Tensor)]
        returned = last.args[0][0][0].meta["example_value"]
        assert values.count(id(returned)) == 1


def test_one_token_is_exactly_zero_compiled() -> None:
    """Without the warning, which torch.compile does not trace."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, w: topk_reverse_kl(z, w, k=1), backend="aot_eager", fullgraph=True)
    z, w = torch.randn(2, 4, V)
    assert compiled(z, w).item() == 0


def test_nothing_that_is_traced_names_strict() -> None:
    """Dynamo of torch 2.7 and 2.8 cannot trace zip(strict=)."""
    root = Path(topk_rkl.__file__).parent
    for file in (*root.glob("*.py"), *root.glob("recipe/*.py")):
        calls = (x for x in ast.walk(ast.parse(file.read_text())) if isinstance(x, ast.Call))
        assert not [x.lineno for x in calls for y in x.keywords if y.arg == "strict"], file

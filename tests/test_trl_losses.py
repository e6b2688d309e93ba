"""The losses for TRL's trainers against TRL's own with all tokens, and against formulas in float64 with K of them."""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.formulas import FORMULAS, kl, plain
from topk_rkl.loss import ForwardKL, JensenShannon, Support, linear_topk_divergence, teacher_topk, topk_divergence
from topk_rkl.trainers.trl_losses import (
    WATCHED,
    chunked_divergence_loss,
    chunked_jsd_loss,
    generalized_jsd_loss,
    server_forward_kl_loss,
    topk_self_distillation_loss,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("trl")]  # whose import takes seconds: one worker has it
B, T, V, K, H = 2, 5, 23, 6, 8
JSD = {  # the trainers that call generalized_jsd_loss
    "GKDTrainer": "trl.experimental.gkd.gkd_trainer",
    "GOLDTrainer": "trl.experimental.gold.gold_trainer",
    "IWOPDTrainer": "trl.experimental.iw_opd.iw_opd_trainer",
}
ITS_OWN = {"GKDTrainer": "", "GOLDTrainer": "logits_are_probs=False ", "IWOPDTrainer": "top_k=0 add_tail=True "}
# Each hook: where TRL defines it, the method that looks it up there, how that method names it, and its parameters.
HOOKS = {
    **{
        f"{name}.generalized_jsd_loss": (
            f"{module}.{name}.generalized_jsd_loss", f"{module}.{name}.compute_loss", "self.generalized_jsd_loss(",
            "student_logits teacher_logits labels=None beta=0.5 temperature=1.0 reduction='batchmean' "
            f"{ITS_OWN[name]}num_items_in_batch=None",
        )
        for name, module in JSD.items()
    },
    "_chunked_divergence_loss": (
        "trl.trainer.distillation_trainer._chunked_divergence_loss",
        "trl.trainer.distillation_trainer.DistillationTrainer._compute_loss", " _chunked_divergence_loss(",
        "student_hidden_states teacher_hidden_states student_lm_head_weight teacher_lm_head_weight completion_mask "
        "beta num_items_in_batch=None student_lm_head_bias=None teacher_lm_head_bias=None student_logit_scale=1.0 "
        "teacher_logit_scale=1.0 student_final_logit_softcapping=None teacher_final_logit_softcapping=None "
        "temperature=1.0",
    ),
    "compute_topk_self_distillation_loss": (
        "trl.experimental.sdpo.sdpo_trainer.compute_topk_self_distillation_loss",
        "trl.experimental.sdpo.sdpo_trainer.SDPOTrainer._compute_self_distillation_loss",
        " compute_topk_self_distillation_loss(",
        "student_logits teacher_logits distillation_topk distillation_alpha distillation_add_tail",
    ),
    "_compute_server_forward_kl_loss": (
        "trl.experimental.server_distillation.ServerDistillationTrainer._compute_server_forward_kl_loss",
        "trl.experimental.server_distillation.ServerDistillationTrainer.compute_loss",
        "self._compute_server_forward_kl_loss(",
        "self teacher_result student_log_probs labels",
    ),
    "_chunked_jsd_loss": (
        "trl.experimental.async_distillation.async_distillation_trainer._chunked_jsd_loss",
        "trl.experimental.async_distillation.async_distillation_trainer.AsyncDistillationTrainer._compute_loss",
        "_chunked_jsd_loss(",
        "hidden_valid lm_head_weight lm_head_bias logit_scale final_logit_softcapping target_ids teacher_target_logps "
        "valid_candidate_mask beta temperature add_tail_bucket teacher_id_idx num_teachers chunk_size",
    ),
    "_generate_and_score_completions": (
        "trl.trainer.distillation_trainer.DistillationTrainer._generate_and_score_completions",
        "trl.trainer.distillation_trainer.DistillationTrainer._prepare_inputs",
        "self._generate_and_score_completions(", "self inputs",
    ),
    "_compute_self_distillation_loss": (
        "trl.experimental.sdpo.sdpo_trainer.SDPOTrainer._compute_self_distillation_loss",
        "trl.experimental.sdpo.sdpo_trainer.SDPOTrainer.compute_loss", "self._compute_self_distillation_loss(",
        "self model inputs distillation_logits",
    ),
}  # fmt: skip


def found(path: str) -> Any:
    """What stands at a dotted path."""
    module, rest = path, []
    while True:
        try:
            value = import_module(module)
        except ModuleNotFoundError:
            module, _, name = module.rpartition(".")
            rest.append(name)
        else:
            break
    for name in reversed(rest):
        value = getattr(value, name)
    return value


def parameters(function: Callable) -> list[str]:
    return [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize("hook", HOOKS)
def test_trl_has_its_hook_where_it_was_and_as_it_was(hook: str) -> None:
    path, user, call, signature = HOOKS[hook]
    assert parameters(found(path)) == signature.split(), f"TRL has changed the signature of {path}"
    source = inspect.getsource(inspect.unwrap(found(user)))
    assert call in source, f"TRL no longer calls {hook} in {user}"


@pytest.mark.parametrize(
    "hook", ["_chunked_divergence_loss", "compute_topk_self_distillation_loss", "_chunked_jsd_loss"]
)
def test_ours_has_the_signature_of_theirs(hook: str) -> None:
    ours = {
        "_chunked_divergence_loss": chunked_divergence_loss, "_chunked_jsd_loss": chunked_jsd_loss,
        "compute_topk_self_distillation_loss": topk_self_distillation_loss,
    }[hook]()  # fmt: skip
    theirs = found(HOOKS[hook][0])
    kinds = ([p.kind for p in inspect.signature(f).parameters.values()] for f in (ours, theirs))
    assert parameters(ours) == parameters(theirs)
    assert next(kinds) == next(kinds)


@pytest.mark.parametrize("trainer", JSD)
def test_ours_takes_every_argument_of_theirs(trainer: str) -> None:
    theirs = parameters(found(f"{JSD[trainer]}.{trainer}.generalized_jsd_loss"))
    ours = parameters(generalized_jsd_loss())
    assert ours[:6] == theirs[:6]
    assert set(theirs) <= set(ours)


def logits() -> tuple[Tensor, Tensor, Tensor]:
    """Of student and teacher, (B, T, V) float64, and labels (B, T) with some that do not count."""
    labels = torch.randint(V, (B, T))
    labels[0, :2] = labels[1, -1] = -100
    return *(3 * torch.randn(2, B, T, V, dtype=torch.float64)), labels


def graded(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    value = loss(z)
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float = 1e-12) -> None:
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("trainer", JSD)
@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_all_tokens_and_beta_give_the_loss_of_trl(trainer: str, beta: float) -> None:
    theirs, ours = found(f"{JSD[trainer]}.{trainer}.generalized_jsd_loss"), generalized_jsd_loss(V, divergence="beta")
    z, w, labels = logits()
    for options in (
        {"labels": labels, "num_items_in_batch": torch.tensor(11)}, {"labels": labels, "temperature": 0.7},
        {"labels": labels, "reduction": "sum"}, {"labels": labels, "reduction": "sum", "num_items_in_batch": 3}, {},
        {"labels": torch.full_like(labels, -100)},
    ):  # fmt: skip
        close(*(graded(lambda z, f=f: f(z, w, beta=beta, **options), z) for f in (ours, theirs)))  # noqa: B023


@pytest.mark.parametrize("mass", ["renormalized", "tail"])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_beta_is_not_read_unless_it_is_asked_for(mass: str, beta: float) -> None:
    z, w, labels = logits()
    ids, rows = w.flatten(0, 1).topk(K).indices, (labels != -100).flatten()

    def wanted(formula: Callable) -> Callable[[Tensor], Tensor]:
        return lambda z: plain(z.flatten(0, 1), w.flatten(0, 1), ids, formula, mass, 0.7)[rows].sum() / 9

    followed = FORMULAS[ForwardKL() if beta == 0 else JensenShannon()] if beta < 1 else kl
    for divergence, formula in ({}, kl), ({"divergence": "beta"}, followed):
        loss = generalized_jsd_loss(K, mass=mass, **divergence)
        ours = graded(lambda z, f=loss: f(z, w, labels, beta, 0.7, num_items_in_batch=9), z)
        close(ours, graded(wanted(formula), z), 1e-9)


def test_what_trl_means_otherwise_is_refused() -> None:
    z, w, labels = logits()
    with pytest.raises(ValueError, match="logits_are_probs is True, as GOLD's ULD loss has it"):
        generalized_jsd_loss(K)(z, w, labels, logits_are_probs=True)
    for reduction in ("mean", "none"):
        with pytest.raises(
            ValueError, match=f"reduction is '{reduction}', over the vocabulary in TRL; use 'batchmean'"
        ):
            generalized_jsd_loss(K)(z, w, labels, reduction=reduction)
    with pytest.raises(ValueError, match="divergence is 'jsd'; it must be \"beta\", a Divergence or a function"):
        generalized_jsd_loss(K, divergence="jsd")
    with pytest.raises(ValueError, match="mass is 'ema_pg'; use one of renormalized, tail, raw, raw_stop_grad"):
        generalized_jsd_loss(K, mass="ema_pg")
    with pytest.raises(ValueError, match="k is 0; it must be a positive int"):
        chunked_divergence_loss(0)
    with pytest.raises(ValueError, match="diagnostics is 'sampled_log_prob'; use one of student_mass"):
        chunked_divergence_loss(diagnostics=["sampled_log_prob"])
    with pytest.raises(TypeError, match="diagnostics is 'student_mass'; it must be a sequence of names"):
        chunked_divergence_loss(diagnostics="student_mass")
    with pytest.raises(ValueError, match="support is 'both'; use one of teacher, student"):
        topk_self_distillation_loss(support="both")


def heads(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The arguments of _chunked_divergence_loss, the teacher wider than the student."""
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, 3:] = mask[1, 1] = 0
    return {
        "student_hidden_states": torch.randn(B, T, H, dtype=dtype),
        "teacher_hidden_states": torch.randn(B, T, 2 * H, dtype=dtype),
        "student_lm_head_weight": torch.randn(V, H, dtype=dtype), "completion_mask": mask,
        "teacher_lm_head_weight": torch.randn(V, 2 * H, dtype=dtype) / 2,
        "student_lm_head_bias": torch.randn(V, dtype=dtype), "teacher_lm_head_bias": torch.randn(V, dtype=dtype),
    }  # fmt: skip


OPTIONS = [
    {}, {"num_items_in_batch": torch.tensor(17.0), "temperature": 0.7},
    {"student_logit_scale": 0.25, "teacher_logit_scale": 0.5, "temperature": 1.3, "num_items_in_batch": 4,
     "student_final_logit_softcapping": 2.0, "teacher_final_logit_softcapping": 3.0},
]  # fmt: skip
LEAVES = ("student_hidden_states", "student_lm_head_weight", "student_lm_head_bias")


def outcome(loss: Callable, tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """The three values and the three gradients."""
    leaves = {name: tensors[name].clone().requires_grad_() for name in LEAVES}
    value, entropy, count = loss(**{**tensors, **leaves}, **options)
    assert not entropy.requires_grad or loss.__module__.startswith("trl")
    return value.detach(), entropy.detach(), count, *torch.autograd.grad(value, list(leaves.values()))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", OPTIONS, ids=range(3))
def test_from_hidden_states_all_tokens_give_the_loss_and_the_entropy_of_trl(beta: float, options: dict) -> None:
    theirs, tensors = found(HOOKS["_chunked_divergence_loss"][0]), heads()
    ours = chunked_divergence_loss(V, divergence="beta")
    close(*(outcome(f, tensors, beta=beta, **options) for f in (ours, theirs)), 2e-5)


@pytest.mark.parametrize("mass", ["renormalized", "tail", "raw_stop_grad"])
@pytest.mark.parametrize("options", OPTIONS, ids=range(3))
def test_from_hidden_states_k_tokens_give_the_formula(mass: str, options: dict) -> None:
    tensors, watched = heads(torch.float64), []

    def formula(
        student_hidden_states: Tensor, student_lm_head_weight: Tensor, student_lm_head_bias: Tensor, **rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, H), (V, H), (V,)
        kept, at = tensors["completion_mask"].bool(), options.get("temperature", 1.0)
        z = student_hidden_states[kept] @ student_lm_head_weight.T + student_lm_head_bias
        w = rest["teacher_hidden_states"][kept] @ rest["teacher_lm_head_weight"].T + rest["teacher_lm_head_bias"]
        both = []
        for side, x in ("student", z), ("teacher", w):
            cap, x = options.get(f"{side}_final_logit_softcapping"), x * options.get(f"{side}_logit_scale", 1.0)
            both.append(x if cap is None else cap * torch.tanh(x / cap))
        z, w = both
        log_p = (z / at).log_softmax(-1)
        ids = w.topk(K).indices
        mass_on_s.append(log_p.gather(1, ids).exp().sum(1).detach())
        count = torch.as_tensor(options.get("num_items_in_batch", kept.sum()))
        return plain(z, w, ids, kl, mass, at).sum() / count, -(log_p.exp() * log_p).sum(), kept.sum()

    mass_on_s: list[Tensor] = []
    formula.__module__ = "trl"
    loss = chunked_divergence_loss(
        K, mass=mass, diagnostics=["student_mass", "student_entropy"], watch=watched.append
    )  # fmt: skip
    close(outcome(loss, tensors, beta=0.0, **options), outcome(formula, tensors, **options), 1e-9)
    close((watched[0]["student_mass"],), (mass_on_s[0],), 1e-9)


def test_an_entropy_that_was_not_asked_for_is_no_number() -> None:
    _, entropy, count = chunked_divergence_loss(K, diagnostics=())(**heads(), beta=1.0)
    assert entropy.isnan()
    assert count == 7


def test_without_a_token_that_counts_the_loss_is_0_with_a_gradient_of_0() -> None:
    tensors = heads() | {"completion_mask": torch.zeros(B, T)}
    value, entropy, count, *grads = outcome(chunked_divergence_loss(K, diagnostics=WATCHED), tensors, beta=1.0)
    assert (value, entropy, count) == (0, 0, 0)
    assert all(x.count_nonzero() == 0 for x in grads)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_recipe_of_sdpo_gives_the_loss_of_sdpo(alpha: float, tail: bool) -> None:
    theirs = found(HOOKS["compute_topk_self_distillation_loss"][0])
    ours = topk_self_distillation_loss(divergence="beta", support="student")
    z, w, _ = logits()
    options = {"distillation_topk": K, "distillation_alpha": alpha, "distillation_add_tail": tail}
    close(*(graded(lambda z, f=f: f(z, w, **options), z) for f in (ours, theirs)), 1e-6)
    with_teachers = graded(lambda z: topk_self_distillation_loss()(z, w, **options), z)
    rows = [x.flatten(0, 1) for x in (z, w)]
    mass, ids = "tail" if tail else "renormalized", rows[1].topk(K).indices
    wanted = graded(lambda z: plain(z, rows[1], ids, kl, mass), rows[0])
    close(tuple(x.flatten(0, 1) for x in with_teachers), wanted, 1e-9)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_async_trainer_would_get_its_loss_and_its_five_sums(beta: float, tail: bool) -> None:
    theirs, ours = found(HOOKS["_chunked_jsd_loss"][0]), chunked_jsd_loss(divergence="beta")
    n, at = 9, 0.7
    hidden, weight, bias = torch.randn(n, H), torch.randn(V, H) / 2, torch.randn(V)
    support = teacher_topk(2 * torch.randn(n, V) / at, K, normalize=True)  # of a server, at T already
    candidates = torch.rand(n, K) < 0.8
    candidates[:, 0] = True
    teachers = torch.randint(2, (n,))

    def run(loss: Callable) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        sums = loss(
            *leaves, 0.5, 4.0, support.ids.long(), support.log_probs, candidates, beta, at, tail, teachers, 3, 4
        )  # fmt: skip
        return *(x.detach() for x in sums), *torch.autograd.grad(sums[0], leaves)

    close(run(ours), run(theirs), 1e-4)  # theirs is float32
    alone = ours(hidden, weight, bias, 0.5, 4.0, *support.tensors, candidates, beta, at, tail, None, 3, 4)
    assert alone[4].tolist() == [0] * 9


def test_a_server_that_divided_already_is_not_divided_again() -> None:
    z, w, labels = logits()
    at, count = 0.7, (labels != -100).sum()
    ids, log_probs = teacher_topk(w / at, K, normalize=True).tensors
    log_probs[0, 0] = -torch.inf  # as TRL fills up what does not count
    answer = {"topk_token_ids": ids.long(), "topk_logprobs": log_probs}
    rows = [x.flatten(0, 1) for x in (z, w)]
    ids, kept = rows[1].topk(K).indices, (labels != -100).flatten()
    exact = {
        mass: graded(lambda z, m=mass: plain(z, rows[1], ids, kl, m, at)[kept].sum() / count, rows[0])
        for mass in ("renormalized", "tail")
    }
    for mass, (value, grad) in exact.items():
        loss = server_forward_kl_loss(mass=mass)
        ours = graded(lambda z, f=loss: f(answer, (z / at).log_softmax(-1), labels), z)
        close(ours, (value, grad.view_as(z)), 1e-9)
    support = Support(*answer.values())
    right = topk_divergence(z, support, temperature=at, teacher_temperature=1.0, weights=labels != -100)
    twice = topk_divergence(z, support, temperature=at, weights=labels != -100)
    close((right,), exact["renormalized"][:1], 1e-9)
    assert (twice - right).abs() > 0.1 * right
    with pytest.raises(ValueError, match=r"teacher_temperature=1\.0"):
        topk_divergence(z, support, mass="tail", temperature=at)


def test_a_server_of_forward_kl_gives_the_loss_of_trl() -> None:
    z, w, labels = logits()
    ids, log_probs = teacher_topk(w, K, normalize=True).tensors
    log_probs[:, :, 4:] = -torch.inf
    answer = {"topk_token_ids": ids.long(), "topk_logprobs": log_probs}
    trainer = found("trl.experimental.server_distillation.ServerDistillationTrainer")
    stand_in = type("", (), {"loss_add_tail": False, "_reduce_divergence_loss": trainer._reduce_divergence_loss})
    theirs = graded(
        lambda z: trainer._compute_server_forward_kl_loss(stand_in, answer, z.log_softmax(-1), labels), z
    )  # fmt: skip
    ours = server_forward_kl_loss(divergence="beta")
    close(graded(lambda z: ours(answer, z.log_softmax(-1), labels), z), theirs, 1e-9)


def test_the_linear_loss_takes_a_teacher_at_the_temperature() -> None:
    """The double temperature from hidden states, where the support is of a server."""
    z, w, at = torch.randn(4, H).double(), torch.randn(4, V).double(), 0.5
    weight = torch.randn(V, H).double()
    support = teacher_topk(w / at, K, normalize=True)
    options = {"temperature": at, "mass": "tail", "teacher_temperature": 1.0, "reduction": "none"}
    wanted = plain(z @ weight.T, w, w.topk(K).indices, kl, "tail", at)
    close((linear_topk_divergence(z, weight, support, **options),), (wanted,), 1e-9)

"""verl: its registry, its configuration, its two calls of a top-K loss, and an update of an actor."""

import inspect
import math
import os
import shlex
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import verl.trainer.distillation.fsdp.losses as fsdp_losses
import verl.trainer.distillation.losses as losses
import verl.utils.tensordict_utils as tu
from torch import Tensor
from verl.utils import ulysses
from verl.utils.metric import Metric
from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig, FSDPActorConfig

from tests.trainers.pages import blocks, scope_of
from tests.trainers.small import VOCAB, tiny
from tests.trainers.two import on_two
from tests.trainers.verl_on_cpu import RESPONSES, ROWS, K, batch, begin, jagged
from topk_rkl.loss import JensenShannon, Support, topk_divergence, topk_reverse_kl
from topk_rkl.trainers import verl as ours

PROJECT = "verl"

pytestmark = pytest.mark.filterwarnings("ignore")  # of verl's own, on a CPU


def actor_config(strategy: str = "fsdp") -> ActorConfig:
    made = FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="token-mean")
    if strategy != "fsdp":
        made = types.SimpleNamespace(**{**vars(made), "strategy": strategy})
    return made


def distillation_config(mode: str, use_policy_gradient: bool = False) -> DistillationConfig:
    asked = {"loss_mode": mode, "topk": K, "use_task_rewards": False, "use_policy_gradient": use_policy_gradient}
    return DistillationConfig(distillation_loss=DistillationLossConfig(log_prob_min_clamp=None, **asked))


def both_stages(mode: str, data: Any, logits: Tensor) -> tuple[Tensor, dict[str, float]]:
    """As FSDPEngineWithLMHead calls them: beside the logits, then on whole sequences."""
    call = partial(losses.distillation_ppo_loss, config=actor_config(), distillation_config=distillation_config(mode))
    outputs = call(student_logits=logits, data=data)
    offsets = data["input_ids"].offsets()
    outputs = {k: torch.nested.nested_tensor_from_jagged(v.squeeze(0), offsets) for k, v in outputs.items()}
    loss, metrics = call(model_output=outputs, data=data)
    return loss, {k: float(x.aggregate() if isinstance(x, Metric) else x) for k, x in metrics.items()}


def formula(data: Any, logits: Tensor, of_teacher: Any = 1.0) -> tuple[Tensor, Tensor]:
    """The mean over the responses' tokens in float64, and its gradient."""
    z = logits.detach().double().requires_grad_()
    ids, log_probs = data["teacher_ids"].values().long()[ROWS], data["teacher_logprobs"].values().double()[ROWS]
    log_p = z[0, ROWS].gather(1, ids).log_softmax(1)
    log_q = (log_probs / of_teacher).log_softmax(1)
    loss = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    loss.backward()
    return loss.detach(), z.grad


def assert_formula(mode: str, data: Any, logits: Tensor, truth: tuple[Tensor, Tensor]) -> dict[str, float]:
    z = logits.detach().requires_grad_()
    loss, metrics = both_stages(mode, data, z)
    loss.backward()
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(z.grad.double(), truth[1], rtol=1e-5, atol=1e-8)
    return metrics


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "default", "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)


def test_verl_knows_the_name_in_a_process_that_imports_verl_alone() -> None:
    """`import verl` registers loss_mode=topk_reverse_kl through the entry point"""
    code = "import verl; from verl.trainer.distillation import losses; print(*losses.DISTILLATION_LOSS_REGISTRY)"
    assert {"topk_reverse_kl", "forward_kl_topk", "k1"} <= set(python(code).stdout.split())


MOVED = """
import importlib.metadata, verl
from verl.trainer.distillation import losses
losses.compute_topk_loss = lambda config, data, logits: 0
point, = (p for p in importlib.metadata.entry_points(group="verl.plugins") if p.name == "topk_rkl")
try:
    point.load()
except Exception as error:
    print(type(error).__name__, "topk_reverse_kl" in losses.DISTILLATION_LOSS_REGISTRY)
"""


def test_a_verl_that_has_moved_is_left_as_it_is_with_a_warning() -> None:
    """a verl whose functions have changed: one warning, and verl as it was"""
    done = python(MOVED, VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.stdout.split()[-2:] == ["TypeError", "False"]
    said = " ".join(done.stderr.split())
    assert "RuntimeWarning: topk_rkl 0.1.0 cannot add loss_mode=topk_reverse_kl to verl 0.9.1" in said
    assert "compute_topk_loss takes (config, data, logits) there, and not (config, distillation_config" in said


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        *((getattr(losses, name), names) for name, names in ours.PARAMETERS.items() if name != "compute_topk_loss"),
        (losses.no_padding_2_padding, ("tensor", "data")),
        (losses.DistillationLossSettings, ("_target_", "names", "use_topk", "use_estimator")),
        (losses.Metric, ("aggregation", "value")),
        (ulysses.get_ulysses_sequence_parallel_world_size, ("group",)),
        (ulysses.slice_input_tensor, ("x", "dim", "padding", "group")),
        (
            fsdp_losses.compute_forward_kl_topk,
            ("student_logits", "teacher_topk_log_probs", "teacher_topk_ids", "config", "data_format"),
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_functions_of_verl_take_what_we_pass(function: Any, parameters: tuple[str, ...]) -> None:
    """the signatures of the functions that are called or replaced"""
    assert tuple(inspect.signature(function).parameters) == parameters


def test_loss_and_gradient_are_those_of_the_formula_and_the_metrics_are_those_of_verl() -> None:
    """both calls of the loss, against float64; verl's own metrics, against verl's own loss"""
    data, logits = batch(VOCAB)
    found = assert_formula("topk_reverse_kl", data, logits, formula(data, logits))
    _, stock = both_stages("forward_kl_topk", data, logits)
    ours_alone, theirs = (
        {"distillation/max_log_ratio"},
        {"distillation/loss", "distillation/loss_min", "distillation/loss_max"},
    )
    assert found.keys() - stock.keys() == ours_alone and stock.keys() <= found.keys()
    assert "distillation/overlap_ratio" in found and 0.1 < found["distillation/overlap_ratio"] < 1
    for name in stock.keys() - theirs:
        assert found[name] == pytest.approx(stock[name], rel=1e-5), name
    assert abs(found["distillation/loss"] - stock["distillation/loss"]) > 1e-2
    ids, log_q = data["teacher_ids"].values().long()[ROWS], data["teacher_logprobs"].values()[ROWS]
    ratio = logits[0, ROWS].gather(1, ids).log_softmax(1) - log_q.log_softmax(1)
    assert found["distillation/max_log_ratio"] == pytest.approx(float(ratio.abs().max()), rel=1e-5)


def test_the_temperature_of_a_sequence_divides_the_student_once() -> None:
    """a temperature per sequence: the student at it, the teacher at 1 or, if asked, at it too"""
    temperature = torch.tensor([0.5, 1.0, 1.7])
    data, logits = batch(VOCAB, temperature)
    of_rows = temperature.repeat_interleave(data["input_ids"].offsets().diff())
    at_it = logits / of_rows[None, :, None]  # what verl's engine hands on
    assert_formula("topk_reverse_kl", data, at_it, formula(data, at_it))
    ours.register("topk_reverse_kl_at_temperature", match_temperature=True)
    both = formula(data, at_it, of_rows[ROWS][:, None].double())
    assert_formula("topk_reverse_kl_at_temperature", data, at_it, both)
    twice = formula(data, at_it / of_rows[None, :, None], of_rows[ROWS][:, None].double())[0]
    assert len({round(float(x), 3) for x in (formula(data, at_it)[0], both[0], twice)}) == 3
    log_q = data["teacher_logprobs"].values()
    log_q[ROWS[-1], 3] = -9999.0  # of the sequence at 1.7
    slots = torch.where(log_q[ROWS] > -9999, log_q[ROWS] / of_rows[ROWS][:, None], -torch.inf)
    truth = topk_reverse_kl(at_it[0, ROWS].double(), Support(data["teacher_ids"].values()[ROWS], slots.double()))
    loss, _ = both_stages("topk_reverse_kl_at_temperature", data, at_it)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-7)
    log_q[ROWS[-1], 3] = -4.0
    tu.assign_non_tensor(data, temperature=0.5)  # as verl gives one that is the same for all
    assert_formula("topk_reverse_kl_at_temperature", data, 2 * logits, formula(data, 2 * logits, 0.5))


def test_a_sequence_that_fills_up_a_batch_and_a_log_prob_of_no_token() -> None:
    """a sequence of zeros that fills up a batch, and vLLM's -9999 for a token of probability 0"""
    data, logits = batch(VOCAB)
    log_probs = data["teacher_logprobs"].values()
    log_probs[7:18], data["teacher_ids"].values()[7:18] = 0, 2
    data["response_mask"] = jagged([torch.full((r,), float(i != 1)) for i, r in enumerate(RESPONSES)])
    tu.assign_non_tensor(data, batch_num_tokens=RESPONSES[0] + RESPONSES[2])
    log_probs[4, 6:] = -9999.0
    z = logits.detach().double().requires_grad_()
    rows = [i for i in ROWS if not 7 <= i < 18]
    slots = torch.ones(len(rows), K, dtype=torch.bool)
    slots[rows.index(4), 6:] = False
    ids = data["teacher_ids"].values().long()[rows]
    log_p = z[0, rows].gather(1, ids).masked_fill(~slots, -math.inf).log_softmax(1)
    log_q = log_probs[rows].double().masked_fill(~slots, -math.inf).log_softmax(1)
    terms = torch.where(slots, log_p.exp() * (log_p.masked_fill(~slots, 0) - log_q.masked_fill(~slots, 0)), 0)
    loss = terms.sum(1).mean()
    loss.backward()
    metrics = assert_formula("topk_reverse_kl", data, logits, (loss.detach(), z.grad))
    assert all(map(math.isfinite, metrics.values()))


def test_a_reward_of_the_whole_distribution_is_refused() -> None:
    """use_policy_gradient=True is refused, and what the message advises runs"""
    data, logits = batch(VOCAB)
    config = distillation_config("topk_reverse_kl", use_policy_gradient=True)
    with pytest.raises(ValueError, match=r"set distillation.distillation_loss.use_policy_gradient=False"):
        losses.distillation_ppo_loss(actor_config(), config, data=data, student_logits=logits)
    loss, _ = both_stages("topk_reverse_kl", data, logits)
    assert loss > 0.01


def test_a_loss_that_fused_kernels_computed_is_refused() -> None:
    """use_fused_kernels=True, where verl would compute its own forward KL, is refused"""
    data, _ = batch(VOCAB)
    with pytest.raises(RuntimeError, match=r"set actor_rollout_ref.model.use_fused_kernels=False"):
        losses.distillation_ppo_loss(
            actor_config(),
            distillation_config("topk_reverse_kl"),
            {"distillation_losses": data["teacher_logprobs"]},
            data,
        )


def test_a_name_of_your_own_has_an_objective_of_your_own() -> None:
    """`register`: the block of the page, another divergence with the tail; bad options are refused"""
    scope_of("verl.md")
    ours.register("topk_js", divergence=JensenShannon(0.3), mass="tail")
    data, logits = batch(VOCAB)
    support = Support(data["teacher_ids"].values()[ROWS], data["teacher_logprobs"].values()[ROWS])
    for name, objective in (
        ("topk_jensen_shannon", {"divergence": JensenShannon()}),
        ("topk_js", {"divergence": JensenShannon(0.3), "mass": "tail"}),
    ):
        loss, _ = both_stages(name, data, logits)
        truth = topk_divergence(logits[0, ROWS].double(), support, **objective)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-7)
    for options, message in (
        ({"mass": "raw"}, "mass is 'raw'"),
        ({"mass": "tail", "match_temperature": True}, "match_temperature=True with mass='tail'"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.register("topk_other", **options)
    with pytest.raises(ValueError, match="already registered"):
        ours.register("forward_kl_topk")
    assert both_stages("forward_kl_topk", data, logits)[0] != loss


@pytest.mark.parametrize("mode", ["topk_reverse_kl", "topk_tail"])
def test_the_logits_may_be_overwritten_before_the_backward_pass(mode: str) -> None:
    """log-probs whose backward pass overwrites the logits, as verl's do beside task rewards"""
    if mode == "topk_tail":
        ours.register(mode, mass="tail")
    data, logits = batch(VOCAB)
    tu.assign_non_tensor(data, distillation_only=False)
    grads = []
    for overwritten in (False, True):
        z = logits.clone().requires_grad_()
        made = z * 1.0
        outputs = losses.compute_topk_loss(actor_config(), distillation_config(mode), data, made, "thd")
        if overwritten:
            made.data.fill_(7.0)
        outputs["distillation_losses"].sum().backward()
        grads.append(z.grad)
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def sequence_parallel() -> dict[str, Tensor]:
    """This rank has a part of the packed tokens, filled up to a multiple of the ranks."""
    data, logits = batch(VOCAB)
    ulysses.set_ulysses_sequence_parallel_group(dist.group.WORLD)
    mine = ulysses.slice_input_tensor(logits, dim=1).requires_grad_()
    outputs = losses.compute_topk_loss(actor_config(), distillation_config("topk_reverse_kl"), data, mine, "thd")
    ulysses.set_ulysses_sequence_parallel_group(None)
    outputs["distillation_losses"].sum().backward()
    return {"grad": mine.grad, **{name: x.detach() for name, x in outputs.items()}}


def vocabulary_parallel(data_format: str) -> tuple[dict[str, Tensor], ...]:
    """This rank has a part of the vocabulary. Ours, verl's own, and the loss of one process."""
    from verl.models.mcore import util
    from verl.trainer.distillation.megatron.losses import compute_forward_kl_topk

    data, logits = batch(VOCAB)
    cut = util.preprocess_thd_engine if data_format == "thd" else util.preprocess_bshd_engine
    packed = torch.nested.nested_tensor_from_jagged(logits[0], data["input_ids"].offsets())
    rows = cut(packed, pre_process=True)[0]
    z = rows.chunk(2, -1)[dist.get_rank()].contiguous().requires_grad_()
    ours_asked, theirs_asked = map(distillation_config, ("topk_reverse_kl", "forward_kl_topk"))
    found = losses.compute_topk_loss(actor_config("megatron"), ours_asked, data, z, data_format)
    found["distillation_losses"].sum().backward()
    teacher = data["teacher_logprobs"], data["teacher_ids"]
    stock = compute_forward_kl_topk(z.detach(), *teacher, theirs_asked, data_format)
    log_probs, ids = (cut(x, pre_process=True)[0] for x in teacher)
    whole = rows.double().requires_grad_()
    loss = topk_reverse_kl(whole, Support(ids, log_probs), reduction="none")
    loss.sum().backward()
    truth = {"distillation_losses": loss.detach(), "grad": whole.grad.chunk(2, -1)[dist.get_rank()]}
    return {**{name: x.detach() for name, x in found.items()}, "grad": z.grad}, stock, truth


def every_split() -> list[Any]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    return [sequence_parallel(), vocabulary_parallel("thd"), vocabulary_parallel("bshd")]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Any]]:
    """What both ranks found."""
    return list(zip(*on_two(every_split, tmp_path_factory.mktemp("split")), strict=True))


def test_ranks_that_share_a_sequence_have_their_own_positions(split: list[tuple[Any, Any]]) -> None:
    """Ulysses sequence parallelism on 2 processes with gloo"""
    torch.manual_seed(0)
    data, logits = batch(VOCAB)
    n = logits.shape[1]
    assert n % 2 == 1  # so that the last rank has a position that fills up
    z = logits.requires_grad_()
    whole = losses.compute_topk_loss(actor_config(), distillation_config("topk_reverse_kl"), data, z, "thd")
    whole["distillation_losses"].sum().backward()
    for name, x in {"grad": z.grad, **whole}.items():
        torch.testing.assert_close(torch.cat([part[name] for part in split[0]], 1)[:, :n], x.detach())


@pytest.mark.parametrize("data_format", ["thd", "bshd"])
def test_ranks_that_share_the_vocabulary_agree_with_one(split: list[tuple[Any, Any]], data_format: str) -> None:
    """Megatron's parts of the vocabulary on 2 processes with gloo, against verl's own diagnostics and one process"""
    for found, stock, truth in split[1 if data_format == "thd" else 2]:
        assert found["distillation_losses"].max() > 0.05
        for name in ("distillation_losses", "grad"):
            torch.testing.assert_close(found[name].double(), truth[name], rtol=1e-5, atol=1e-7)
        known = stock["teacher_mass"] < 1.5  # verl fills the last position with zeros
        for name in ("student_mass", "teacher_mass", "overlap_count", "overlap_token_advantage"):
            theirs = stock[name][known].to(found[name].dtype)
            torch.testing.assert_close(found[name][known], theirs, rtol=1e-5, atol=1e-6)


def overrides_of_the_page() -> list[str]:
    words = shlex.split(blocks("verl.md", "sh")[0].replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    return words[3:]


def on_a_cpu(model: Path) -> list[str]:
    """What the page leaves to the user, or to a GPU."""
    actor, teacher = "actor_rollout_ref.actor", "distillation.teacher_models.teacher_model"
    return [
        f"actor_rollout_ref.model.path={model}",
        f"{teacher}.model_path={model}",
        f"{teacher}.inference.tensor_model_parallel_size=1",
        "distillation.n_gpus_per_node=1",
        "distillation.distillation_loss.topk=8",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "+actor_rollout_ref.model.load_tokenizer=False",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=3",
        f"{actor}.strategy=fsdp2",
        f"{actor}.ppo_mini_batch_size=3",
        f"{actor}.ppo_micro_batch_size_per_gpu=1",
        f"{actor}.optim.lr=1e-2",
        f"+{actor}.fsdp_config.mixed_precision={{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}}",
    ]


def test_an_actor_steps_as_the_command_of_the_page_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """the actor worker of verl with FSDP2, configured by the command of the page: three micro-batches, two steps"""
    from hydra import compose, initialize_config_module
    from verl.workers.engine_workers import ActorRolloutRefWorker

    begin(monkeypatch)
    model = tiny(0)
    model.save_pretrained(tmp_path / "model")
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        with initialize_config_module("verl.trainer.config", version_base=None):
            asked = compose("ppo_trainer", overrides=[*overrides_of_the_page(), *on_a_cpu(tmp_path / "model")])
        worker = ActorRolloutRefWorker(asked.actor_rollout_ref, "actor", distillation_config=asked.distillation)
        worker.init_model()
        assert type(worker.actor.engine).__name__ == "FSDPEngineWithLMHead"
        assert worker.loss_fn.keywords["distillation_config"].distillation_loss.loss_mode == "topk_reverse_kl"
        data, _ = batch(VOCAB)
        said = {"mini_batch_size": 3, "epochs": 1, "seed": 1, "dataloader_kwargs": {"shuffle": False}}
        tu.assign_non_tensor(data, calculate_entropy=False, **said)
        metrics = [tu.get(worker.update_actor(data.clone()), "metrics") for _ in range(2)]
    finally:
        dist.destroy_process_group()
    ids = data["input_ids"]
    z = torch.cat([model(x[None]).logits[0] for x in ids.unbind()])[None]
    truth, _ = formula(data, z)
    found = [float(seen["distillation/loss"][0]) for seen in metrics]
    assert found[0] == pytest.approx(float(truth), rel=1e-4) and found[1] < found[0]

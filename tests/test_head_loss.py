"""The loss within the head of models of transformers: families, adapters, wrappers, and heads that are refused."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.ranks import Failed, on_ranks, together
from tests.tiny_models import FAMILIES, SIZES, K, V, collate, distance, formula, inputs_of, rows, tiny
from topk_rkl import ForwardKL, Support, linear_teacher_topk, teacher_topk, topk_reverse_kl
from topk_rkl.loss import global_count
from topk_rkl.trainers.head_loss import HeadLoss, HeadTopK, within_head
from topk_rkl.trainers.heads import Head, head_of

# Beside the six of FAMILIES: other names of the head, of its scale and of its cap, biases, tied heads, other bodies.
MORE: dict[str, dict[str, Any]] = {
    "hyperclovax": {"logits_scaling": 3.0}, "cohere2": {},
    "falcon_h1": {"lm_head_multiplier": 0.5, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "nanochat": {}, "phi": {}, "gpt_neox": {}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "olmo2": {},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}, "bloom": {"n_layer": 1, "n_head": 4},
    "mamba": {}, "starcoder2": {}, "qwen2": {"tie_word_embeddings": True}, "granitemoe": {"logits_scaling": 2.0},
}  # fmt: skip


def other(family: str) -> Any:
    torch.manual_seed(0)
    given = {**SIZES, "num_hidden_layers": 1, **MORE[family]}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def support_of(teacher: nn.Module, batch: dict[str, Tensor]) -> Support:
    with torch.no_grad():
        return teacher_topk(teacher(**inputs_of(batch)).logits, K)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_loss_and_gradient_of_a_family(family: str) -> None:
    student = (tiny(family) if family in FAMILIES else other(family)).eval()  # without dropout
    teacher, batch = tiny("llama", seed=1), collate(rows())
    want, grads = formula(student, teacher, batch)
    head_loss = HeadLoss(student)
    for _ in range(2):  # the first compares the logits with what the config tells
        student.zero_grad()
        loss = head_loss(support_of(teacher, batch), batch["labels"], **inputs_of(batch))
        loss.backward()
        assert loss.item() == pytest.approx(want, rel=1e-5)
        assert distance(gradients(student), grads) < 5e-6
    with torch.no_grad():
        logits = student(**inputs_of(batch)).logits
    support, plain = HeadTopK(student, K)(**inputs_of(batch)), teacher_topk(logits, K)
    assert torch.equal(support.ids, plain.ids)
    torch.testing.assert_close(support.log_probs, plain.log_probs, rtol=1e-5, atol=1e-5)


def test_options_weights_and_counts() -> None:
    student, teacher, batch = tiny(), tiny(seed=1), collate(rows())
    factors, items = torch.rand(batch["labels"].shape), int((batch["labels"][:, 1:] != -100).sum())
    want, grads = formula(student, teacher, batch, temperature=0.7, factors=factors)
    support = HeadTopK(teacher, K)(**inputs_of(batch))
    head_loss = HeadLoss(student, temperature=0.7)
    loss = head_loss(
        support, batch["labels"], num_items_in_batch=2 * items, world_size=2, weights=factors, **inputs_of(batch)
    )
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert distance(gradients(student), grads) < 5e-6


def test_the_head_is_as_before_afterwards_and_after_an_error() -> None:
    student, batch = tiny(), collate(rows())
    want = student(**inputs_of(batch)).logits
    support = HeadTopK(student, K)(**inputs_of(batch))
    with pytest.raises(ValueError, match="labels has shape"):
        HeadLoss(student)(support, batch["labels"][:, 1:], **inputs_of(batch))
    assert torch.equal(student(**inputs_of(batch)).logits, want)
    student.lm_head.forward = lambda hidden: 0 * hidden  # another's replacement stays
    with within_head(student.lm_head, lambda hidden: hidden + 1) as taken:
        student.lm_head(torch.zeros(2))
    assert taken[0].tolist() == [1, 1] and student.lm_head(torch.ones(2)).tolist() == [0, 0]


def adapted(**options: Any) -> Any:
    model = get_peft_model(tiny(), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    torch.manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_an_adapter_on_the_body_and_a_head_that_is_trained_whole(saved: list[str] | None) -> None:
    student = adapted(target_modules=["q_proj"], modules_to_save=saved)
    teacher, batch = tiny(seed=1), collate(rows())
    if saved:  # the copy that is trained, not the head that it was copied from
        nn.init.normal_(head_of(student).weight, std=0.3)
    want, grads = formula(student, teacher, batch)
    loss = HeadLoss(student)(support_of(teacher, batch), batch["labels"], **inputs_of(batch))
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert distance(gradients(student), grads) < 5e-6


def test_an_adapter_on_the_head_is_refused_and_each_remedy_is_right() -> None:
    student, teacher, batch = adapted(target_modules=["q_proj", "lm_head"]), tiny(seed=1), collate(rows())
    with pytest.raises(TypeError, match=r"adapter 'default'.*topk_reverse_kl.*merge_and_unload.*modules_to_save"):
        HeadLoss(student)
    want, _ = formula(student, teacher, batch)
    support, weights = support_of(teacher, batch), batch["labels"][:, 1:] != -100
    logits = student(**inputs_of(batch)).logits[:, :-1]
    assert topk_reverse_kl(logits, support[:, :-1], weights=weights).item() == pytest.approx(want)
    merged = student.merge_and_unload()
    loss = HeadLoss(merged)(support, batch["labels"], **inputs_of(batch))
    assert loss.item() == pytest.approx(want, rel=1e-4)


class Rounded(nn.Linear):
    """As a quantised layer: a Linear whose forward is another."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.round(decimals=1))


class Padded(nn.Module):
    """A model that cuts its logits, or scales them by position, as its config does not tell."""

    def __init__(self, model: nn.Module, bend: Any) -> None:
        super().__init__()
        self.model, self.config, self.bend = model, model.config, bend

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def forward(self, **inputs: Any) -> Any:
        return {"logits": self.bend(self.model(**inputs).logits)}


BENDS = {
    "a scale": lambda logits: 0.9 * logits,
    "a cap": lambda logits: 9 * torch.tanh(logits / 9),
    "a cut": lambda logits: logits[..., : V - 3],
    "a scale per token": lambda logits: logits * torch.linspace(1, 2, 14)[:, None],
}


@pytest.mark.parametrize("bend", BENDS)
def test_logits_that_the_config_does_not_tell_are_refused(bend: str) -> None:
    batch = collate(rows())
    student = Padded(tiny(), BENDS[bend])
    support = HeadTopK(tiny(seed=1), K)(**inputs_of(batch))
    with pytest.raises(RuntimeError, match=r"logits are not those of logit_scale=1.0 and softcap=None.*head=Head"):
        HeadLoss(student)(support, batch["labels"], **inputs_of(batch))
    told = {"a scale": {"logit_scale": 0.9}, "a cap": {"softcap": 9.0}}
    if bend in told:  # the remedy
        head = Head(student.model.lm_head, **told[bend])
        loss = HeadLoss(student, head=head)(support, batch["labels"], **inputs_of(batch))
        logits = student(**inputs_of(batch))["logits"]
        want = topk_reverse_kl(logits[:, :-1], support[:, :-1], weights=batch["labels"][:, 1:] != -100)
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_heads_that_a_weight_does_not_tell_are_refused() -> None:
    student = tiny()
    student.lm_head = Rounded(32, V, bias=False)
    with pytest.raises(TypeError, match=r"the head is a \S*Rounded, whose logits may be more"):
        head_of(student)
    student.lm_head = nn.Linear(32, V, bias=False)
    student.lm_head.forward = lambda hidden: 2 * nn.Linear.forward(student.lm_head, hidden)
    with pytest.raises(TypeError, match=r"the head is a \S*Linear with another forward, whose logits may be more"):
        head_of(student)
    student.lm_head = nn.Linear(32, V, bias=False)
    student.lm_head._hf_hook = object()
    with pytest.raises(TypeError, match=r"with an Accelerate hook.*without device_map"):
        head_of(student)
    with pytest.raises(
        TypeError, match=r"model is a \S*Linear, which tells no output embeddings.*Head\(model.lm_head\)"
    ):
        head_of(nn.Linear(2, 3))


def test_a_head_that_runs_twice_or_never_is_refused() -> None:
    batch, student = collate(rows()), tiny()
    support = HeadTopK(student, K)(**inputs_of(batch))

    class Twice(Padded):
        def forward(self, **inputs: Any) -> Any:
            return {"logits": self.model(**inputs).logits + self.model(**inputs).logits}

    with pytest.raises(RuntimeError, match="ran its head 2 times"):
        HeadLoss(Twice(student, None))(support, batch["labels"], **inputs_of(batch))
    spare = Head(nn.Linear(32, V))
    with pytest.raises(RuntimeError, match="ran its head 0 times"):
        HeadLoss(student, head=spare)(support, batch["labels"], **inputs_of(batch))


def test_bfloat16_autocast_and_checkpointing() -> None:
    teacher, batch = tiny(seed=1), collate(rows())
    support = support_of(teacher, batch)
    student = tiny()
    want, grads = formula(student, teacher, batch)
    student.gradient_checkpointing_enable()
    student.train()
    HeadLoss(student)(support, batch["labels"], **inputs_of(batch)).backward()
    assert distance(gradients(student), grads) < 5e-6
    with torch.autocast("cpu", torch.bfloat16):
        loss = HeadLoss(student)(support, batch["labels"], **inputs_of(batch))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want, rel=0.03)
    half = HeadLoss(student.bfloat16())(support, batch["labels"], **inputs_of(batch))
    assert half.item() == pytest.approx(want, rel=0.03)


def test_an_infinite_loss_is_infinite() -> None:
    student, batch = tiny(), collate(rows())
    support = HeadTopK(tiny(seed=1), K)(**inputs_of(batch))
    student.lm_head.bias = nn.Parameter(torch.zeros(V).index_fill(0, support.ids[0, 5, :1].long(), -torch.inf))
    assert HeadLoss(student, divergence=ForwardKL())(support, batch["labels"], **inputs_of(batch)) == torch.inf


@pytest.mark.slow
def test_a_compiled_model() -> None:
    student, teacher, batch = tiny(), tiny(seed=1), collate(rows())
    want, grads = formula(student, teacher, batch)
    support, counter = support_of(teacher, batch), CompileCounterWithBackend("aot_eager")
    head_loss, items = HeadLoss(torch.compile(student, backend=counter)), int((batch["labels"][:, 1:] != -100).sum())
    compiled = []
    for factor in (1, 2, 3):  # of an int, for which nothing is compiled anew
        student.zero_grad()
        loss = head_loss(support, batch["labels"], num_items_in_batch=factor * items, **inputs_of(batch))
        (factor * loss).backward()
        assert factor * loss.item() == pytest.approx(want, rel=1e-5)
        assert distance(gradients(student), grads) < 5e-6
        compiled.append(counter.frame_count)
    assert len(set(compiled)) == 1


def test_a_loss_per_position_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reduction is 'none'; use one of mean, sum"):
        HeadLoss(tiny(), reduction="none")


def wrapped(how: str, group: Any) -> tuple[nn.Module, nn.Module]:
    """The model as it is trained, and the model within."""
    student = tiny(layers=2)
    mesh = DeviceMesh.from_group(group, "cpu")
    if how == "DDP":
        return DistributedDataParallel(student, process_group=group), student
    if how == "FSDP1":
        fsdp = FullyShardedDataParallel(
            student, group, auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}), use_orig_params=True,
            device_id=torch.device("cpu"),
        )  # fmt: skip
        return fsdp, student
    for layer in student.model.layers:
        fully_shard(layer, mesh=mesh)
    if how == "FSDP2, the head alone":
        fully_shard(student.lm_head, mesh=mesh)
    return fully_shard(student, mesh=mesh), student


def trained(group: Any, how: str) -> tuple[float, float]:
    """One step of a half of the batch: how far its loss and its gradient are from those of one process."""
    rank, teacher = dist.get_rank(group), tiny(seed=1)
    whole = collate(rows())
    mine = {name: x[rank::2] for name, x in whole.items()}
    want, grads = formula(tiny(layers=2), teacher, whole)
    model, student = wrapped(how, group)
    items = global_count(mine["labels"][:, 1:] != -100, group)
    loss = HeadLoss(model)(
        HeadTopK(teacher, K)(**inputs_of(mine)), mine["labels"], num_items_in_batch=items,
        world_size=dist.get_world_size(group), **inputs_of(mine),
    )  # fmt: skip
    loss.backward()
    total = loss.detach().clone() / 2
    dist.all_reduce(total, group=group)
    if how == "FSDP1":
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = {n.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for n, p in model.named_parameters()}
    else:
        found = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients(student).items()}
    return abs(float(total) - want), distance(found, grads)


def cast(group: Any, output_dtype: torch.dtype | None) -> float:
    student, batch = tiny(), collate(rows())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=output_dtype)
    mesh = DeviceMesh.from_group(group, "cpu")
    fully_shard(student.lm_head, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh)
    return HeadLoss(student)(HeadTopK(tiny(seed=1), K)(**inputs_of(batch)), batch["labels"], **inputs_of(batch)).item()


@pytest.mark.slow
@together
def test_a_head_whose_losses_are_cast_is_refused_and_the_remedy_is_right() -> None:
    with pytest.raises(Failed, match=r"losses were cast to torch.bfloat16.*leave output_dtype out"):
        on_ranks(2, cast, torch.bfloat16)
    want, _ = formula(tiny(), tiny(seed=1), collate(rows()))
    assert on_ranks(2, cast, None) == [pytest.approx(want, rel=0.03)] * 2


@pytest.mark.slow
@together
@pytest.mark.parametrize("how", ["DDP", "FSDP1", "FSDP2", "FSDP2, the head alone"])
def test_two_ranks_have_the_loss_and_the_gradient_of_one_process(how: str) -> None:
    for loss, gradient in on_ranks(2, trained, how):
        assert loss < 1e-6 and gradient < 5e-6


def test_a_copy_of_the_model_has_its_own_head() -> None:
    student = tiny()
    twin = copy.deepcopy(student)
    assert head_of(twin).module is twin.lm_head
    assert linear_teacher_topk(torch.randn(3, 32), k=K, **head_of(twin).teacher).ids.shape == (3, K)

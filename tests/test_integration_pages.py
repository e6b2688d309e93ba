"""The snippets of docs/integrations for trainers that need GPUs, run from the pages on what those trainers pass."""

import asyncio
import os
import pickle
import pkgutil
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import pad

from tests.formulas import FORMULAS, kl
from tests.ranks import on_ranks, together
from tests.stand_ins import Causal, double, sample_means, scored, standing_in
from topk_rkl.loss import ForwardKL, JensenShannon, Mixture, ReverseKL, teacher_topk

FOLDER = Path(__file__).parent.parent / "docs/integrations"
PAGES = "axolotl", "megatron", "nemo-rl", "slime", "unsloth"
B, S, V, K, H = 3, 7, 24, 4, 8


def page(name: str) -> dict[str, Any]:
    """What its Python blocks define."""
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (FOLDER / f"{name}.md").read_text(), re.DOTALL):
        exec(block, scope)
    return scope


def per_token(
    z: Tensor,  # (..., V)
    w: Tensor,  # (..., V)
    formula: Any = kl,
    t: float = 1.0,
) -> Tensor:  # (...)
    """The definition, in as many steps: both sides renormalised on the teacher's K best tokens."""
    best, ids = w.topk(K)
    return on_tokens(z, ids, best / t, formula, t)


def on_tokens(
    z: Tensor,  # (..., V)
    ids: Tensor,  # (..., K)
    teacher: Tensor,  # (..., K)
    formula: Any = kl,
    t: float = 1.0,
) -> Tensor:  # (...)
    return formula((z / t).gather(-1, ids).log_softmax(-1), teacher.log_softmax(-1)).sum(-1)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PAGES)
def test_every_path_that_a_page_names_is_there(name: str) -> None:
    paths = set(re.findall(r"\btopk_rkl\.[\w.]*\w", (FOLDER / f"{name}.md").read_text()))
    assert paths
    with standing_in():
        for path in paths:
            pkgutil.resolve_name(path)


# NeMo-RL


def nemo_batch() -> dict[str, Tensor]:
    """The fields of a micro-batch, as its teacher and its data processing leave them: padding is 0."""
    best = double(B, S, V).topk(K)
    lengths = torch.tensor([S, S - 2, S - 1])
    inside = torch.arange(S) < lengths[:, None]
    return {
        "input_ids": torch.randint(V, (B, S)),
        "input_lengths": lengths,
        "token_mask": (torch.rand(B, S) < 0.7).long() * inside,
        "sample_mask": torch.tensor([1.0, 0.5, 1.0]),
        "teacher_topk_logits": best.values * inside[..., None],
        "teacher_topk_indices": best.indices * inside[..., None],
    }


def nemo_formula(z: Tensor, data: dict[str, Tensor], tokens: float, formula: Any = kl) -> Tensor:
    losses = on_tokens(z, data["teacher_topk_indices"], data["teacher_topk_logits"], formula)
    return (losses[:, :-1] * data["token_mask"][:, 1:] * data["sample_mask"][:, None]).sum() / tokens


def nemo(z: Tensor, data: dict[str, Tensor], tokens: float = 9.0, divergence: Any = None) -> tuple[Tensor, dict]:
    """The call of NeMo-RL's `LossPostProcessor` for a loss of logits."""
    loss_fn = page("nemo-rl")["loss_fn"]
    if divergence is not None:
        loss_fn = type(loss_fn)(divergence)
    assert (loss_fn.input_type.name, loss_fn.loss_type.name) == ("LOGIT", "TOKEN_LEVEL")
    return loss_fn(data=data, global_valid_seqs=torch.tensor(3.0), global_valid_toks=torch.tensor(tokens), logits=z)


@pytest.mark.parametrize("divergence", [None, ForwardKL(), Mixture(0.3)], ids=["reverse", "forward", "mixed"])
def test_nemo_rl_gets_the_loss_of_its_micro_batch(divergence: Any) -> None:
    z, data = double(B, S, V).requires_grad_(), nemo_batch()
    with standing_in(initialized=False):
        loss, metrics = nemo(z, data, divergence=divergence)
    want = nemo_formula(z, data, 9.0, kl if divergence is None else FORMULAS[divergence])
    close(loss, want)
    close(*(torch.autograd.grad(x, z)[0] for x in (loss, want)))
    assert metrics == {"loss": loss.item(), "num_valid_samples": B}


def test_nemo_rl_may_pad_the_logits_of_a_packed_sequence() -> None:
    z, data = double(B, S, V), nemo_batch()
    with standing_in(initialized=False):
        close(nemo(pad(z, (0, 0, 0, 5)), data)[0], nemo_formula(z, data, 9.0))


def test_nemo_rl_sends_the_loss_to_its_workers() -> None:
    with standing_in():
        loss_fn = pickle.loads(pickle.dumps(page("nemo-rl")["loss_fn"]))
        assert loss_fn.divergence == ReverseKL()


def nemo_split(group: Any, how: str, z: Tensor, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of this rank's shard, of a Megatron or a DTensor worker."""
    shard = z.tensor_split(group.size(), -1)[group.rank()].contiguous().requires_grad_()
    logits = shard
    if how == "DTensor":
        mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
        logits = DTensor.from_local(shard, mesh, [Shard(-1)])
    with standing_in(group, initialized=how == "Megatron"):
        loss, _ = nemo(pad(logits, (0, 0, 0, 2)) if how == "Megatron" else logits, data)
    loss.backward()
    return loss.detach(), shard.grad


@together
@pytest.mark.parametrize("how", ["Megatron", "DTensor"])
def test_nemo_rl_may_split_the_vocabulary(how: str) -> None:
    z, data = double(B, S, V).requires_grad_(), nemo_batch()
    want = nemo_formula(z, data, 9.0)
    want.backward()
    for (loss, grad), part in zip(on_ranks(2, nemo_split, how, z.detach(), data), z.grad.tensor_split(2, -1)):
        close(loss, want.detach())
        close(grad, part)


def nemo_cut(group: Any, z: Tensor, data: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, the gradient of this rank's part, and its positions in the layout of torch's context_parallel."""
    assert group.size() == 4
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    chunks = torch.arange(z.shape[1]).chunk(4)
    order = torch.cat([chunks[i] for i in (0, 3, 1, 2)])
    mine = order.chunk(2)[mesh["cp"].get_local_rank()]
    part = z[:, mine].chunk(2, -1)[mesh["tp"].get_local_rank()].contiguous().requires_grad_()
    with standing_in(initialized=False):
        loss, metrics = nemo(DTensor.from_local(part, mesh, [Shard(1), Shard(-1)]), data | {"seq_index": order})
    loss.backward()
    assert metrics["loss"] == loss.item()
    return loss.detach(), part.grad, mine


@together
def test_nemo_rl_may_split_the_positions_of_dtensors() -> None:
    z, data = double(B, S, V), nemo_batch()
    z, data = (
        pad(z, (0, 0, 0, 1)),
        {name: pad(x, (0, 0) * (x.dim() - 2) + (0, 1)) if x.dim() > 1 else x for name, x in data.items()},
    )
    want = nemo_formula(z.requires_grad_(), data, 9.0)
    want.backward()
    found = on_ranks(4, nemo_cut, z.detach(), data)
    for rank, (loss, grad, mine) in enumerate(found):
        close(loss, want.detach())
        close(grad, z.grad[:, mine].chunk(2, -1)[rank % 2])
    assert sorted(torch.cat([mine for *_, mine in found[::2]]).tolist()) == list(range(S + 1))


def test_nemo_rl_may_not_split_the_positions_of_megatron() -> None:
    with standing_in(context=(0, 2)), pytest.raises(ValueError, match=r"context_parallel_size is 2.*to 1 in policy"):
        nemo(double(B, S, V), nemo_batch())


# Megatron-LM


def megatron(group: Any, z: Tensor, w: Tensor, mask: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """One micro-batch of 4 as `forward_step_calc_loss` runs it, with and without calculate_per_token_loss."""
    shard = z.tensor_split(group.size(), -1)[group.rank()].contiguous().requires_grad_()
    ids = w.topk(K).indices
    inputs = ("tokens", "position_ids", "attention_mask")
    batch = {"teacher_ids": ids, "teacher_log_probs": w.gather(-1, ids), "loss_mask": mask, **dict.fromkeys(inputs)}
    found = []
    for per_token_loss in (True, False):
        with standing_in(group):
            output, loss_func = page("megatron")["forward_step"](iter([batch]), lambda *_: 1 * shard)
            loss, tokens, report = loss_func(output, **options)
        if not per_token_loss:
            loss /= torch.clamp(tokens, min=1)  # in place, as there
            loss /= 4
        [grad] = torch.autograd.grad(loss, shard)
        found += [loss.detach(), grad, tokens, report["distillation loss"]]
    return found


@together
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("divergence", [None, ForwardKL()], ids=["reverse", "forward"])
def test_megatron_gets_a_sum_and_a_count(world: int, divergence: Any) -> None:
    z, w, mask = double(B, S, V).requires_grad_(), double(B, S, V), (torch.rand(B, S) < 0.6).int()
    want = (per_token(z, w, kl if divergence is None else FORMULAS[divergence]) * mask).sum()
    want.backward()
    options = {} if divergence is None else {"divergence": divergence}
    for rank, found in enumerate(on_ranks(world, megatron, z.detach(), w, mask, options)):
        for (loss, grad, tokens, logged), share in zip((found[:4], found[4:]), (1, 4 * mask.sum())):
            close(loss, want.detach() / share)
            close(grad, z.grad.tensor_split(world, -1)[rank] / share)
            assert tokens.dtype == torch.int and tokens == mask.sum()
            close(logged, torch.stack([want.detach(), mask.sum().double()]))
            assert not logged.requires_grad


def megatron_whole(group: Any, z: Tensor, w: Tensor, mask: Tensor) -> list[Tensor]:
    """Gradients of logits that every rank has whole, with the group and without."""
    with standing_in(group):
        from topk_rkl.trainers.megatron import loss_func

        z, support = z.requires_grad_(), teacher_topk(w, K)
        losses = [loss_func(mask, z, support=support, **options)[0] for options in ({}, {"group": None})]
        return [torch.autograd.grad(loss, z)[0] for loss in losses]


@together
def test_megatron_may_have_whole_logits_without_a_group() -> None:
    z, w, mask = double(B, S, V).requires_grad_(), double(B, S, V), torch.ones(B, S)
    [want] = torch.autograd.grad((per_token(z, w) * mask).sum(), z)
    (_, first), (taken_for_a_shard, last) = on_ranks(2, megatron_whole, z.detach(), w, mask)
    assert want.any() and not taken_for_a_shard.any()
    close(first, want)
    close(last, want)


def test_megatron_must_give_logits() -> None:
    with standing_in():
        from topk_rkl.trainers.megatron import loss_func

        with pytest.raises(ValueError, match=r"shape \(3, 7\), the losses.*without labels"):
            loss_func(torch.ones(B, S), double(B, S), support=teacher_topk(double(B, S, V), K))


# slime and miles

TOTALS, RESPONSES = [13, 6, 9], [7, 5, 3]


def slime_batch(teacher: list[Tensor], masks: list[Tensor]) -> dict[str, Any]:
    """After the reward function has asked a server that answers as SGLang does."""
    from topk_rkl.trainers import slime

    async def post(url: str, request: dict[str, Any]) -> dict[str, Any]:
        i = request.pop("input_ids")[0]
        assert url == "http://teacher/generate" and request == {
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": K,
        }
        return scored(teacher[i], K + 1)  # one more than asked for

    args, kept = SimpleNamespace(rm_url="http://teacher/generate", topk_rkl_k=K), []
    for i, (total, response) in enumerate(zip(TOTALS, RESPONSES)):
        earlier = {"kept": i} if i else None
        sample = SimpleNamespace(tokens=[i] * total, response_length=response, train_metadata=earlier)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slime, "_post", post)
            assert asyncio.run(slime.reward(args, sample)) == 0
        assert sample.train_metadata.get("kept", 0) == i
        kept.append(sample.train_metadata)
    return {"metadata": kept, "total_lengths": TOTALS, "response_lengths": RESPONSES, "loss_masks": masks}


def test_slime_asks_the_server_by_a_post_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    from topk_rkl.trainers import slime

    asked: list[Any] = []

    class Session:  # of aiohttp, as far as one request goes; it answers with what it was asked
        async def __aenter__(self) -> "Session":
            return self

        async def __aexit__(self, *_: Any) -> None:
            asked.append("closed")

        def post(self, url: str, json: Any) -> "Session":
            asked.append((url, json))
            return self

        def raise_for_status(self) -> None:
            asked.append("checked")

        async def json(self) -> Any:
            return asked[0][1]

    monkeypatch.setitem(sys.modules, "aiohttp", SimpleNamespace(ClientSession=Session))
    assert asyncio.run(slime._post("http://teacher/generate", {"input_ids": [1]})) == {"input_ids": [1]}
    assert asked == [("http://teacher/generate", {"input_ids": [1]}), "checked", "closed", "closed"]


def slime_formula(z: list[Tensor], w: list[Tensor], masks: list[Tensor], t: float, formula: Any) -> Tensor:
    rows = [slice(total - response - 1, total - 1) for total, response in zip(TOTALS, RESPONSES)]
    losses = [per_token(x[row], y[row], formula, t) for x, y, row in zip(z, w, rows)]
    return sum((loss * mask).sum() / mask.sum() for loss, mask in zip(losses, masks))


def slime_case() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    masks = [torch.ones(response) for response in RESPONSES]
    masks[0][2] = 0
    return [double(n, V) for n in TOTALS], [log_probs(n) for n in TOTALS], masks


def log_probs(n: int) -> Tensor:  # (n, V)
    """As a server gives them, in float32."""
    return double(n, V).log_softmax(-1).float().double()


def zigzag(x: Tensor, rank: int, ranks: int) -> Tensor:  # (T, ...)
    """slime's `slice_with_cp`."""
    chunk = -(-len(x) // (2 * ranks))
    chunks = pad(x, (0, 0) * (x.dim() - 1) + (0, 2 * ranks * chunk - len(x))).split(chunk)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]]) if ranks > 1 else x


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("whose", ["ours", "the page's"])
def test_slime_gets_the_losses_of_its_responses(ranks: int, t: float, whose: str) -> None:
    z, w, masks = slime_case()
    leaves = [x.requires_grad_() for x in z]
    want = slime_formula(leaves, w, masks, t, kl if whose == "ours" else FORMULAS[JensenShannon()])
    want.backward()
    wanted = [x.grad.clone() for x in leaves]
    got = torch.zeros((), dtype=torch.float64)
    for x in leaves:
        x.grad = None
    for rank in range(ranks):
        with standing_in(context=(rank, ranks)):
            from topk_rkl.trainers import slime

            loss = slime.loss if whose == "ours" else page("slime")["loss"]
            batch = slime_batch(w, masks)
            logits = torch.cat([*(zigzag(x, rank, ranks) for x in leaves), double(3, V)])[None]
            places = [zigzag(torch.arange(n) - (n - r - 1), rank, ranks) for n, r in zip(TOTALS, RESPONSES)]
            inside = [zigzag(torch.ones(n), rank, ranks) > 0 for n in TOTALS]
            mine = [p[(p >= 0) & (p < r) & i] for p, r, i in zip(places, RESPONSES, inside)]
            held = [mask[p] for mask, p in zip(masks, mine)]

            def reduce(x: Tensor, mine: Any = mine, held: Any = held) -> Tensor:
                parts = x.split([len(p) for p in mine])
                return sum((a * b).sum() / mask.sum() for a, b, mask in zip(parts, held, masks))

            args = SimpleNamespace(rollout_temperature=t, allgather_cp=ranks == 1)  # which one rank may have
            value, logged = loss(args, batch, logits, reduce)
        assert logged.keys() == {"loss"} and logged["loss"] == value and not logged["loss"].requires_grad
        value.backward()
        got += value.detach()
    close(got, want.detach())
    for leaf, grad in zip(leaves, wanted):
        close(leaf.grad, grad)


def slime_split(group: Any, z: list[Tensor], w: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
    shard = torch.cat(z)[None].tensor_split(group.size(), -1)[group.rank()].contiguous().requires_grad_()
    with standing_in(group):
        from topk_rkl.trainers import slime

        args = SimpleNamespace(rollout_temperature=1.5)
        value, _ = slime.loss(args, slime_batch(w, masks), shard, sample_means(RESPONSES, masks))
    value.backward()
    return value.detach(), shard.grad[0]


@together
def test_slime_may_split_the_vocabulary() -> None:
    z, w, masks = slime_case()
    leaves = [x.clone().requires_grad_() for x in z]
    want = slime_formula(leaves, w, masks, 1.5, kl)
    want.backward()
    grads = torch.cat([x.grad for x in leaves]).tensor_split(2, -1)
    for (value, grad), part in zip(on_ranks(2, slime_split, z, w, masks), grads):
        close(value, want.detach())
        close(grad, part)


def test_slime_is_refused_what_would_be_wrong() -> None:
    z, w, masks = slime_case()
    with standing_in(context=(0, 2)):
        from topk_rkl.trainers import slime

        batch, logits = slime_batch(w, masks), torch.cat(z)[None]
        reduce = sample_means(RESPONSES, masks)
        args = {"rollout_temperature": 1.0}
        with pytest.raises(ValueError, match="allgather_cp is set"):
            slime.loss(SimpleNamespace(**args, allgather_cp=True), batch, logits, reduce)
        with pytest.raises(ValueError, match="qkv_format is 'bshd'; only 'thd'"):
            slime.loss(SimpleNamespace(**args, qkv_format="bshd"), batch, logits, reduce)
        with pytest.raises(ValueError, match="the batch lacks `metadata`"):
            slime.loss(SimpleNamespace(**args), batch | {"metadata": None}, logits, reduce)
        answer = scored(w[0], K)
        for response, k in ((len(w[0]), K), (2, K + 1)):
            with pytest.raises(ValueError, match=r"lacks . tokens at a token of the response"):
                slime.teacher_of(answer, response, k)
        assert slime.teacher_of(answer, 0, K) == {"teacher_ids": [], "teacher_log_probs": []}


def test_a_sample_without_a_response_does_not_count() -> None:
    w = log_probs(4)
    with standing_in():
        from topk_rkl.trainers import slime

        kept = [slime.teacher_of(scored(w, K), n, K) for n in (0, 2)]
        batch = {"metadata": kept, "total_lengths": [5, 4], "response_lengths": [0, 2]}
        z = double(1, 9, V)
        value, _ = slime.loss(SimpleNamespace(rollout_temperature=1.0), batch, z, torch.sum)
        close(value, per_token(z[0, 6:8], w[1:3]).sum())
        empty = {"metadata": kept[:1], "total_lengths": [5], "response_lengths": [0]}
        value, _ = slime.loss(SimpleNamespace(rollout_temperature=1.0), empty, z.requires_grad_(), torch.sum)
        value.backward()
        assert value == 0 and not z.grad.any()


# axolotl


def axolotl_inputs(w: Tensor, t: float) -> dict[str, Tensor]:
    """As its collators give them: log-probs at kd_temperature, renormalised, with slots of padding behind them."""
    ids = w.topk(K).indices
    labels = torch.randint(V, (B, S))
    labels[:, :3] = -100
    mask = torch.ones(B, S, K, dtype=torch.int)
    mask[1, 4, 2:] = 0
    log_probs = (w / t).gather(-1, ids).masked_fill(mask == 0, -torch.inf).log_softmax(-1)
    ids, log_probs = ids.masked_fill(mask == 0, 0), log_probs.masked_fill(mask == 0, -1e9)  # its padding
    for position in range(S - 1):  # a teacher that is often right
        labels[:, position + 1] = torch.where(labels[:, position + 1] == -100, -100, ids[:, position, 0])
    inputs = {"input_ids": torch.randint(V, (B, S)), "attention_mask": torch.ones(B, S), "labels": labels}
    return inputs | {"target_token_ids": ids, "target_logprobs": log_probs.float(), "target_mask": mask}


def axolotl_formula(z: Tensor, inputs: dict[str, Tensor], formula: Any, t: float) -> Tensor:
    live = inputs["target_mask"] > 0
    log_p = (z / t).gather(-1, inputs["target_token_ids"]).masked_fill(~live, -1e30).log_softmax(-1)
    log_q = inputs["target_logprobs"].double().masked_fill(~live, -1e30).log_softmax(-1)
    terms = formula(*(x.masked_fill(~live, -50.0) for x in (log_p, log_q)))
    return (terms.masked_fill(~live, 0).sum(-1)[:, :-1] * (inputs["labels"][:, 1:] != -100)).sum() * t**2


def axolotl_trainer(model: Causal, **changed: Any) -> Any:
    """Of the plugin and the settings that the page has."""
    [block] = re.findall(r"```yaml\n(.*?)```", (FOLDER / "axolotl.md").read_text(), re.DOTALL)
    settings = yaml.safe_load(block)
    [plugin] = settings.pop("plugins")
    trainer_cls = pkgutil.resolve_name(plugin)().get_trainer_cls(axolotl_cfg(kd_trainer=settings.pop("kd_trainer")))
    return trainer_cls(model, **settings | changed)


def axolotl_cfg(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"kd_trainer": None, "kd_temperature_min": None} | given)


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("beta", [None, 0.0, 0.5, 1.0])
def test_axolotl_multiplies_value_and_gradient_by_the_square_of_the_temperature(beta: float | None, t: float) -> None:
    formulas = {0.5: FORMULAS[JensenShannon()], 1.0: kl}
    model = Causal(V, H)
    inputs = axolotl_inputs(double(B, S, V), t)
    with standing_in():
        trainer = axolotl_trainer(model, kd_beta=beta, kd_temperature=t, kd_alpha=0.7)
        loss = trainer.compute_loss(model, inputs | {"num_items_in_batch": 11}, num_items_in_batch=torch.tensor(11))
        assert trainer.compute_loss(model, inputs, True, 11) == (loss, {"loss": loss})
    z = model(inputs["input_ids"]).logits
    want = 0.7 * axolotl_formula(z, inputs, formulas.get(beta, FORMULAS[ForwardKL()]), t) / 11
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    for got, exact in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (loss, want)), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-9)


def test_axolotl_may_have_ranks_whose_gradients_are_averaged() -> None:
    model, inputs = Causal(V, H), axolotl_inputs(double(B, S, V), 1.0)
    parts = [{name: x[rows] for name, x in inputs.items()} for rows in (slice(1), slice(1, B))]
    with standing_in():
        whole = axolotl_trainer(model).compute_loss(model, inputs, num_items_in_batch=torch.tensor(11))
        for averaged, share in ((True, 1), (False, 2)):  # without, each rank is given its own count
            trainer = axolotl_trainer(model, ranks=2, average_tokens_across_devices=averaged)
            losses = [trainer.compute_loss(model, part, num_items_in_batch=torch.tensor(11)) for part in parts]
            torch.testing.assert_close(sum(losses) / 2, whole / share)
        uncounted = axolotl_trainer(model, ranks=2).compute_loss(model, inputs)
        torch.testing.assert_close(uncounted, whole * 11 / (inputs["labels"][:, 1:] != -100).sum())


def test_axolotl_may_evaluate_another_model() -> None:
    model, other, inputs = Causal(V, H), Causal(V, H), axolotl_inputs(double(B, S, V), 1.0)
    with standing_in():
        trainer = axolotl_trainer(model)
        trainer.compute_loss(model, inputs)
        assert trainer.compute_loss(other, inputs) == axolotl_trainer(other).compute_loss(other, inputs)


def test_axolotl_keeps_its_own_trainer_without_kd_trainer() -> None:
    with standing_in():
        from topk_rkl.trainers.axolotl import TopKPlugin, TopKTrainer

        assert TopKPlugin().get_trainer_cls(axolotl_cfg()) is None
        assert TopKPlugin().get_trainer_cls(axolotl_cfg(kd_trainer=True)) is TopKTrainer


def test_axolotl_is_refused_what_would_be_wrong() -> None:
    model, inputs = Causal(V, H), axolotl_inputs(double(B, S, V), 1.0)
    with standing_in():
        from topk_rkl.trainers.axolotl import FIELDS, TopKPlugin, TopKTrainer

        with pytest.raises(ValueError, match=r"kd_temperature_min is 0.5.*leave it out"):
            TopKPlugin().get_trainer_cls(axolotl_cfg(kd_trainer=True, kd_temperature_min=0.5))
        with pytest.raises(ValueError, match=r"kd_ce_alpha is 0.1.*set it to 0"):
            TopKTrainer(model, kd_ce_alpha=0.1)
        with pytest.raises(ValueError, match=r"kd_normalize_topk is None.*set it to true"):
            TopKTrainer(model, kd_normalize_topk=None)
        late = inputs | {name: torch.cat((inputs[name][:, :1], inputs[name][:, :-1]), 1) for name in FIELDS}
        with pytest.raises(ValueError, match=r"labels of their own position.*shift target_token_ids"):
            TopKTrainer(model).compute_loss(model, late)
        early = late | {name: torch.cat((late[name][:, 1:], 0 * late[name][:, :1]), 1) for name in FIELDS}
        torch.testing.assert_close(
            TopKTrainer(model).compute_loss(model, early), TopKTrainer(model).compute_loss(model, inputs)
        )
        without_labels = inputs | {"labels": torch.full((B, S), -100)}  # which tell nothing of the positions
        assert TopKTrainer(model).compute_loss(model, without_labels) == 0


# unsloth


class Patched(Causal):
    """As unsloth's forwards: hidden states for logits where the variable says so, and no logits beside labels."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> Any:
        if "broken" in inputs:
            raise RuntimeError("broken")
        if os.environ.get("UNSLOTH_RETURN_HIDDEN_STATES", "0") == "1":
            return SimpleNamespace(logits=self.body(input_ids).tanh())
        return super().forward(input_ids) if labels is None else SimpleNamespace(logits=None)


def test_unsloth_gives_hidden_states_and_its_logits_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSLOTH_RETURN_HIDDEN_STATES", "0")
    model, teacher, ids = Patched(V, H), Patched(V, H), torch.randint(V, (B, S))
    labels = ids.masked_fill(torch.rand(B, S) < 0.3, -100)
    w = teacher(ids).logits.detach()
    run, inputs = page("unsloth")["distillation_loss"], {"input_ids": ids, "attention_mask": torch.ones(B, S)}
    z = model(ids).logits
    total = (per_token(z, w)[:, :-1] * (labels[:, 1:] != -100)).sum()
    for items, count in ((None, (labels[:, 1:] != -100).sum()), (40, 40)):
        loss = run(model, teacher_topk(w, K), inputs | {"labels": labels}, items)
        close(loss, total / count)
        for got, want in zip(
            *(torch.autograd.grad(x, list(model.parameters()), retain_graph=True) for x in (loss, total / count))
        ):
            close(got, want)
        assert model(ids).logits.shape == (B, S, V)
    with pytest.raises(ValueError, match=rf"student_hidden \({B}, {S}, {V}\); the head must be"):
        run(Causal(V, H), teacher_topk(w, K), inputs | {"labels": labels})  # it ignores the variable
    with pytest.raises(RuntimeError, match="broken"):
        run(model, teacher_topk(w, K), inputs | {"labels": labels, "broken": True})
    assert os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] == "0"

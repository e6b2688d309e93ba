"""Tables of the tokens of answers: log-probs, rewards, values and gradients of three losses.

A table is a dict of columns (n,), one row for each real token of the answers.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.smollm2 import Rollout, Tokenizer, full_reverse_kl, response, response_logits
from topk_rkl.diagnostics import topk_diagnostics
from topk_rkl.loss import teacher_topk, topk_reverse_kl
from topk_rkl.recipe.builders import remap
from topk_rkl.recipe.rewards import log_ratio
from topk_rkl.recipe.rollout import sampled_token_loss

AT_ONCE = 4  # answers whose logits are held together: 200 tokens of 4 take 160 MB
WATCHED = ("sampled_log_prob", "teacher_sampled_log_prob", "student_entropy", "teacher_entropy", "sampled_in_support")
Table = dict[str, Tensor]  # (n,) each


class Models(NamedTuple):
    teacher: nn.Module
    student: nn.Module
    tokenizer: Tokenizer


class Reading(NamedTuple):
    """How the teacher takes the student's answers."""

    sample: Rollout  # the same responses, after the prompt as the teacher writes it
    renamed: tuple[int, int] | None = None  # two tokens whose ids the teacher's vocabulary has the other way round
    mapping: Mapping[int, int] | None = None  # teacher's ids to student's, applied to the teacher's top K


def rows_of(
    sample: Rollout,
    rows: Tensor,  # (b,) indices, or (B,) bool
) -> Rollout:
    return Rollout(sample.ids[rows], sample.mask[rows], sample.length)


def parts(sample: Rollout) -> Iterator[Rollout]:
    for rows in torch.arange(len(sample.ids)).split(AT_ONCE):
        yield rows_of(sample, rows)


def trimmed(sample: Rollout) -> Rollout:
    """Without the last columns, where no answer has a token."""
    _, real = response(sample)  # (B, T)
    length = int(real.any(0).sum())
    end = sample.ids.shape[1] - sample.length + length
    return Rollout(sample.ids[:, :end], sample.mask[:, :end], length)


def token_table(models: Models, sample: Rollout, reading: Reading, k: int) -> Table:
    """Answer, position, log-probs, reward, and the value and gradient of three losses, at each real token."""
    both = zip(parts(sample), parts(reading.sample), strict=True)
    tables = [_part_table(models, trimmed(ours), reading._replace(sample=trimmed(theirs)), k) for ours, theirs in both]
    for index, table in enumerate(tables):
        table["answer"] += index * AT_ONCE
    return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}


def _part_table(models: Models, sample: Rollout, reading: Reading, k: int) -> Table:
    ids, real = response(sample)  # (B, T), (B, T)
    answer, position = real.nonzero().unbind(-1)  # (n,), (n,)
    y = ids[real]  # (n,)
    with torch.no_grad():
        ours, theirs = response_logits(models.student, sample)[real], response_logits(models.teacher, reading.sample)
        theirs = theirs[real]  # (n, V)
    if reading.renamed is not None:
        theirs[:, reading.renamed] = theirs[:, reading.renamed[::-1]]
    support = teacher_topk(theirs, k)  # (n, K)
    if reading.mapping is not None:
        support = remap(support, reading.mapping)
    table = {"answer": answer, "position": position, "id": y}
    table |= topk_diagnostics(ours, theirs, WATCHED, k=k, sampled_ids=y)
    table["in_support"] = topk_diagnostics(ours, support, ["sampled_in_support"], sampled_ids=y)["sampled_in_support"]
    table["reward"] = log_ratio(table["sampled_log_prob"], table["teacher_sampled_log_prob"])
    losses = {
        "sampled": signal(lambda z: sampled_token_loss(z, theirs, y, reduction="none"), ours),
        "topk": signal(lambda z: topk_reverse_kl(z, support, reduction="none"), ours),
        "full": signal(lambda z: full_reverse_kl(z, theirs), ours),
    }
    for name, (value, grad) in losses.items():
        table |= {name: value, f"{name}_grad": grad.square().sum(-1)}
        table[f"{name}_grad_at_token"] = grad.gather(-1, y[:, None]).squeeze(-1)
    return table


def signal(
    loss: Callable[[Tensor], Tensor],  # (n, V) -> (n,)
    logits: Tensor,  # (n, V)
) -> tuple[Tensor, Tensor]:  # (n,), (n, V)
    """The loss of each token, and its gradient by the logits."""
    logits = logits.detach().requires_grad_()
    value = loss(logits)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), grad


@torch.no_grad()
def log_probs(model: nn.Module, sample: Rollout) -> Tensor:  # (B, T)
    """The model's log-prob of each response token."""
    found = []
    for part in parts(sample):
        ids, _ = response(part)  # (b, T)
        logits = response_logits(model, part)  # (b, T, V)
        found.append(logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1))
    return torch.cat(found)


def looped(sample: Rollout, tokens: int, copies: int) -> Rollout:
    """The beginning of each answer again and again, after its prompt. Answers that are not longer are left out."""
    ids, real = response(sample)  # (B, T), (B, T)
    longer = real.sum(-1) > tokens  # (B,)
    loop = ids[longer, :tokens].repeat(1, copies)  # (b, tokens * copies)
    prompt, mask = sample.ids[longer, : -sample.length], sample.mask[longer, : -sample.length]  # (b, P), (b, P)
    return Rollout(torch.cat([prompt, loop], -1), torch.cat([mask, torch.ones_like(loop).bool()], -1), loop.shape[1])


def repeated(
    ids: Tensor,  # (T,)
    n: int,
) -> Tensor:  # (T,) bool
    """Whether the n tokens that end here stood in the answer before."""
    seen: set[tuple[int, ...]] = set()
    found = torch.zeros(len(ids), dtype=torch.bool)
    for last, gram in enumerate(ids.unfold(0, n, 1).tolist() if len(ids) >= n else [], start=n - 1):
        found[last] = tuple(gram) in seen
        seen.add(tuple(gram))
    return found


def spelled_out(models: Models, sample: Rollout, prompts: list[str]) -> Rollout:
    """The same answers after prompts whose special tokens are plain text, as a tokenizer without them reads them."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [models.tokenizer.apply_chat_template(x, tokenize=False, add_generation_prompt=True) for x in chats]
    inputs = models.tokenizer(texts, split_special_tokens=True, padding=True, return_tensors="pt")
    ids, real = response(sample)  # (B, T), (B, T)
    mask = torch.cat([inputs["attention_mask"].bool(), real], -1)  # (B, P + T)
    return Rollout(torch.cat([inputs["input_ids"], ids], -1), mask, sample.length)

"""The paper's three failure modes, looked for in real answers: SmolLM2 without some layers is read by the whole model.

Imbalance: the reward log q(y) - log p(y) of each sampled token y, and how few tokens carry most of the signal.
Reliability: that reward by position in long answers, and what the teacher says of loops.
Mismatch: the token that ends an answer, under a teacher that writes prompts or the end in another way.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from examples.paper.study import Record, bar
from examples.paper.summary import rounded
from topk_rkl.recipe.rewards import log_ratio
from topk_rkl.recipe.weighting import special_token_mask

if TYPE_CHECKING:
    from examples.paper.failures.readings import Models, Rollout, Table, Tokenizer

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
FEW = (0.01, 0.05)  # of the tokens: those that carry most
CARRIED = ("reward", "sampled_grad", "topk", "topk_grad", "full", "full_grad")
LOW, HIGH, BINS = -15.0, 5.0, 40  # of the histogram; what is beyond counts in the outer bins
GRAM = 4  # tokens that stand in an answer twice make a loop


class Size(NamedTuple):
    layers: int = 24  # kept of the teacher's 30
    nearer: int = 28  # layers of a better student, for the positions alone
    prompts: int = 12
    length: int = 192  # most tokens of an answer
    buckets: int = 6  # of equally many positions
    k: int = 32
    phrase: int = 12  # tokens of an answer that are made a loop
    repeats: int = 8
    greedy: int = 16  # prompts answered greedily


FULL = Size(prompts=32, length=384, greedy=32)
SEEDS = (0, 1, 2, 3)


def measure(size: Size, seeds: Sequence[int]) -> Record:
    from examples.smollm2 import load_teacher

    return measured(models_of(*load_teacher(), size.layers), size, seeds)


def models_of(teacher: nn.Module, tokenizer: "Tokenizer", layers: int) -> "Models":
    from examples.paper.failures.readings import Models
    from examples.smollm2 import without_layers

    return Models(teacher, without_layers(teacher, layers).requires_grad_(False), tokenizer)


def measured(models: "Models", size: Size, seeds: Sequence[int]) -> Record:
    from examples.paper.failures.readings import Reading, token_table
    from examples.smollm2 import GREEDY, PROMPTS, read_prompts, rollout, without_layers

    student, tokenizer = models.student, models.tokenizer
    nearer = models._replace(student=without_layers(models.teacher, size.nearer).requires_grad_(False))
    prompts = [prompt for section in read_prompts(PROMPTS).values() for prompt in section]
    runs, drawn = [], []
    for seed in bar(seeds, "failures"):
        source = torch.Generator().manual_seed(seed)
        sample = rollout(student, tokenizer, prompts[: size.prompts], size.length, 1.0, source)
        table = token_table(models, sample, Reading(sample), size.k)
        other = rollout(nearer.student, tokenizer, prompts[: size.prompts], size.length, 1.0, source)
        drawn.append({name: table[name] for name in ("reward", "full")})
        runs.append(
            {
                "imbalance": imbalance(table),
                "positions": by_position(table, size),
                "nearer": by_position(token_table(nearer, other, Reading(other), size.k), size),
                "loops": loops(models, sample, size),
                "endings": endings(models, sample, prompts, size.k),
            }
        )
    sample = rollout(student, tokenizer, prompts[: size.greedy], size.length, GREEDY, torch.Generator())
    edges = torch.linspace(LOW, HIGH, BINS + 1)  # (BINS + 1,)
    histogram = {"edges": edges, "reward": counts(torch.cat([x["reward"] for x in drawn]))}
    histogram |= {"exact mean": counts(torch.cat([-x["full"] for x in drawn]))}
    return rounded({"runs": runs, "histogram": histogram, "greedy": natural_loops(models, sample)})


def imbalance(table: "Table") -> Record:
    reward = table["reward"]  # (n,)
    centred = reward - reward.mean()  # (n,)
    outside = ~table["in_support"]  # (n,)
    return {
        "tokens": len(reward),
        "negative": (reward < 0).float().mean(),
        "mean": reward.mean(),
        "exact mean": -table["full"].mean(),
        "skew": centred.pow(3).mean() / centred.square().mean().pow(1.5),
        "quantiles": quantiles(reward, QUANTILES),
        "carried": {name: [carried(table[name].abs(), share) for share in FEW] for name in CARRIED},
        "outside": outside.float().mean(),
        "largest gradient outside": table["topk_grad_at_token"][outside].abs().amax() if outside.any() else None,
    }


def carried(
    amounts: Tensor,  # (n,) not negative
    share: float,
) -> Tensor:  # ()
    """What part of the sum that share of the tokens carries which has the largest amounts."""
    ranked = amounts.double().sort(descending=True).values  # (n,)
    return ranked[: max(1, round(share * len(ranked)))].sum() / ranked.sum()


def by_position(table: "Table", size: Size) -> Record | None:
    """Statistics by bucket of positions, over the answers that reach the last position: the same in every bucket."""
    tokens = table["answer"].bincount()  # (B,)
    if not (tokens == size.length).any():
        return None
    whole = (tokens == size.length)[table["answer"]]  # (n,)
    bucket = table["position"] * size.buckets // size.length  # (n,)
    taken = [{name: x[whole & (bucket == b)] for name, x in table.items()} for b in range(size.buckets)]
    return {
        "answers": (tokens == size.length).sum(),
        "quantiles": [quantiles(x["reward"], QUANTILES) for x in taken],
        "reward": [x["reward"].mean() for x in taken],
        "teacher log-prob": [x["teacher_sampled_log_prob"].mean() for x in taken],
        "teacher entropy": [x["teacher_entropy"].mean() for x in taken],
        "student entropy": [x["student_entropy"].mean() for x in taken],
    }


def loops(models: "Models", sample: "Rollout", size: Size) -> Record:
    """What both models think of a phrase after n copies of it, n = 0 .. repeats: means over phrases and tokens.

    looping: the share of the sampled tokens that end a 4-gram seen before.
    """
    from examples.paper.failures.readings import log_probs, looped, repeated
    from examples.smollm2 import response

    ids, real = response(sample)  # (B, T), (B, T)
    inside = torch.cat([repeated(row[kept], GRAM) for row, kept in zip(ids, real)])  # (n,)
    again = looped(sample, size.phrase, size.repeats + 1)
    log_p, log_q = (
        log_probs(model, again).unflatten(-1, (size.repeats + 1, size.phrase))  # (b, repeats + 1, phrase)
        for model in (models.student, models.teacher)
    )
    return {
        "looping": inside.float().mean(),
        "phrases": len(log_p),
        "student": log_p.exp().mean((0, 2)),
        "teacher": log_q.exp().mean((0, 2)),
        "reward": log_ratio(log_p, log_q).mean((0, 2)),
    }


def natural_loops(models: "Models", sample: "Rollout") -> list[Record]:
    """Each greedy answer: the share of its tokens that end a 4-gram seen before, and the reward there."""
    from examples.paper.failures.readings import log_probs, repeated
    from examples.smollm2 import response

    ids, real = response(sample)  # (B, T), (B, T)
    log_p, log_q = log_probs(models.student, sample), log_probs(models.teacher, sample)  # (B, T), (B, T)
    found = []
    for row, kept in enumerate(real):
        inside = repeated(ids[row, kept], GRAM)  # (t,)
        reward, q = log_ratio(log_p, log_q)[row, kept], log_q[row, kept].exp()  # (t,), (t,)
        answer = {"tokens": len(inside), "looping": inside.float().mean()}
        for place, there in {"inside": inside, "outside": ~inside}.items():
            if there.any():
                answer[place] = {"reward": reward[there].mean(), "teacher": q[there].mean()}
        found.append(answer)
    return found


def endings(models: "Models", sample: "Rollout", prompts: list[str], k: int) -> Record | None:
    """The token that ends an answer, under four teachers; lists of the same answers, those that end. None if none does.

    matched: reads what the student reads. spelled: its prompt has the special tokens as plain text.
    renamed: its vocabulary has the end under the id of <|endoftext|>, and that under the id of the end.
    remapped: the same, with the ids of its top K translated.
    The last two are demonstrations. They change the end alone, which the mask drops and S then lacks, by construction.
    """
    from examples.paper.failures.readings import Reading, rows_of, spelled_out, token_table
    from examples.smollm2 import response

    end, other = models.tokenizer.eos_token_id, models.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids, real = response(sample)  # (B, T), (B, T)
    kept = real & special_token_mask(ids, models.tokenizer.all_special_ids, occurrences="first")  # (B, T)
    ends = ((ids == end) & real).any(-1) & kept.any(-1)  # (B,)
    if not ends.any():
        return None
    ended = rows_of(sample, ends)
    asked = [prompts[row] for row in ends.nonzero().flatten().tolist()]
    swapped = (end, other)
    readings = {
        "matched": Reading(ended),
        "spelled": Reading(spelled_out(models, ended, asked)),
        "renamed": Reading(ended, swapped),
        "remapped": Reading(ended, swapped, {other: end, end: other}),
    }
    counted = kept[ends][real[ends]]  # (n,)
    return {name: at_end(token_table(models, ended, reading, k), counted, end) for name, reading in readings.items()}


def at_end(
    table: "Table",
    kept: Tensor,  # (n,) bool
    end: int,
) -> Record:
    """Of each answer: both models at its end, what part of its sums the end has, its mean abs(reward); and masked."""
    last, answer = table["id"] == end, table["answer"]  # (n,), (n,)

    def summed(
        x: Tensor,  # (n,)
    ) -> Tensor:  # (b,)
        return torch.zeros(int(answer.amax()) + 1, dtype=torch.float64).index_add(0, answer, x.double())

    size = table["reward"].abs()  # (n,)
    largest = torch.zeros(int(answer.amax()) + 1).scatter_reduce(0, answer, size, "amax")  # (b,)
    sums = {"reward": size, "sampled": table["sampled_grad"], "topk": table["topk_grad"]}
    return {
        "tokens": summed(torch.ones_like(size)),
        "student log-prob": table["sampled_log_prob"][last],
        "teacher log-prob": table["teacher_sampled_log_prob"][last],
        "share": {name: x[last].double() / summed(x) for name, x in sums.items()},
        "masked share": {name: (x * kept)[last].double() / summed(x * kept) for name, x in sums.items()},
        "is largest": (size[last] == largest).long(),
        "mean": summed(size) / summed(torch.ones_like(size)),
        "masked mean": summed(size * kept) / summed(kept),
        "in support": table["in_support"][last].long(),
        "topk": table["topk"][last],
        "gradient at end": table["topk_grad_at_token"][last],
    }


def quantiles(
    x: Tensor,  # (n,)
    at: Sequence[float],
) -> Tensor:  # (len(at),)
    return x.double().quantile(torch.tensor(at, dtype=torch.float64))


def counts(
    x: Tensor,  # (n,)
) -> Tensor:  # (BINS,)
    return x.clamp(LOW, HIGH).histc(BINS, LOW, HIGH).long()

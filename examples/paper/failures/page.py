"""Tables and claims of the study `failures`, from its record alone."""

import statistics
from itertools import pairwise

from examples.paper.study import OURSELVES, PAPER, Claim, Record
from examples.paper.summary import Rows, above, every, shown

MODES = [f"{PAPER}, failure mode {i}" for i in (1, 2, 3)]
FIVE_PERCENT = 1  # of the quantiles, and of the shares of tokens
NAMED = {
    "reward": "sampled token: abs(reward)",
    "sampled_grad": "sampled token: squared gradient",
    "topk": "top-K loss: value",
    "topk_grad": "top-K loss: squared gradient",
    "full": "full KL: value",
    "full_grad": "full KL: squared gradient",
}
STUDENTS = {"positions": "layers", "nearer": "nearer"}  # a part of a run: its layers in Size
TEACHERS = {
    "matched": "reads what the student reads",
    "spelled": "has the prompt's special tokens as plain text",
    "renamed": "ends answers by another id, as a demonstration",
    "remapped": "the same, its top K remapped",
}


def of_runs(record: Record, part: str, name: str) -> list:
    return [run[part][name] for run in record["runs"]]


def by_position(record: Record, part: str) -> list[Record]:
    """Of the seeds that have an answer of full length."""
    return [run[part] for run in record["runs"] if run[part] is not None]


def carried(record: Record, name: str, few: int = FIVE_PERCENT) -> list[float]:
    """The part of a sum that the largest tokens carry, per seed."""
    return [shares[name][few] for shares in of_runs(record, "imbalance", "carried")]


def endings(record: Record) -> list[Record]:
    """Of the seeds that have an answer which ends."""
    return [run["endings"] for run in record["runs"] if run["endings"] is not None]


def ends(record: Record, teacher: str, name: str, loss: str | None = None) -> list[float]:
    """The mean of a figure over the answers that end, per seed."""
    found = [end[teacher][name] for end in endings(record)]
    return [statistics.fmean(values[loss] if loss else values) for values in found]


def looping(record: Record, name: str) -> list[tuple[float, float]]:
    """A figure inside and outside of loops, of every greedy answer that has both."""
    answers = [answer for answer in record["greedy"] if "inside" in answer and "outside" in answer]
    return [(answer["inside"][name], answer["outside"][name]) for answer in answers]


def looped_share(record: Record) -> float:
    """Of all tokens of the greedy answers, the share inside loops."""
    tokens = [answer["tokens"] for answer in record["greedy"]]
    return sum(n * answer["looping"] for n, answer in zip(tokens, record["greedy"])) / sum(tokens)


def mask_removes(record: Record, teacher: str) -> list[float]:
    """Of what a mismatched teacher changes in the answers' mean abs(reward), the part gone under the mask, per seed."""
    changes = [
        [
            statistics.fmean(abs(x - y) for x, y in zip(end[teacher][name], end["matched"][name]))
            for name in ("mean", "masked mean")
        ]
        for end in endings(record)
    ]
    return [1 - masked / whole for whole, masked in changes if whole]


def tables(record: Record) -> dict[str, Rows]:
    return {
        "rewards": rewards_table(record),
        "signal": signal_table(record),
        "positions": positions_table(record),
        "loops": loops_table(record),
        "ends": ends_table(record),
    }


def rewards_table(record: Record) -> Rows:
    def row(title: str, name: str) -> list[str]:
        return [title, shown(of_runs(record, "imbalance", name))]

    quantiles = list(zip(*of_runs(record, "imbalance", "quantiles")))
    return [
        ["reward log q(y) - log p(y), nats", "mean over seeds"],
        row("share below 0", "negative"),
        row("mean of the sampled tokens", "mean"),
        row("exact mean over the vocabulary, -KL(p, q)", "exact mean"),
        row("skew", "skew"),
        *(
            [f"quantile {at}", shown(x)]
            for at, x in zip(("1 %", "5 %", "25 %", "50 %", "75 %", "95 %", "99 %"), quantiles)
        ),
        row("share of sampled tokens outside the teacher's top K", "outside"),
    ]


def signal_table(record: Record) -> Rows:
    rows = [[title, *(shown(carried(record, name, few)) for few in (0, 1))] for name, title in NAMED.items()]
    return [["sum over all tokens", "in the top 1 %", "in the top 5 %"], *rows]


def positions_table(record: Record) -> Rows:
    size = record["size"]
    head = ["student", "positions", "mean reward", "1 % quantile", "5 % quantile", "median", "teacher's log q(y)"]
    rows = [[*head, "teacher's entropy", "student's entropy"]]
    edges = [size["length"] * b // size["buckets"] for b in range(size["buckets"] + 1)]
    for part, layers in STUDENTS.items():
        runs = by_position(record, part)
        for b, (first, last) in enumerate(pairwise(edges)):
            columns = [[run["quantiles"][b][i] for run in runs] for i in (0, 1, 3)]
            names = ("teacher log-prob", "teacher entropy", "student entropy")
            columns = [[run["reward"][b] for run in runs], *columns, *([run[x][b] for run in runs] for x in names)]
            rows.append([f"{size[layers]} layers", f"{first + 1} to {last}", *map(shown, columns)])
    return rows


def loops_table(record: Record) -> Rows:
    rows = [["place", "student's p", "teacher's q", "mean reward"]]
    for n in range(record["size"]["repeats"] + 1):
        columns = [[x[n] for x in of_runs(record, "loops", name)] for name in ("student", "teacher", "reward")]
        rows.append([f"phrase after {n} copies of it", *map(shown, columns)])
    for place, index in {"inside": 0, "outside": 1}.items():
        reward, q = ([pair[index] for pair in looping(record, name)] for name in ("reward", "teacher"))
        rows.append([f"greedy answers, {place} loops", "", shown(q), shown(reward)])
    return rows


def ends_table(record: Record) -> Rows:
    head = [
        "teacher; means over the answers of a seed",
        "log p(end)",
        "log q(end)",
        "largest reward",
        "part of abs(reward)",
        "part of sampled signal",
    ]
    rows = [[*head, "mean abs(reward)", "masked", "end in S", "top-K loss", "part of top-K signal"]]
    for teacher, says in TEACHERS.items():
        of_token = [ends(record, teacher, name) for name in ("student log-prob", "teacher log-prob", "is largest")]
        of_token += [ends(record, teacher, "share", loss) for loss in ("reward", "sampled")]
        of_token += [ends(record, teacher, name) for name in ("mean", "masked mean")]
        of_top_k = [
            *(ends(record, teacher, name) for name in ("in support", "topk")),
            ends(record, teacher, "share", "topk"),
        ]
        sampled = [""] * len(of_token) if teacher == "remapped" else list(map(shown, of_token))
        rows.append([f"{teacher}: {says}", *sampled, *map(shown, of_top_k)])
    return rows


def claims(record: Record) -> list[Claim]:
    return [*imbalance_claims(record), *reliability_claims(record), *mismatch_claims(record)]


def imbalance_claims(record: Record) -> list[Claim]:
    negative, mean, exact = (of_runs(record, "imbalance", x) for x in ("negative", "mean", "exact mean"))
    sampled, topk = carried(record, "sampled_grad"), carried(record, "topk_grad")
    gained = [x - y for x, y in zip(sampled, topk)]
    largest = max((x for x in of_runs(record, "imbalance", "largest gradient outside") if x is not None), default=None)
    return [
        Claim(
            MODES[0],
            "Most sampled tokens get a reward below 0.",
            f"share below 0: {shown(negative)}; mean {shown(mean)}, exact mean -KL {shown(exact)}",
            above(negative, 0.5),
        ),
        Claim(
            MODES[0],
            "A few tokens dominate the rewards: 5 % of the tokens carry more than half of the summed abs(reward).",
            f"top 5 %: {shown(carried(record, 'reward'))}; top 1 %: {shown(carried(record, 'reward', 0))}",
            above(carried(record, "reward"), 0.5),
        ),
        Claim(
            MODES[0],
            "A few tokens dominate the squared logit gradient: 5 % of the tokens carry more than half of it.",
            f"top 5 %: {shown(sampled)}; top 1 %: {shown(carried(record, 'sampled_grad', 0))}",
            above(sampled, 0.5),
        ),
        Claim(
            OURSELVES,
            "The top-K loss spreads its squared gradient over more tokens than the sampled-token objective.",
            f"part of the top 5 %: top-K {shown(topk)}, sampled {shown(sampled)}, difference {shown(gained)}",
            above(gained, 0),
        ),
        Claim(
            f"{PAPER}, section 3.2",
            "The top-K loss gives no gradient to a sampled token outside the teacher's top K.",
            f"largest abs(gradient) at one: {'none' if largest is None else f'{largest:g}'}; "
            f"they are {shown(of_runs(record, 'imbalance', 'outside'))} of all sampled tokens",
            None if largest is None else largest == 0,
        ),
    ]


def tail_claim(record: Record, part: str) -> Claim:
    runs, size = by_position(record, part), record["size"]
    first, last = ([run["quantiles"][b][FIVE_PERCENT] for run in runs] for b in (0, -1))
    answers = sum(run["answers"] for run in runs)
    return Claim(
        MODES[1],
        f"The lower tail of log q(y) - log p(y) widens with the position: a student of {size[STUDENTS[part]]} layers, "
        "5 % quantile.",
        f"first of {size['buckets']} buckets {shown(first)}, last {shown(last)}, over {answers} "
        f"answers of {size['length']} tokens (the paper's have up to 16,384)",
        above([x - y for x, y in zip(first, last)], 0),
    )


def reliability_claims(record: Record) -> list[Claim]:
    once, often = ([x[n] for x in of_runs(record, "loops", "teacher")] for n in (1, -1))
    reward = [x[-1] for x in of_runs(record, "loops", "reward")]
    inside, outside = ([pair[i] for pair in looping(record, "reward")] for i in (0, 1))
    copies = record["size"]["repeats"]
    return [
        *(tail_claim(record, part) for part in STUDENTS),
        Claim(
            MODES[1],
            "The teacher agrees with loops: it gives a phrase more probability after "
            f"{copies} copies than after 1, and over 0.5.",
            f"teacher's mean q per token after 1 copy {shown(once)}, after {copies} {shown(often)}",
            every([above([y - x for x, y in zip(once, often)]), above(often, 0.5)]),
        ),
        Claim(
            MODES[1],
            "The teacher gives a forced loop more probability than the student does.",
            f"mean log q - log p per token after {copies} copies {shown(reward)}",
            above(reward, 0),
        ),
        Claim(
            MODES[1],
            "The student's own loops are punished less than its other tokens (a sample of greedy answers).",
            f"mean reward inside repeated 4-grams {shown(inside)}, outside {shown(outside)}; "
            f"{looped_share(record):.0%} of greedy and {statistics.fmean(of_runs(record, 'loops', 'looping')):.1%} of "
            f"sampled tokens are inside; means over {len(inside)} greedy answers that have both",
            above([x - y for x, y in zip(inside, outside)], 0),
        ),
    ]


def mismatch_claims(record: Record) -> list[Claim]:
    """Of the teacher that reads another prompt: how the others change the end is so by construction."""
    teacher, here = "spelled", f"where the teacher {TEACHERS['spelled']}"
    student, matched = (shown(ends(record, "matched", f"{who} log-prob")) for who in ("student", "teacher"))
    read = shown(ends(record, teacher, "teacher log-prob"))
    answers = sum(len(end[teacher]["mean"]) for end in endings(record))
    largest, shares = ends(record, teacher, "is largest"), ends(record, teacher, "share", "reward")
    sampled, topk = (ends(record, teacher, "share", loss) for loss in ("sampled", "topk"))
    spared, removed = [x - y for x, y in zip(sampled, topk)], mask_removes(record, teacher)
    return [
        Claim(
            MODES[2],
            f"One token dominates {here}: abs(reward) is largest at the end in most answers.",
            f"largest in {shown(largest)} of a seed's answers ({answers} in all), {shown(shares)} of the summed "
            f"abs(reward); log p {student}, matched log q {matched}, here {read}",
            above(largest, 0.5),
        ),
        Claim(
            f"{PAPER}, section 3",
            f"The mask of special tokens removes most (nine tenths) of what changes {here}.",
            f"part of the change in an answer's mean abs(reward) that is gone (below 0: it grew): {shown(removed)}",
            above(removed, 0.9),
        ),
        Claim(
            OURSELVES,
            f"The top-K loss suffers less than the sampled token {here}: part of the squared gradient at the end.",
            f"sampled {shown(sampled)}, top-K {shown(topk)}, difference {shown(spared)}",
            above(spared),
        ),
    ]

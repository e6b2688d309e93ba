"""Two mirrored tasks on a line, and policies that walk there: appendix E of the paper.

A policy moves s to s + delta, with delta ~ N(mean, std) of a small network that is given the task, s and the time. The
left task leads from +2 to -3, the right one from -2 to +3. The paper gives neither reward nor optimiser nor a floor of
the std; those of this file are its constants.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from examples.paper import stacked
from examples.paper.study import bar
from topk_rkl.recipe.rewards import return_to_go

TASKS = {"left": -1.0, "right": 1.0}  # the sign of the target
START, TARGET = -2.0, 3.0  # times the sign of the task
WIDTH = 60  # 4,022 parameters
INITIAL = 3**-0.5  # gives weights the variance that torch.nn.Linear gives them
STD_FLOOR = 0.1
EFFORT = 1.0  # what a teacher pays for delta^2, beside the distance that is left
TEACHER_LR = 3e-3  # of Adam


class Policy(nn.Module):
    """R networks of three layers: (task, position, time) gives the mean and the std of a move."""

    def __init__(self, sources: Sequence[torch.Generator]) -> None:
        super().__init__()
        sizes = [(3, WIDTH), (WIDTH, WIDTH), (WIDTH, 2)]
        first, second, self.output = (stacked.Linear(*size, sources, INITIAL) for size in sizes)
        self.hidden = nn.Sequential(first, nn.Tanh(), second, nn.Tanh())

    def forward(
        self,
        x: Tensor,  # (R, ..., 3)
    ) -> Normal:  # (R, ...)
        mean, std = self.output(self.hidden(x)).unbind(-1)  # (R, ...) each
        return Normal(mean, STD_FLOOR + nn.functional.softplus(std), validate_args=False)


class Walk(NamedTuple):
    inputs: Tensor  # (R, B, T, 3) of the policy: task, position and time before each move
    moves: Tensor  # (R, B, T)
    left: Tensor  # (R, B, T) distance to the target after each move


@torch.no_grad()
def walk(
    policy: Policy,
    signs: Tensor,  # (R,) of each run's task
    sources: Sequence[torch.Generator],
    batch: int,
    steps: int,
) -> Walk:
    noise = stacked.normal((batch, steps), sources)  # (R, B, T)
    task = signs[:, None].expand(-1, batch)  # (R, B)
    positions, inputs = [START * task], []
    for t in range(steps):
        inputs.append(torch.stack([task, positions[-1], torch.full_like(task, t / steps)], -1))  # (R, B, 3)
        move = policy(inputs[-1])
        positions.append(positions[-1] + move.mean + move.stddev * noise[..., t])
    path = torch.stack(positions, -1)  # (R, B, T + 1)
    return Walk(torch.stack(inputs, 2), path.diff(), (path[..., 1:] - TARGET * task[..., None]).abs())


def train_teachers(iterations: int, batch: int, steps: int, seeds: Sequence[int]) -> Policy:
    """REINFORCE, with the batch's mean as baseline: the left teacher of each seed, then the right one of each."""
    sources = stacked.generators([2 * seed + right for right in (0, 1) for seed in seeds])
    signs = torch.tensor(list(TASKS.values())).repeat_interleave(len(seeds))  # (R,)
    policy = Policy(sources)
    optimizer = torch.optim.Adam(policy.parameters(), lr=TEACHER_LR)
    for _ in bar(range(iterations), "teachers"):
        made = walk(policy, signs, sources, batch, steps)
        returns = return_to_go(-made.left - EFFORT * made.moves.square())  # (R, B, T)
        advantage = (returns - returns.mean(1, keepdim=True)) / (returns.std(1, keepdim=True) + 1e-6)
        optimizer.zero_grad()
        (-(advantage * policy(made.inputs).log_prob(made.moves)).sum(-1).mean(1).sum()).backward()
        optimizer.step()
    return policy.requires_grad_(False)


def pick(policy: Policy, runs: Sequence[int]) -> Policy:
    """Those runs of a stack, as a stack of their own."""
    chosen = copy.deepcopy(policy)
    for p in chosen.parameters():
        p.data = p.data[list(runs)]
    return chosen

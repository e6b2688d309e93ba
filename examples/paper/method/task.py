"""A task with many right answers: walk from a square of a board to another, in a given number of rook's moves.

A prompt is the obstacles, the target and the start. An answer is the squares that the rook lands on, each on the row or
the column of the one before and none an obstacle, the target last. An end token follows. Teacher and student have
learned different ones, as where tokenizers spell a special token differently. Either ends an answer.

V is 67. A rook has 14 moves from every square, so that at most 14 next tokens are right.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SIDE = 8
SQUARES = SIDE * SIDE
ENDS = TEACHER_END, STUDENT_END = SQUARES, SQUARES + 1
PAD = SQUARES + 2
VOCAB = SQUARES + 3
ROWS, COLUMNS = torch.arange(SQUARES) // SIDE, torch.arange(SQUARES) % SIDE
MOVES = (ROWS[:, None] == ROWS) ^ (COLUMNS[:, None] == COLUMNS)  # (64, 64) bool, from and to


def pose(count: int, obstacles: int, sources: Sequence[torch.Generator]) -> Tensor:  # (R, count, obstacles + 2)
    """Prompts, each run's from its own generator."""
    return torch.stack([torch.rand(count, SQUARES, generator=x).argsort(-1)[:, : obstacles + 2] for x in sources])


def solve(
    prompts: Tensor,  # (R, B, P)
    moves: int,
    end: int,
    sources: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor]:  # (R, B, moves + 1), (R, B, moves + 1, V)
    """An answer drawn from all right ones, and the probabilities from which each of its tokens was drawn."""
    blocked, target, square = prompts[..., :-2], prompts[..., -2:-1], prompts[..., -1]
    free = torch.ones(*square.shape, SQUARES).scatter_(-1, blocked, 0)  # (R, B, 64)
    ways = [torch.zeros_like(free).scatter_(-1, target, 1)]  # (R, B, 64) each: walks to the target, in 0, 1 ... moves
    for _ in range(moves - 1):
        ways.append(free * ways[-1] @ MOVES.float())
    ids, chances = [], []
    for left in reversed(ways):
        chances.append(MOVES[square] * free * left)  # (R, B, 64)
        square = torch.stack([x.multinomial(1, generator=s).squeeze(-1) for x, s in zip(chances[-1], sources)])
        ids.append(square)
    probs = torch.stack(chances, 2)  # (R, B, moves, 64)
    probs = torch.nn.functional.pad(probs / probs.sum(-1, keepdim=True), (0, VOCAB - SQUARES, 0, 1))
    probs[..., -1, end] = 1
    return torch.stack([*ids, torch.full_like(square, end)], -1), probs


def is_right(
    prompts: Tensor,  # (R, B, P)
    responses: Tensor,  # (R, B, T), T > moves
    moves: int,
) -> Tensor:  # (R, B) bool
    blocked, target, start = prompts[..., :-2], prompts[..., -2], prompts[..., -1:]
    walk = responses[..., :moves]  # (R, B, moves)
    on_board = (walk < SQUARES).all(-1)
    route = torch.cat([start, walk], -1).clamp_max(SQUARES - 1)
    legal = MOVES[route[..., :-1], route[..., 1:]].all(-1) & (walk[..., None] != blocked[..., None, :]).all((-1, -2))
    return on_board & legal & (walk[..., -1] == target) & torch.isin(responses[..., moves], torch.tensor(ENDS))

"""csrc/bindings.cpp. A vector is (pointer, kind, stride).

A matrix is (pointer, kind, columns, stride, step, rows of a slab, stride of the slabs).
"""

from collections.abc import Sequence

BUILD: str

Matrix = tuple[int, int, int, int, int, int, int]
Vector = tuple[int, int, int]
Divergence = Sequence[float]

def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def select(logits: Matrix, n: int, k: int, normalize: bool, threads: int, ids: int, values: int) -> None: ...
def support_loss(
    student: Matrix,
    n: int,
    k: int,
    ids: Matrix,
    values: Matrix,
    weights: Vector,
    temperature: float,
    divergence: Divergence,
    threads: int,
    loss: int,
    g: int,
) -> None: ...
def select_loss(
    student: Matrix,
    teacher: Matrix,
    n: int,
    k: int,
    weights: Vector,
    temperature: float,
    divergence: Divergence,
    threads: int,
    loss: int,
    ids: int,
    g: int,
) -> None: ...
def tail_logit(logits: Matrix, n: int, k: int, ids: Matrix, temperature: float, threads: int, out: int) -> None: ...
def mass_loss(
    student: Matrix,
    n: int,
    k: int,
    ids: Matrix,
    values: Matrix,
    tail: Vector,
    weights: Vector,
    temperature: float,
    divergence: Divergence,
    mass: int,
    threads: int,
    loss: int,
    g: int,
    others: int,
) -> None: ...
def mass_grad(
    g: Matrix,
    ids: Matrix,
    others: Matrix,
    grad_output: Vector,
    student: Matrix,
    out: Matrix,
    n: int,
    k: int,
    temperature: float,
    threads: int,
) -> None: ...
def scatter(
    g: Matrix,
    ids: Matrix,
    grad_output: Vector,
    out: Matrix,
    n: int,
    k: int,
    unique: bool,
    threads: int,
) -> None: ...
def linear_loss(
    hidden: Matrix,
    head: Matrix,
    vocab: int,
    bias: Vector,
    n: int,
    k: int,
    ids: Matrix,
    values: Matrix,
    weights: Vector,
    temperature: float,
    logit_scale: float,
    softcap: float,
    divergence: Divergence,
    threads: int,
    loss: int,
    g: int,
    dhidden: int,
) -> None: ...
def linear_weight_grad(
    g: Matrix,
    ids: Matrix,
    hidden: Matrix,
    n: int,
    k: int,
    vocab: int,
    dhead: Matrix,
    dbias: Vector,
    threads: int,
) -> None: ...

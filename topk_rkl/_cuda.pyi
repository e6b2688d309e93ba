"""csrc/cuda/bindings.cpp. A vector is (pointer, kind, stride).

A matrix is (pointer, kind, columns, stride, step, rows of a slab, stride of the slabs).
"""

BUILD: str
HOST: bool
MAX_K: int

Matrix = tuple[int, int, int, int, int, int, int]
Vector = tuple[int, int, int]
Where = tuple[int, int]  # device, stream

def select_scratch(n: int, vocab: int, kind: int, k: int, normalize: bool, device: int) -> int: ...
def select(
    logits: Matrix, n: int, k: int, normalize: bool, scratch: int, ids: int, values: int, where: Where
) -> None: ...
def support_loss(
    student: Matrix,
    n: int,
    k: int,
    ids: Matrix,
    values: Matrix,
    weights: Vector,
    temperature: float,
    loss: int,
    g: int,
    where: Where,
) -> None: ...
def select_loss(
    student: Matrix,
    teacher: Matrix,
    n: int,
    k: int,
    weights: Vector,
    temperature: float,
    scratch: int,
    loss: int,
    ids: int,
    g: int,
    where: Where,
) -> None: ...
def scatter(
    g: Matrix,
    ids: Matrix,
    grad_output: Vector,
    out: Matrix,
    n: int,
    k: int,
    unique: bool,
    where: Where,
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
    loss: int,
    g: int,
    dhidden: int,
    where: Where,
) -> None: ...
def linear_weight_grad_scratch(n: int, k: int, vocab: int, width: int, device: int) -> int: ...
def linear_weight_grad(
    g: int,
    ids: Matrix,
    hidden: Matrix,
    n: int,
    k: int,
    vocab: int,
    dhead: Matrix,
    dbias: Vector,
    scratch: int,
    where: Where,
) -> None: ...

# Of a build for the host alone.
def seed(value: int) -> None: ...
def sites() -> list[str]: ...
def drop(site: str) -> None: ...
def shorten(bytes: int) -> None: ...

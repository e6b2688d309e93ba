"""csrc/bindings.cpp. A matrix is (pointer, kind, columns, stride, step), a vector (pointer, kind, stride)."""

BUILD: str

Matrix = tuple[int, int, int, int, int]
Vector = tuple[int, int, int]

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
    threads: int,
    loss: int,
    ids: int,
    g: int,
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
def sparse_head(
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
    threads: int,
    loss: int,
    g: int,
    dhidden: int,
) -> None: ...
def sparse_head_weight_grad(
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

"""The items, in the order of their worth: a run that is cut short has what matters most."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache

from torch import Tensor

from benchmarks.cases import LINE
from gpu.items import experiments
from gpu.items.floors import floors, read
from gpu.items.forms import Form, Item
from gpu.items.inputs import Inputs
from topk_rkl import Support, linear_topk_reverse_kl, ops, teacher_topk, topk_reverse_kl, use_backend
from topk_rkl.objective import pack

OURS = ("triton", "cuda")

ByName = Callable[[str], object]  # the work, by the backend of that name


def registry(inputs: Inputs) -> list[Item]:
    narrow, usual, wide, widest = inputs.sizes.ks
    return [
        *floors(inputs),
        select(inputs, usual, rival=True),
        *(select(inputs, k) for k in (wide, widest, narrow)),
        *(select_loss(inputs, k) for k in (usual, wide, widest, narrow)),
        *(loss_and_gradient(inputs, k) for k in (usual, wide)),
        *(linear(inputs, narrow, dhead, rival=True) for dhead in (False, True)),
        *(linear(inputs, usual, dhead) for dhead in (False, True)),
        linear(inputs, narrow, dhead=True, hot=True),
        head(inputs, narrow),
        head(inputs, narrow, hot=True),
        head(inputs, narrow, dhidden=False),
        head(inputs, usual),
        *(head_gradient(inputs, k, hot) for k, hot in ((narrow, False), (narrow, True), (usual, False))),
        *(select_trial(inputs, place) for place in (2, 3, 1)),
        *(select_loss_of_a_shard(inputs, k) for k in (narrow, usual)),
        *(head_trial(inputs, k, hot) for k, hot in ((narrow, False), (narrow, True), (usual, False))),
        *(head_gradient_trial(inputs, narrow, hot) for hot in (False, True)),
        of_support(inputs, usual),
        *mass(inputs, usual),
        scatter(inputs, usual, unique=True),
        scatter(inputs, usual, unique=False),
        support_loss(inputs, usual),
        normalize(inputs, usual),
        *(select_float32(inputs, k) for k in (usual, wide)),
        *(on_few(inputs, kernel, usual, rows) for kernel in ("select", "select_loss") for rows in inputs.sizes.few),
        *slabs(inputs, usual),
        *host(inputs, narrow),
    ]


def by_backend(call: ByName) -> dict[str, Form]:
    return {name: Form(lambda _, name=name: call(name), name) for name in OURS}


def by_override(call: ByName, overrides: dict[str, experiments.Override]) -> dict[str, Form]:
    def form(override: Callable[[], AbstractContextManager[object]]) -> Form:
        def under_trial(_: int) -> object:
            with override():
                return call("triton")

        return Form(under_trial, "triton")

    return {label: form(override) for label, override in overrides.items()}


def of_logits(inputs: Inputs, k: int, dtype: str = "bfloat16", n: int | None = None) -> dict[str, int | str]:
    return {"n": n or inputs.sizes.n, "v": inputs.sizes.v, "k": k, "dtype": dtype}


def of_head(inputs: Inputs, k: int) -> dict[str, int | str]:
    return {**of_logits(inputs, k), "h": inputs.sizes.h}


def select(inputs: Inputs, k: int, rival: bool = False) -> Item:
    forms = by_backend(lambda name: ops.select(inputs.teacher, k, False, name))
    if rival:
        forms["torch.topk"] = Form(lambda _: inputs.teacher.topk(k))
    size, sizes = inputs.sizes.n * inputs.sizes.row, of_logits(inputs, k)
    return Item(f"select K {k:,}", forms, "select", size, sizes=sizes, decision="backend of a selection")


def selected_loss(inputs: Inputs, k: int) -> ByName:
    return lambda name: ops.select_loss(inputs.student, inputs.teacher, k, None, None, name)


def select_loss(inputs: Inputs, k: int) -> Item:
    size, sizes = inputs.sizes.n * inputs.sizes.row, of_logits(inputs, k)
    forms = by_backend(selected_loss(inputs, k))
    return Item(f"select_loss K {k:,}", forms, "select_loss", size, sizes=sizes, decision="backend of a selection")


def select_trial(inputs: Inputs, place: int) -> Item:
    k = inputs.sizes.ks[place]
    size, sizes = inputs.sizes.n * inputs.sizes.row, of_logits(inputs, k)
    forms = by_override(selected_loss(inputs, k), experiments.SELECTIONS[place])
    decision = "warps and registers of a selection"
    return Item(f"select_loss K {k:,}, warps and registers", forms, "select_loss", size, sizes=sizes, decision=decision)


def select_loss_of_a_shard(inputs: Inputs, k: int) -> Item:
    """A shard of the vocabulary on one of eight ranks."""
    columns, forms = inputs.sizes.shard, by_backend(lambda name: ops.select_loss(*inputs.shards, k, None, None, name))
    size, sizes = 2 * inputs.sizes.n * columns, {**of_logits(inputs, k), "v": columns}
    return Item(f"select_loss of a shard K {k:,}", forms, "select_loss", size, sizes=sizes)


def normalize(inputs: Inputs, k: int) -> Item:
    forms = by_backend(lambda name: ops.select(inputs.teacher, k, True, name))
    return Item(f"normalize K {k:,}", forms, "normalize", inputs.sizes.n * inputs.sizes.row, sizes=of_logits(inputs, k))


def select_float32(inputs: Inputs, k: int) -> Item:
    n, row = inputs.sizes.n // 2, 4 * inputs.sizes.v
    forms = by_backend(lambda name: ops.select(inputs.teacher_in_float32, k, False, name))
    return Item(f"select float32 K {k:,}", forms, "select", n * row, sizes=of_logits(inputs, k, "float32", n))


def few(inputs: Inputs, rows: int, i: int) -> slice:
    """Other rows in every turn, so that no cache has them."""
    start = i * rows % (inputs.sizes.n - rows + 1)
    return slice(start, start + rows)


def on_few(inputs: Inputs, kernel: str, k: int, rows: int) -> Item:
    calls = {
        "select": lambda part, name: ops.select(inputs.teacher[part], k, False, name),
        "select_loss": lambda part, name: ops.select_loss(
            inputs.student[part], inputs.teacher[part], k, None, None, name
        ),
    }

    def form(name: str) -> Form:
        return Form(lambda i: calls[kernel](few(inputs, rows, i), name), name)

    plain = Form(lambda i: read(inputs.teacher[few(inputs, rows, i)], inputs.sizes.read_words, 8))
    forms = {**{name: form(name) for name in OURS}, "read": plain}
    size, sizes = rows * inputs.sizes.row, of_logits(inputs, k, n=rows)
    return Item(f"{kernel} K {k:,} N {rows:,}", forms, read=size, sizes=sizes, floor="read")


def loss_and_gradient(inputs: Inputs, k: int) -> Item:
    """The public entry, from logits of both sides to the dense gradient."""

    def call(name: str) -> None:
        leaf = inputs.student.detach().requires_grad_()
        with use_backend(name):
            topk_reverse_kl(leaf, inputs.teacher, k=k).backward()

    size = inputs.sizes.n * inputs.sizes.row
    forms = by_backend(call)
    return Item(f"loss and gradient K {k:,}", forms, read=size, written=size, sizes=of_logits(inputs, k))


def of_support(inputs: Inputs, k: int) -> Item:
    """The public entry from the teacher's K tokens, to the dense gradient; beside it plain PyTorch."""

    def ours(name: str) -> None:
        leaf = inputs.student.detach().requires_grad_()
        with use_backend(name):
            topk_reverse_kl(leaf, Support(inputs.ids(k), inputs.values(k))).backward()

    def plain(_: int) -> None:
        leaf = inputs.student.detach().requires_grad_()
        log_p, log_q = leaf.gather(-1, inputs.ids(k).long()).float().log_softmax(-1), inputs.values(k).log_softmax(-1)
        (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()

    forms = {**by_backend(ours), "plain PyTorch": Form(plain)}
    return Item(
        f"Support K {k:,}, loss and gradient", forms, "", 0, inputs.sizes.n * inputs.sizes.row, of_logits(inputs, k)
    )


def mass(inputs: Inputs, k: int) -> list[Item]:
    """What is compared outside S too: every logit is read, and every gradient written."""
    objective, size, sizes = pack(mass="tail"), inputs.sizes.n * inputs.sizes.row, of_logits(inputs, k)

    def loss(_: int) -> tuple[Tensor, Tensor, Tensor]:
        given = inputs.student, inputs.ids(k), inputs.values(k), inputs.per_row.double(), None, objective
        return ops.mass_loss(*given, "triton")

    def gradient(_: int) -> None:
        _, g, outside = found(0)
        ops.mass_grad(g, inputs.ids(k), outside, inputs.per_row, inputs.student, inputs.gradient, objective, "triton")

    found = cache(loss)
    return [
        Item(f"mass_loss K {k:,}", {"triton": Form(loss, "triton")}, "", size, sizes=sizes),
        Item(f"mass_grad K {k:,}", {"triton": Form(gradient, "triton")}, "", size, size, sizes),
    ]


def scatter(inputs: Inputs, k: int, unique: bool) -> Item:
    def call(name: str) -> None:
        ops.scatter(inputs.values(k), inputs.ids(k), inputs.per_row, inputs.gradient, unique, name)

    size, sizes = inputs.sizes.n * inputs.sizes.row, of_logits(inputs, k)
    kernel = "scatter" if unique else "scatter_repeated"
    return Item(f"{kernel} K {k:,}", by_backend(call), kernel, written=size, sizes=sizes)


def support_loss(inputs: Inputs, k: int) -> Item:
    """The slots of other rows in every turn: those of one turn fit in a second-level cache."""

    def call(i: int, name: str) -> object:
        student = inputs.student_batch.flatten(0, 1)[i % inputs.sizes.batch :][: inputs.sizes.n]
        return ops.support_loss(student, inputs.ids(k), inputs.values(k), None, None, name)

    forms = {name: Form(lambda i, name=name: call(i, name), name) for name in OURS}
    slots, sizes = inputs.sizes.n * k, of_logits(inputs, k)
    return Item(f"support_loss K {k:,}", forms, "support_loss", slots * (LINE + 8), slots * 4, sizes)


def from_head(inputs: Inputs, k: int, hot: bool, dhidden: bool = True) -> ByName:
    def call(name: str) -> object:
        ids = (inputs.hot_ids if hot else inputs.ids)(k)
        args = inputs.hidden, inputs.head, None, ids, inputs.values(k), None, None, dhidden
        return ops.linear_loss(*args, name)

    return call


def head(inputs: Inputs, k: int, hot: bool = False, dhidden: bool = True) -> Item:
    size, forms = inputs.sizes.n * k * 2 * inputs.sizes.h, by_backend(from_head(inputs, k, hot, dhidden))
    name = f"linear_loss K {k:,}{', hot ids' if hot else ''}{'' if dhidden else ', no dhidden'}"
    kernel = "linear_loss" if dhidden and not hot else ""
    return Item(name, forms, kernel, size, sizes=of_head(inputs, k), decision="backend of the head")


def head_trial(inputs: Inputs, k: int, hot: bool) -> Item:
    size, forms = inputs.sizes.n * k * 2 * inputs.sizes.h, by_override(from_head(inputs, k, hot), experiments.HEADS)
    name = f"linear_loss K {k:,}, warps{', hot ids' if hot else ''}"
    return Item(name, forms, "" if hot else "linear_loss", size, sizes=of_head(inputs, k), decision="warps of the head")


def summed_head(inputs: Inputs, k: int, hot: bool) -> ByName:
    def call(name: str) -> None:
        ids = (inputs.hot_ids if hot else inputs.ids)(k)
        ops.linear_weight_grad(inputs.values(k), ids, inputs.hidden, inputs.dhead, None, False, name)

    return call


def head_gradient(inputs: Inputs, k: int, hot: bool) -> Item:
    name, forms = f"weight_grad K {k:,}{', hot ids' if hot else ''}", by_backend(summed_head(inputs, k, hot))
    return Item(name, forms, "", *head_bytes(inputs), of_head(inputs, k), "backend of the head's gradient")


def head_gradient_trial(inputs: Inputs, k: int, hot: bool) -> Item:
    name = f"weight_grad K {k:,}, block{', hot ids' if hot else ''}"
    forms = by_override(summed_head(inputs, k, hot), experiments.WEIGHT_GRADS)
    return Item(name, forms, "", *head_bytes(inputs), of_head(inputs, k), "block of the head's gradient")


def head_bytes(inputs: Inputs) -> tuple[int, int]:
    return inputs.sizes.n * 2 * inputs.sizes.h, inputs.sizes.v * 2 * inputs.sizes.h


def linear(inputs: Inputs, k: int, dhead: bool, rival: bool = False, hot: bool = False) -> Item:
    """The public entry from hidden states: the forward pass, which makes dhidden, or both passes with dhead as well.

    Beside it the dense products that a loss over the vocabulary cannot do without, in chunks and the student's alone:
    logits and dhidden, and with `dhead` that one.
    """

    def ours(name: str) -> None:
        hidden = inputs.hidden.detach().requires_grad_()
        head = inputs.head.detach().requires_grad_(dhead)
        with use_backend(name):
            ids = (inputs.hot_ids if hot else inputs.ids)(k)
            loss = linear_topk_reverse_kl(hidden, head, Support(ids, inputs.values(k)))
            if dhead:
                loss.backward()

    def dense(_: int) -> None:
        for part in inputs.hidden.split(inputs.sizes.chunk):
            logits = part @ inputs.head.T  # (n, V)
            _ = logits @ inputs.head  # (n, H)
            if dhead:
                inputs.dhead.addmm_(logits.T, part)

    forms = by_backend(ours)
    if rival:
        forms["dense products"] = Form(dense)
    name = f"linear K {k:,}, {'dhidden and dhead' if dhead else 'forward with dhidden'}{', hot ids' if hot else ''}"
    size = inputs.sizes.n * k * 2 * inputs.sizes.h
    return Item(name, forms, "", size, head_bytes(inputs)[1] if dhead else 0, of_head(inputs, k))


def slabs(inputs: Inputs, k: int) -> list[Item]:
    """`logits[:, :-1]` of a batch, as a trainer cuts off what has no next token, beside as many contiguous rows."""
    shape = (inputs.sizes.batch, -1, inputs.sizes.v)
    views: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "contiguous": lambda: (inputs.student.view(shape), inputs.teacher.view(shape)),
        "slabs": lambda: (inputs.student_batch[:, :-1], inputs.teacher_batch[:, :-1]),
    }
    entries: dict[str, Callable[[Tensor, Tensor], object]] = {
        "teacher_topk": lambda _, teacher: teacher_topk(teacher, k),
        "topk_reverse_kl": lambda student, teacher: topk_reverse_kl(student, teacher, k=k),
    }

    def form(entry: str, view: str) -> Form:
        def call(_: int) -> None:
            with use_backend("triton"):
                entries[entry](*views[view]())

        return Form(call, "triton")

    size, sizes = inputs.sizes.n * inputs.sizes.row, of_logits(inputs, k)
    return [
        Item(f"slabs, {entry} K {k:,}", {view: form(entry, view) for view in views}, read=size, sizes=sizes)
        for entry in entries
    ]


def host(inputs: Inputs, k: int) -> list[Item]:
    """What the host takes for a call of each entry, on few positions, for which the GPU takes less."""
    rows = min(8, inputs.sizes.n)

    def forms(call: Callable[[], object]) -> dict[str, Form]:
        def by_name(name: str) -> None:
            with use_backend(name):
                call()

        return by_backend(by_name)

    def both_passes() -> None:
        topk_reverse_kl(inputs.student[:rows].detach().requires_grad_(), inputs.teacher[:rows], k=k).backward()

    def from_hidden() -> None:
        support = Support(inputs.ids(k)[:rows], inputs.values(k)[:rows])
        linear_topk_reverse_kl(inputs.hidden[:rows].detach().requires_grad_(), inputs.head, support).backward()

    calls = {
        "teacher_topk": lambda: teacher_topk(inputs.teacher[:rows], k),
        "topk_reverse_kl, no gradient": lambda: topk_reverse_kl(inputs.student[:rows], inputs.teacher[:rows], k=k),
        "topk_reverse_kl and backward": both_passes,
        "linear_topk_reverse_kl and backward": from_hidden,
    }
    sizes = of_logits(inputs, k, n=rows)
    return [
        Item(f"host, {name}", forms(call), sizes=sizes, host_calls=inputs.sizes.host_calls)
        for name, call in calls.items()
    ]


def profiled(inputs: Inputs) -> list[tuple[str, Item]]:
    """Seven launches for a profiler: a backend, and the item that has a form of its name."""
    narrow, usual, wide, _ = inputs.sizes.ks
    return [
        ("triton", select(inputs, usual)),
        ("triton", select_loss(inputs, usual)),
        ("triton", select_loss(inputs, wide)),
        ("triton", scatter(inputs, usual, unique=True)),
        ("triton", head(inputs, narrow)),
        ("cuda", select(inputs, usual)),
        ("cuda", head(inputs, narrow)),
    ]

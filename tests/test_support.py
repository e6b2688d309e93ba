"""A Support behaves like a batch of positions: indexed, padded, joined, moved, collated, saved and traced."""

import copy
import pickle
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from accelerate.utils import send_to_device
from torch.distributed.utils import _apply_to_tensors
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from topk_rkl import Support, linear_teacher_topk, teacher_topk, topk_reverse_kl
from topk_rkl.recipe import builders, composition

B, T, K, V = 3, 5, 4, 20
INF = torch.inf


def made(*shape: int, k: int = K, normalized: bool = True) -> Support:
    return teacher_topk(torch.randn(*shape, V), k, normalize=normalized)


def same(a: Support, b: Support) -> bool:
    alike = all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a.tensors, b.tensors, strict=True))
    return alike and a.normalized == b.normalized


INDICES = {
    "a column": (slice(None), slice(None, -1)),
    "a row": 1,
    "rows": slice(1, None),
    "a list": [2, 0],
    "an ellipsis": (..., 0),
    "a new dimension": None,
    "a position": (1, 2),
    "a mask of rows": torch.tensor([True, False, True]),
    "a mask of positions": torch.arange(B * T).view(B, T) % 2 == 0,
    "two tensors": (torch.tensor([0, 2]), torch.tensor([4, 1])),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_an_index_is_one_of_positions(index) -> None:
    support = made(B, T)
    positions = torch.arange(B * T).view(B, T)[index]  # which of them the index names
    got, flat = support[index], support.reshape(-1)
    assert got.shape == positions.shape and got.k == K
    assert torch.equal(got.ids, flat.ids[positions]) and torch.equal(got.log_probs, flat.log_probs[positions])


def test_an_index_never_reaches_the_slots() -> None:
    support = made(B, T)
    with pytest.raises(IndexError):
        support[0, 0, 0]
    with pytest.raises(IndexError):
        support[torch.ones(B, T, K, dtype=torch.bool)]


def test_its_size_is_that_of_the_positions() -> None:
    support = made(B, T)
    assert (support.shape, support.k, len(support), support.device) == ((B, T), K, B, torch.device("cpu"))
    with pytest.raises(TypeError, match=r"one position has no len\(\); its 4 slots are support.k"):
        len(support[0, 0])


@pytest.mark.parametrize("rows", [2, 5])
def test_it_is_not_unpacked(rows: int) -> None:
    """Two rows would unpack into two supports, without an error. Lightning looks into what is an Iterable."""
    support = made(rows)
    with pytest.raises(TypeError, match=r"Support.* not iterable"):
        _, _ = support
    assert not isinstance(support, Iterable)
    ids, log_probs = support.tensors
    assert ids is support.ids and log_probs is support.log_probs


def test_it_moves_as_a_tensor_does() -> None:
    support = made(B, T)
    low = support.to(torch.float16)
    assert low.ids is support.ids and torch.equal(low.log_probs, support.log_probs.half())
    for moved in (support.to("meta"), support.to(device="meta", non_blocking=True), support.to("meta", torch.float64)):
        assert moved.ids.is_meta and moved.log_probs.is_meta and moved.ids.dtype == torch.int32
    assert moved.log_probs.dtype == torch.float64 and same(support.to("cpu"), support)
    copied = support.to("cpu", copy=True)
    assert same(copied, support) and not {x.data_ptr() for x in copied.tensors} & {
        x.data_ptr() for x in support.tensors
    }


def test_a_dtype_of_ids_is_refused_and_the_remedy_gives_it() -> None:
    support = made(B, T, normalized=False)
    with pytest.raises(TypeError, match=r"dtype is torch.int64, .*Support\(support.ids.long\(\), support.log_probs, "):
        support.to(torch.int64)
    wide = Support(support.ids.long(), support.log_probs, support.normalized)
    assert wide.ids.dtype == torch.int64 and same(Support(wide.ids.int(), wide.log_probs, wide.normalized), support)


def test_other_positions_come_as_numbers_or_as_a_shape() -> None:
    support = made(B, T)
    for flat in (support.reshape(-1), support.reshape((B * T,)), support.reshape([-1])):
        assert flat.shape == (B * T,) and same(flat.reshape(support.shape), support)
    assert support[:0].reshape(-1).shape == (0,) and support[0, 0].reshape(()).shape == ()


@pytest.mark.parametrize("normalized", [True, False])
def test_what_moves_batches_moves_it(normalized: bool) -> None:
    """accelerate, with which the Trainer of transformers loads; FSDP; anything that maps pytrees."""
    support = made(B, T, normalized=normalized)
    batch = {"teacher": support, "more": [torch.zeros(2)]}
    for moved in (
        send_to_device(batch, torch.device("meta"), non_blocking=True),
        _apply_to_tensors(lambda x: x.to("meta"), batch),
        pytree.tree_map(lambda x: x.to("meta"), batch),
    ):
        assert isinstance(moved["teacher"], Support) and moved["teacher"].normalized is normalized
        assert moved["teacher"].ids.is_meta and moved["teacher"].log_probs.is_meta and moved["more"][0].is_meta


def test_its_fields_can_be_set() -> None:
    """In a copy, as Lightning does at precision "bf16-true", which refuses a batch that holds a frozen dataclass."""
    support = made(B, T, normalized=False)
    low = copy.deepcopy(support)
    for name, x in zip(("ids", "log_probs"), support.to(torch.bfloat16).tensors):
        setattr(low, name, x)
    assert same(low, support.to(torch.bfloat16)) and support.log_probs.dtype == torch.float32


def test_padding_adds_empty_positions() -> None:
    support = made(B, T, normalized=False)
    for side, kept, added in (("right", slice(0, T), slice(T, 8)), ("left", slice(3, 8), slice(0, 3))):
        got = support.pad(8, side=side)
        assert got.shape == (B, 8) and same(got[:, kept], support)
        assert (got.ids[:, added] == -1).all() and (got.log_probs[:, added] == -INF).all()
    assert same(support.pad(T), support)
    student = torch.randn(B, 8, V)
    padded = topk_reverse_kl(student, support.pad(8), reduction="sum")
    torch.testing.assert_close(padded, topk_reverse_kl(student[:, :T], support, reduction="sum"))


def test_padding_refuses_to_cut_and_names_the_cut() -> None:
    support = made(B, T)
    with pytest.raises(
        ValueError, match=r"length is 3, but the support has positions \(3, 5\); cut it: \[..., :length\]"
    ):
        support.pad(3)
    assert same(support[..., :3], support[:, :3])
    with pytest.raises(ValueError, match="side is 'top'; use one of right, left"):
        support.pad(8, side="top")
    with pytest.raises(TypeError, match=r"length is 5\.5; it must be an int"):
        support.pad(5.5)
    with pytest.raises(ValueError, match=r"positions \(\)"):
        support[0, 0].pad(3)


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_joined_positions_are_those_of_torch(dim: int) -> None:
    a, b = made(B, T), made(B, T)
    of_tensors = dim if dim >= 0 else dim - 1
    for ours, theirs in ((Support.cat, torch.cat), (Support.stack, torch.stack)):
        got = ours([a, b], dim)
        assert torch.equal(got.ids, theirs([a.ids, b.ids], of_tensors))
        assert torch.equal(got.log_probs, theirs([a.log_probs, b.log_probs], of_tensors))


def test_fewer_slots_are_filled_with_empty_ones() -> None:
    wide, narrow = made(2), made(3, k=2, normalized=False)
    got = Support.cat([wide, narrow])
    assert got.k == K and not got.normalized and same(got[:2], Support(*wide.tensors, normalized=False))
    assert torch.equal(got.ids[2:, :2], narrow.ids) and (got.ids[2:, 2:] == -1).all()
    assert torch.equal(got.log_probs[2:, :2], narrow.log_probs) and (got.log_probs[2:, 2:] == -INF).all()
    assert Support.cat([wide, wide]).normalized


JOINS = {
    "one alone": (lambda: Support.cat(made(2)), TypeError, r"supports is a .*Support; it must be a list of supports"),
    "none": (lambda: Support.stack([]), ValueError, "supports is empty"),
    "a tuple": (lambda: Support.cat([made(2).tensors]), TypeError, r"supports\[0\] is a tuple; it must be a Support"),
    "the slots": (lambda: Support.cat([made(2)], 1), ValueError, "dim is 1; it must be .*, from -1 to 0"),
    "beyond": (lambda: Support.stack([made(2)], -3), ValueError, "dim is -3; it must be .*, from -2 to 1"),
    "no int": (lambda: Support.stack([made(2)], 0.0), TypeError, "dim is 0.0; it must be an int"),
    "one position": (lambda: Support.cat([made()]), ValueError, "of one position, .*; use Support.stack"),
    "lengths": (lambda: Support.stack([made(2), made(3)]), ValueError, r"positions \(2,\) and \(3,\); .*pad\(3\)$"),
    "lengths of rows": (
        lambda: Support.cat([made(1, 2), made(1, 3)]), ValueError, r"alike but for dimension 0, by .*pad\(3\)$",
    ),
    "rows": (lambda: Support.stack([made(2, 3), made(3, 3)]), ValueError, r"\(2, 3\) and \(3, 3\); make them alike$"),
    "dimensions": (lambda: Support.cat([made(2, 3), made(2)], 1), ValueError, "make them alike but for dimension 1$"),
    "a position and a row": (lambda: Support.stack([made(), made(3)]), ValueError, "make them alike$"),
    "devices": (
        lambda: Support.cat([made(2), made(2).to("meta")]), ValueError,
        r"supports\[1\] is on meta and supports\[0\] on cpu; move one: supports\[1\].to\('cpu'\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINS)
def test_joins_that_are_refused(name: str) -> None:
    call, kind, message = JOINS[name]
    with pytest.raises(kind, match=message):
        call()


def test_what_refused_joins_advise() -> None:
    assert Support.stack([x.pad(3) for x in (made(2), made(3))]).shape == (2, 3)
    assert Support.cat([x.pad(3) for x in (made(1, 2), made(1, 3))]).shape == (2, 3)
    assert Support.stack([made(), made()]).shape == (2,)
    assert Support.cat([made(2, 3), made(2, 1)], -1).shape == (2, 4) and Support.cat([made(2)[:0], made(2)]).shape == (
        2,
    )


def test_slots_are_emptied() -> None:
    support, slots = made(B, T, normalized=False), torch.rand(B, T, K) < 0.5
    got = support.without(slots)
    assert torch.equal(got.ids, torch.where(slots, -1, support.ids)) and not got.normalized
    assert torch.equal(got.log_probs, torch.where(slots, -INF, support.log_probs))
    positions = slots[..., 0]
    assert same(support.without(positions[..., None]), support.without(positions[..., None].expand(slots.shape)))


@pytest.mark.parametrize("shape", [(T, K), (1, B, T, K), (K,), (B, T, K + 1), ()])
def test_slots_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    """A mask of positions would spread over the slots where T = K."""
    with pytest.raises(ValueError, match=r"it must be \(3, 5, 4\), or \(3, 5, 1\) for whole .*mask\[..., None\]"):
        made(B, T).without(torch.ones(shape, dtype=torch.bool))


def test_slots_that_are_no_mask_are_refused() -> None:
    with pytest.raises(TypeError, match=r"slots is torch\.int64; use one of bool"):
        made(B, T).without(torch.ones(B, T, K).long())
    with pytest.raises(ValueError, match="slots is on meta and the support on cpu"):
        made(B, T).without(torch.ones(B, T, K, dtype=torch.bool, device="meta"))


def test_an_empty_slot_does_not_empty_a_later_one_of_its_id() -> None:
    support = Support(torch.tensor([[5, 5, 7, 5]]), torch.tensor([[-INF, -1.0, -2.0, -3.0]]))
    got = support.unique()
    assert got.log_probs.tolist() == [[-INF, -1.0, -2.0, -INF]] and got.ids[0, 1:].tolist() == [5, 7, -1]
    student = torch.randn(1, V)
    torch.testing.assert_close(
        topk_reverse_kl(student, got), topk_reverse_kl(student, Support(*(x[:, 1:3] for x in support.tensors)))
    )


@pytest.mark.parametrize("normalized", [None, torch.tensor(True), 1])
def test_the_field_is_a_bool(normalized: object) -> None:
    with pytest.raises(TypeError, match=r"teacher.normalized is .*; it must be True or False"):
        topk_reverse_kl(torch.randn(B, T, V), replace(made(B, T), normalized=normalized))


def test_a_support_elsewhere_is_moved_whole() -> None:
    student, support = torch.randn(B, T, V), made(B, T)
    with pytest.raises(
        ValueError, match=r"teacher is on meta and student_logits on cpu; move one: teacher.to\('cpu'\)"
    ):
        topk_reverse_kl(student, support.to("meta"))
    torch.testing.assert_close(topk_reverse_kl(student, support.to("cpu")), topk_reverse_kl(student, support))


def test_columns_of_a_batch() -> None:
    log_probs, logits = made(B, T), made(B, T, normalized=False)
    assert list(log_probs.as_dict()) == ["teacher_ids", "teacher_log_probs"]
    assert list(logits.as_dict("math_")) == ["math_ids", "math_logits"]
    batch = log_probs.as_dict() | logits.as_dict("math_") | {"labels": torch.zeros(B, T)}
    assert same(Support.from_dict(batch), log_probs) and same(Support.from_dict(batch, "math_"), logits)
    for broken in ({}, {"teacher_ids": 0}, {"teacher_log_probs": 0}, log_probs.as_dict() | logits.as_dict()):
        with pytest.raises(
            ValueError, match="it must have teacher_ids, and either teacher_log_probs or teacher_logits"
        ):
            Support.from_dict(broken)


@pytest.mark.slow
def test_a_data_loader_stacks_supports() -> None:
    rows = [{"teacher": made(T), "row": i} for i in range(4)]
    batches = list(DataLoader(rows, batch_size=2, num_workers=1))
    for i, batch in enumerate(batches):
        assert same(batch["teacher"], Support.stack([row["teacher"] for row in rows[2 * i : 2 * i + 2]]))
        assert batch["row"].tolist() == [2 * i, 2 * i + 1]


def test_it_is_pickled_and_a_pytree_by_name() -> None:
    support = made(B, T, normalized=False)
    assert same(pickle.loads(pickle.dumps(support)), support)
    leaves, spec = pytree.tree_flatten_with_path({"teacher": support})
    assert [pytree.keystr(path) for path, _ in leaves] == ["['teacher'].ids", "['teacher'].log_probs"]
    assert same(pytree.tree_unflatten([x for _, x in leaves], spec)["teacher"], support)


@pytest.mark.slow
def test_it_crosses_compiled_code() -> None:
    """As an argument, made within, and as what is returned."""
    student, teacher = torch.randn(2, B, T, V)

    def step(student, support):
        more = teacher_topk(teacher, 2)
        return topk_reverse_kl(student[:, 1:], support[:, 1:]), Support.cat([more, support], 1).pad(12).unique()

    given = teacher_topk(teacher, K)
    loss, joined = torch.compile(step, fullgraph=True, backend="aot_eager")(student, given)
    want, wanted = step(student, given)
    torch.testing.assert_close(loss, want)
    assert isinstance(joined, Support) and same(joined, wanted) and not joined.normalized


@pytest.mark.slow
def test_it_crosses_torch_export() -> None:
    class Head(torch.nn.Module):
        def forward(self, student, support):
            return topk_reverse_kl(student, support), support[1:]

    student, support = torch.randn(B, T, V), made(B, T)
    loss, rest = torch.export.export(Head(), (student, support)).module()(student, support)
    torch.testing.assert_close(loss, topk_reverse_kl(student, support))
    assert same(rest, support[1:])


Z, W = torch.randn(2, 6, V)
LOGITS, LOG_PROBS = teacher_topk(W, K), teacher_topk(W, K, normalize=True)
HOLDS_LOGITS = {
    "teacher_topk": lambda: LOGITS,
    "linear_teacher_topk": lambda: linear_teacher_topk(W, torch.eye(V), K),
    "student_topk": lambda: builders.student_topk(Z, W, K),
    "teacher_top_p": lambda: builders.teacher_top_p(W, 0.5, K),
    "fixed_ids": lambda: builders.fixed_ids(W, [1, 2]),
    "linear_fixed_ids": lambda: builders.linear_fixed_ids(W, torch.eye(V), [1, 2]),
    "with_sampled": lambda: builders.with_sampled(LOGITS, torch.zeros(6).long(), W),
    "union": lambda: builders.union(LOGITS, LOGITS),
    "intersection": lambda: builders.intersection(LOGITS, LOG_PROBS),
    "difference": lambda: builders.difference(LOGITS, LOG_PROBS),
    "remap": lambda: builders.remap(LOGITS, {1: 2}),
    "residual of supports": lambda: composition.residual(LOG_PROBS, LOG_PROBS),
    "extrapolation of supports": lambda: composition.extrapolation(LOG_PROBS, W),
    "taid of a support": lambda: composition.taid(Z, LOG_PROBS, t=0.5),
    "veto of a support": lambda: composition.veto(Z, LOG_PROBS, beta=1.0),
}
HOLDS_LOG_PROBS = {
    "teacher_topk": lambda: LOG_PROBS,
    "linear_teacher_topk": lambda: linear_teacher_topk(W, torch.eye(V), K, normalize=True),
    "student_topk": lambda: builders.student_topk(Z, W, K, normalize=True),
    "teacher_top_p": lambda: builders.teacher_top_p(W, 0.5, K, normalize=True),
    "fixed_ids": lambda: builders.fixed_ids(W, [1, 2], normalize=True),
    "linear_fixed_ids": lambda: builders.linear_fixed_ids(W, torch.eye(V), [1, 2], normalize=True),
    "with_sampled": lambda: builders.with_sampled(LOG_PROBS, torch.zeros(6).long(), W),
    "union": lambda: builders.union(LOG_PROBS, LOG_PROBS),
    "remap": lambda: builders.remap(LOG_PROBS, {1: 2}),
    "mixture": lambda: composition.mixture([W, Z], [1, 1], k=K),
    "mixture of supports": lambda: composition.mixture([LOG_PROBS, W], [1, 1]),
    "residual": lambda: composition.residual(W, Z, k=K),
    "extrapolation": lambda: composition.extrapolation(W, Z, k=K),
    "taid": lambda: composition.taid(Z, W, t=0.5, k=K),
    "veto": lambda: composition.veto(Z, W, beta=1.0, k=K),
}


@pytest.mark.parametrize("name", HOLDS_LOGITS)
def test_what_holds_logits_says_so(name: str) -> None:
    assert HOLDS_LOGITS[name]().normalized is False


@pytest.mark.parametrize("name", HOLDS_LOG_PROBS)
def test_what_holds_log_probs_says_so_and_is_right(name: str) -> None:
    """All K of V log-probs would add up to 1: those here to less."""
    support = HOLDS_LOG_PROBS[name]()
    assert support.normalized is True
    assert (support.log_probs.double().logsumexp(-1) <= 1e-6).all()

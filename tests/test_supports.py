"""Builders of supports: every slot against Python sets, float64 log-probs and loops."""

import math
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from conftest import DEVICE, LiveBytes
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from tests.direct import reference
from tests.processes import HANGS
from topk_rkl import (
    Support,
    linear_teacher_topk,
    rows,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
    use_backend,
)
from topk_rkl.recipe import builders
from topk_rkl.recipe.builders import (
    difference,
    fixed_ids,
    intersection,
    linear_fixed_ids,
    remap,
    student_topk,
    teacher_top_p,
    union,
    with_sampled,
)

INF = math.inf
SEARCH = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def table(support: Support) -> list[dict[int, float]]:
    """{id: value} of each position; fails where an id occurs twice."""
    rows = []
    for ids, values in zip(support.ids.flatten(0, -2).tolist(), support.log_probs.flatten(0, -2).tolist(), strict=True):
        live = [(v, x) for v, x in zip(ids, values, strict=True) if v >= 0 and x != -INF]
        rows.append(dict(live))
        assert len(rows[-1]) == len(live)
    return rows


def some(ids: list[list[int]], scale: float = -0.1) -> Support:
    """A support of these ids whose values tell the slots apart; -1 makes an empty slot."""
    ids = torch.tensor(ids, device=DEVICE)
    values = scale * torch.arange(1.0, ids.numel() + 1, device=DEVICE).view(ids.shape)
    return Support(ids, values.masked_fill(ids < 0, -INF))


@pytest.mark.slow
def test_a_saved_support_loads_with_weights_only(tmp_path) -> None:
    """In a process that has imported the package, alone and among other things."""
    support = some([[3, -1], [0, 7]])
    torch.save({"teacher": support, "step": 3}, tmp_path / "teacher.pt")
    code = (
        "import sys, torch, topk_rkl\n"
        "teacher = torch.load(sys.argv[1], weights_only=True)['teacher']\n"
        "assert type(teacher) is topk_rkl.Support, teacher\n"
        "print(teacher.ids.tolist(), teacher.log_probs.tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "teacher.pt")]
    loaded = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert loaded.stdout.strip() == f"{support.ids.tolist()} {support.log_probs.tolist()}", loaded.stderr


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_student_topk_holds_the_teachers_values_at_the_students_best(backend, normalize: bool, dtype) -> None:
    student, teacher = torch.randn(2, 2, 3, 70, device=DEVICE).to(dtype)
    got = student_topk(student.requires_grad_(), teacher, 5, normalize=normalize)
    ids = student.detach().sort(dim=-1, descending=True, stable=True).indices[..., :5]
    want = (teacher.double().log_softmax(-1) if normalize else teacher.double()).gather(-1, ids)
    assert got.ids.dtype == torch.int32 and not got.log_probs.requires_grad
    assert torch.equal(got.ids.long(), ids) and got.log_probs.dtype == torch.float32
    torch.testing.assert_close(got.log_probs.double(), want, rtol=5e-7, atol=5e-7)


def test_the_students_best_from_hidden_states(backend) -> None:
    hidden, head, teacher = torch.randn(3, 8), torch.randn(40, 8), torch.randn(3, 40)
    hidden, head, teacher = (x.to(DEVICE) for x in (hidden, head, teacher))
    got = fixed_ids(teacher, linear_teacher_topk(hidden, head, 5).ids)
    want = student_topk(hidden @ head.T, teacher, 5)
    assert torch.equal(got.ids, want.ids) and torch.equal(got.log_probs, want.log_probs)


def test_float64_stays_float64() -> None:
    student, teacher = torch.randn(2, 3, 40, dtype=torch.float64, device=DEVICE)
    ids = student.argsort(dim=-1, descending=True)[:, :4]
    want = teacher.log_softmax(-1).gather(-1, ids)
    for got in (student_topk(student, teacher, 4, normalize=True), fixed_ids(teacher, ids, normalize=True)):
        torch.testing.assert_close(got.log_probs, want, rtol=1e-13, atol=1e-13)
    assert teacher_top_p(teacher, 0.5, 4).log_probs.dtype == torch.float64


def test_student_topk_is_the_teachers_when_both_are_one(backend) -> None:
    logits = torch.randn(4, 90, device=DEVICE)
    for normalize in (False, True):
        same, want = student_topk(logits, logits, 7, normalize=normalize), teacher_topk(logits, 7, normalize=normalize)
        assert torch.equal(same.ids, want.ids)
        torch.testing.assert_close(same.log_probs, want.log_probs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_slot_that_one_side_lacks_is_empty(backend, normalize: bool) -> None:
    student = torch.tensor([[5.0, 4, 3, 2, -INF, -INF]], device=DEVICE)
    teacher = torch.tensor([[0.0, -INF, 1]], device=DEVICE)  # no ids 3 to 5, and 1 forbidden
    got = student_topk(student, teacher, 5, normalize=normalize)
    lse = math.log(1 + math.e) if normalize else 0.0
    assert got.ids.tolist() == [[0, 1, 2, 3, -1]]
    torch.testing.assert_close(got.log_probs.cpu(), torch.tensor([[-lse, -INF, 1 - lse, -INF, -INF]]))
    assert student_topk(student, torch.full_like(teacher, -INF), 3, normalize=normalize).log_probs.tolist() == [
        [-INF] * 3
    ]


def test_log_probs_of_a_teacher_that_is_not_finite_are_nan(backend) -> None:
    teacher = torch.tensor([[0.0, 1, math.nan, 2], [0.0, 1, INF, 2], [0.0, 1, 3, 2]], device=DEVICE)
    got = fixed_ids(teacher, [0, 3], normalize=True).log_probs
    assert got.isnan().tolist() == [[True, True], [True, True], [False, False]]


def nucleus(row: Tensor, p: float, k: int) -> list[int]:
    """The definition, a token at a time."""
    probs, chosen, mass = row.double().softmax(-1).tolist(), [], 0.0
    for token in sorted(range(len(row)), key=lambda v: (-row[v].item(), v))[:k]:
        if mass >= p < 1:
            break
        chosen.append(token)
        mass += probs[token]
    return chosen


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_teacher_top_p_agrees_with_the_definition(backend, p: float, ties: bool, normalize: bool) -> None:
    teacher = torch.randn(4, 60, device=DEVICE) * torch.tensor([[0.5], [1], [2], [20]], device=DEVICE)
    teacher = teacher.round() if ties else teacher
    got = teacher_top_p(teacher, p, 12, normalize=normalize)
    values = (teacher.double().log_softmax(-1) if normalize else teacher.double()).cpu()
    for row, found, ids in zip(range(4), table(got), got.ids.tolist(), strict=True):
        want = nucleus(teacher[row].cpu(), p, 12)
        assert ids == want + [-1] * (12 - len(want))
        assert found == pytest.approx({v: values[row, v].item() for v in want}, rel=1e-6, abs=5e-6)
    kept = (got.ids >= 0).sum(-1).tolist()
    assert {1e-9: kept == [1] * 4, 1.0: kept == [12] * 4}.get(p, len(set(kept)) > 1)


def test_top_p_takes_the_lowest_ids_of_a_tie_and_is_capped(backend) -> None:
    teacher = torch.tensor([[1.0, 2, 2, 2], [9, 0, 0, 0]], device=DEVICE)
    assert teacher_top_p(teacher, 0.5, 4).ids.tolist() == [[1, 2, -1, -1], [0, -1, -1, -1]]
    assert teacher_top_p(teacher, 0.8, 2).ids.tolist() == [[1, 2], [0, -1]]
    of_two = teacher_topk(teacher[:1], 2, normalize=True).log_probs.double().exp().sum().item()
    assert teacher_top_p(teacher[:1], of_two, 4).ids.tolist() == [[1, 2, -1, -1]]  # exactly p is enough


@pytest.mark.parametrize("p", [1e-46, 5e-324, 0.5, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_p_of_what_is_no_distribution(p: float, normalize: bool, dtype: torch.dtype) -> None:
    teacher = torch.tensor(
        [[0, math.nan, 1], [2, INF, 0], [-INF, -INF, -INF], [3, -INF, 2]], dtype=dtype, device=DEVICE
    )
    got = teacher_top_p(teacher, p, 3, normalize=normalize)
    assert (got.ids >= 0).sum(-1).tolist() == [3, 3, 0, 2 if p == 1 else 1] and got.ids[3, 0] == 0
    losses = topk_reverse_kl(torch.randn_like(teacher), got, reduction="none")
    assert losses.isnan().tolist() == [True, True, False, False]


def test_a_loss_on_the_nucleus_is_the_loss_on_those_tokens_alone(backend) -> None:
    student, teacher = torch.randn(2, 1, 50, device=DEVICE)
    support = teacher_top_p(teacher, 0.6, 20)
    count = int((support.ids >= 0).sum())
    assert 2 < count < 20
    torch.testing.assert_close(topk_reverse_kl(student, support), topk_reverse_kl(student, teacher, k=count))


def tensor(ids: list[int]) -> Tensor:
    return torch.tensor(ids, device=DEVICE)


@pytest.mark.parametrize("form", [list, tuple, tensor])
@pytest.mark.parametrize("normalize", [False, True])
def test_fixed_ids_are_the_same_at_every_position(backend, form, normalize: bool) -> None:
    teacher = torch.randn(2, 3, 40, device=DEVICE)
    got = fixed_ids(teacher, form([7, 0, 39]), normalize=normalize)
    want = (teacher.double().log_softmax(-1) if normalize else teacher.double())[..., [7, 0, 39]]
    assert torch.equal(got.ids.cpu(), torch.tensor([7, 0, 39]).expand(2, 3, 3))
    torch.testing.assert_close(got.log_probs.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fixed_ids_from_hidden_states(backend, monkeypatch, normalize: bool, dtype: torch.dtype) -> None:
    """Those of the dense logits, ids outside empty, with a few rows of the head gathered at a time."""
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("the reference alone takes float64")
    monkeypatch.setattr(rows, "CHUNK_BYTES", 1_000)
    hidden, head, bias = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((2, 5, 8), (40, 8), (40,)))
    ids = torch.randint(-3, 45, (2, 5, 7), device=DEVICE)
    options = {"normalize": normalize, "bias": bias, "logit_scale": 1.5, "softcap": 3.0, "chunk_rows": 3}
    if backend == "cuda":
        with pytest.raises(RuntimeError, match="it has no kernel for linear_logits; use 'triton' or 'auto'"):
            linear_fixed_ids(hidden, head, ids, **options)
        return
    got = linear_fixed_ids(hidden, head, ids, **options)
    z = torch.nn.functional.linear(*(x.double() for x in (hidden, head, bias))) * 1.5
    with use_backend("reference"):
        want = fixed_ids(3 * (z / 3).tanh(), ids, normalize=normalize)
    assert torch.equal(got.ids, want.ids) and (got.log_probs[ids >= 40] == -INF).all()
    torch.testing.assert_close(got.log_probs.double(), want.log_probs, rtol=2e-6, atol=2e-6)
    hidden[0, 1] = torch.nan
    spoiled = linear_fixed_ids(hidden, head, [0, 39], **options)
    assert spoiled.log_probs[0, 1].isnan().all() and spoiled.log_probs.isnan().sum() == 2


def test_fixed_ids_from_hidden_states_hold_little() -> None:
    """N V is 4.8 MB, N K H 20 MB and V H 1.5 MB, of float32."""
    hidden, head = torch.randn(400, 128, device=DEVICE), torch.randn(3_000, 128, device=DEVICE)
    ids = torch.randint(3_000, (400, 100), device=DEVICE)
    with LiveBytes() as memory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "CHUNK_BYTES", 400_000)
        reference.linear_logits(hidden, head, None, ids)  # the op would hide what it allocates
    assert 0 < memory.peak < 3_000_000


def test_fixed_ids_of_each_position_drop_what_is_repeated_or_unknown(backend) -> None:
    teacher = torch.randn(2, 10, device=DEVICE)
    ids = torch.tensor([[3, 3, 9], [-100, 10, 4]], dtype=torch.int32, device=DEVICE)
    got = table(fixed_ids(teacher, ids))
    assert got == [{3: teacher[0, 3].item(), 9: teacher[0, 9].item()}, {4: teacher[1, 4].item()}]


def test_the_sampled_token_gets_a_slot_only_where_it_is_missing(backend) -> None:
    teacher = torch.randn(3, 30, device=DEVICE)
    support = teacher_topk(teacher, 4)
    absent = teacher.argmin(-1)[0]
    sampled = torch.stack([absent, support.ids[1, 2].long(), torch.tensor(-100, device=DEVICE)])
    got = with_sampled(support, sampled, teacher)
    assert got.ids.tolist() == [[*support.ids[i].tolist(), last] for i, last in enumerate([absent.item(), -1, -1])]
    assert torch.equal(got.log_probs[:, :4], support.log_probs)
    assert got.log_probs[:, 4].tolist() == [teacher[0, absent].item(), -INF, -INF]
    values = teacher.gather(-1, sampled.clamp(min=0)[:, None])[:, 0]
    by_value = with_sampled(support, sampled, values)
    assert torch.equal(by_value.ids, got.ids) and torch.equal(by_value.log_probs, got.log_probs)
    log_probs = with_sampled(teacher_topk(teacher, 4, normalize=True), sampled, teacher).log_probs
    torch.testing.assert_close(log_probs[0, 4], teacher.log_softmax(-1)[0, absent])


IDS = st.lists(st.integers(-1, 9), min_size=1, max_size=6)


@given(first=IDS, second=IDS)
@SEARCH
def test_union_intersection_and_difference_are_those_of_sets(first: list[int], second: list[int]) -> None:
    a, b = some([first]), some([second], scale=-7.0)
    in_a = {v: a.log_probs[0, first.index(v)].item() for v in first if v >= 0}
    in_b = {v: b.log_probs[0, second.index(v)].item() for v in second if v >= 0}
    assert table(union(a, b)) == [in_b | in_a]
    assert table(intersection(a, b)) == [{v: x for v, x in in_a.items() if v in in_b}]
    assert table(difference(a, b)) == [{v: x for v, x in in_a.items() if v not in in_b}]
    either = union(difference(a, b), difference(b, a))
    assert set(table(either)[0]) == set(in_a) ^ set(in_b)


def test_combined_supports_keep_the_places_of_the_first() -> None:
    a, b = some([[4, 2, 9], [1, -1, 3]]), some([[2, 7], [-1, 3]], scale=-7.0)
    got = union(a, b)
    assert got.ids.tolist() == [[4, 2, 9, -1, 7], [1, -1, 3, -1, -1]]
    assert intersection(a, b).ids.tolist() == [[-1, 2, -1], [-1, -1, 3]]
    assert difference(a, b).ids.tolist() == [[4, -1, 9], [1, -1, -1]]
    torch.testing.assert_close(got.log_probs[0].cpu(), torch.tensor([-0.1, -0.2, -0.3, -INF, -14.0]))


def test_a_slot_emptied_by_its_value_hides_no_token() -> None:
    hidden = Support(torch.tensor([[3, 5]]), torch.tensor([[-INF, -1.0]]))
    shown = Support(torch.tensor([[3, 6]]), torch.tensor([[-2.0, -3.0]]))
    assert table(union(hidden, shown)) == [{5: -1.0, 3: -2.0, 6: -3.0}]
    assert table(intersection(hidden, shown)) == table(intersection(shown, hidden)) == [{}]
    assert table(difference(shown, hidden)) == [{3: -2.0, 6: -3.0}]


def test_supports_of_two_integer_types_combine(backend) -> None:
    teacher = torch.randn(2, 3, 30, device=DEVICE)
    narrow, wide = teacher_topk(teacher, 4), Support(*teacher.topk(6)[::-1], normalized=False)
    assert table(union(narrow, wide)) == [dict(list(row.items())) for row in table(wide)]
    assert torch.equal(intersection(narrow, wide).ids, narrow.ids)


@given(ids=IDS, old=st.integers(0, 9), new=st.integers(-1, 12), other=st.integers(0, 9), as_table=st.booleans())
@SEARCH
def test_remapped_probabilities_are_those_of_the_new_tokens(ids, old, new, other, as_table) -> None:
    support = some([ids]).unique()
    mapping = {other: old} | {old: new}
    given = torch.tensor([mapping.get(v, v) for v in range(10)], device=DEVICE) if as_table else mapping
    want: dict[int, float] = {}
    for token, value in table(support)[0].items():
        name = mapping.get(token, token)
        if 0 <= name < 11:
            want[name] = want.get(name, 0.0) + math.exp(value)
    got = table(remap(support, given, student_vocab=11))
    assert [{v: pytest.approx(math.exp(x), rel=1e-5) for v, x in row.items()} for row in got] == [want]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_remap_does_not_lose_a_nan_beyond_the_students_vocabulary(backend, bad: float) -> None:
    support = Support(tensor([[1, 11, 2], [1, 12, 2]]), tensor([[0.5, bad, 1.0], [0.5, 0.25, 1.0]]))
    mapped = remap(support, {1: 3}, student_vocab=10)
    assert mapped.ids[1].tolist() == [3, -1, 2]
    assert topk_reverse_kl(torch.randn(2, 10, device=DEVICE), mapped, reduction="none").isnan().tolist() == [
        True,
        False,
    ]


def test_remap_swaps_two_tokens_and_keeps_the_places() -> None:
    support = some([[4, 2, 9, -1]])
    got = remap(support, {4: 2, 2: 4})
    assert got.ids.tolist() == [[2, 4, 9, -1]] and torch.equal(got.log_probs, support.log_probs)
    merged = remap(support, {9: 4})
    assert merged.ids.tolist() == [[4, 2, -1, -1]]
    assert merged.log_probs[0].tolist() == pytest.approx([math.log(math.exp(-0.1) + math.exp(-0.3)), -0.2, -INF, -INF])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_of_low_precision_are_added_in_float32(dtype: torch.dtype) -> None:
    ids = torch.arange(64)[None]
    low = torch.full((1, 64), -4.15).to(dtype)
    got = remap(Support(ids, low), dict.fromkeys(range(64), 3))
    assert got.log_probs.dtype == torch.float32
    torch.testing.assert_close(got.log_probs[0, 0], low.double().logsumexp(-1)[0].float(), rtol=0, atol=1e-6)


BEYOND = [2**32 + 2, -(2**32) + 2, 2**31, 2**40, 2**63 - 1]


@pytest.mark.parametrize("beyond", BEYOND)
def test_an_id_beyond_int32_is_no_token(backend, beyond: int) -> None:
    student, teacher = torch.randn(2, 1, 9, device=DEVICE)
    support, wide = teacher_topk(teacher, 9), tensor([beyond])
    assert table(fixed_ids(teacher, wide)) == table(fixed_ids(teacher, wide[None])) == [{}]
    assert table(with_sampled(support, wide, teacher)) == table(support)
    stranger = Support(wide[None], torch.tensor([[9.0]], device=DEVICE), normalized=False)
    assert table(intersection(support, stranger)) == table(intersection(stranger, support)) == [{}]
    assert table(difference(support, stranger)) == table(support)
    assert (union(support, stranger).ids[0, -1] == max(beyond, -1)) and union(support, stranger).ids[0, 0] < 9
    for both in (union(support, stranger), with_sampled(support, wide, stranger.log_probs[:, 0])):
        torch.testing.assert_close(topk_reverse_kl(student, both), topk_reverse_kl(student, support))
    mapping = torch.arange(9, device=DEVICE).index_fill(0, tensor([2]), beyond)
    without = Support(support.ids.masked_fill(support.ids == 2, -1), support.log_probs)
    torch.testing.assert_close(topk_reverse_kl(student, remap(support, mapping)), topk_reverse_kl(student, without))
    assert table(remap(support, mapping, student_vocab=9)) == table(without)
    if beyond > 0:
        assert table(remap(support, {}, student_vocab=beyond)) == table(support)


def test_a_table_that_is_shorter_than_the_vocabulary_drops_the_rest() -> None:
    got = remap(some([[4, 2, 3]]), torch.tensor([5, 6, 7], device=DEVICE))
    assert got.ids.tolist() == [[-1, 7, -1]]
    assert remap(got, {}, student_vocab=8).ids.tolist() == [[-1, 7, -1]]
    assert remap(got, {}, student_vocab=7).ids.tolist() == [[-1, -1, -1]]


def test_many_tokens_become_one() -> None:
    support = some([[4, 2, 9, 0, 7, 8, 1]])
    got = remap(support, dict.fromkeys([2, 9, 0, 7, 8], 3))
    want = torch.cat([support.log_probs[0, :1], support.log_probs[0, 1:6].logsumexp(0)[None], support.log_probs[0, 6:]])
    assert got.ids.tolist() == [[4, 3, -1, -1, -1, -1, 1]]
    torch.testing.assert_close(got.log_probs[0, [0, 1, 6]], want)


def test_a_padded_teacher_trains_a_smaller_student(backend) -> None:
    student, teacher = torch.randn(2, 20, device=DEVICE), torch.randn(2, 24, device=DEVICE)
    support = teacher_topk(teacher, 24)
    got = topk_reverse_kl(student, remap(support, {}, student_vocab=20))
    torch.testing.assert_close(got, topk_reverse_kl(student, teacher[:, :20], k=20))


@pytest.mark.parametrize("build", ["student_topk", "fixed_ids", "teacher_top_p"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_copy_of_the_logits_is_made(build: str, dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 8, 33, 4_000, device=DEVICE).to(dtype)
    student, teacher = student[:, :-1], teacher[:, 1:]  # no 2-D view
    call = {
        "student_topk": lambda: student_topk(student, teacher, 16, normalize=True),
        "fixed_ids": lambda: fixed_ids(teacher, list(range(16)), normalize=True),
        "teacher_top_p": lambda: teacher_top_p(teacher, 0.9, 16),
    }[build]
    call()
    with LiveBytes() as memory:
        call()
    assert memory.peak < 1_000_000 < teacher.numel() * 2


@pytest.mark.slow
def test_builders_compile_without_a_graph_break() -> None:
    def built(student: Tensor, teacher: Tensor, sampled: Tensor) -> Support:
        both = union(student_topk(student, teacher, 4), teacher_top_p(teacher, 0.9, 4))
        return remap(with_sampled(intersection(both, teacher_topk(teacher, 9)), sampled, teacher), {3: 2})

    student, teacher = torch.randn(2, 5, 40)
    sampled = torch.randint(40, (5,))
    got = torch.compile(built, fullgraph=True, backend="aot_eager")(student, teacher, sampled)
    want = built(student, teacher, sampled)
    assert torch.equal(got.ids, want.ids) and torch.equal(got.log_probs, want.log_probs)


Z, W, Y = torch.zeros(2, 9), torch.zeros(2, 9), torch.zeros(2).long()
S = Support(torch.zeros(2, 3).long(), torch.zeros(2, 3))
REFUSALS = {
    "student_topk: k": (lambda: student_topk(Z, W, 10), ValueError, "k is 10.*V = 9, .*student_logits"),
    "student_topk: teacher trained": (
        lambda: student_topk(Z, W.clone().requires_grad_(), 3),
        ValueError,
        "teacher_logits requires grad",
    ),
    "student_topk: other rows": (lambda: student_topk(Z, W[:1], 3), ValueError, r"teacher_logits has shape \(1, 9\)"),
    "teacher_top_p: p": (lambda: teacher_top_p(W, 1.5, 3), ValueError, "p is 1.5; it must be above 0 and at most 1"),
    "teacher_top_p: k": (lambda: teacher_top_p(W, 0.5, 0), ValueError, "k is 0"),
    "fixed_ids: outside": (lambda: fixed_ids(W, [3, 9]), ValueError, r"ids is \[3, 9\].*from 0 to V - 1 = 8"),
    "fixed_ids: repeated": (lambda: fixed_ids(W, [3, 3]), ValueError, "different ids"),
    "fixed_ids: none": (lambda: fixed_ids(W, []), ValueError, "at least one"),
    "fixed_ids: floats": (lambda: fixed_ids(W, [1.0]), TypeError, r"ids is \[1.0\]; it must be a sequence of ints"),
    "fixed_ids: a word": (lambda: fixed_ids(W, "12"), TypeError, "ids is '12'"),
    "fixed_ids: float tensor": (lambda: fixed_ids(W, torch.ones(2)), TypeError, "ids is torch.float32"),
    "fixed_ids: other rows": (lambda: fixed_ids(W, torch.ones(3, 2).long()), ValueError, r"ids has shape \(3, 2\)"),
    "with_sampled: shape": (lambda: with_sampled(S, Y[:1], W), ValueError, r"sampled_ids has shape \(1,\)"),
    "with_sampled: rows": (lambda: with_sampled(S, Y, W[:1]), ValueError, r"teacher has shape \(1, 9\)"),
    "with_sampled: trained": (
        lambda: with_sampled(S, Y, W.clone().requires_grad_()),
        ValueError,
        "teacher requires grad",
    ),
    "union: not a support": (lambda: union(S, W), TypeError, r"second is a torch.Tensor; it must be a Support"),
    "union: a tuple": (lambda: union(S.tensors, S), TypeError, r"first is a tuple; it must be a Support"),
    "union: logits and log-probs": (
        lambda: union(S, Support(*S.tensors, normalized=False)),
        ValueError,
        "first holds log-probs and second logits.*normalize=True",
    ),
    "union: other rows": (
        lambda: union(S, Support(S.ids[:1], S.log_probs[:1])),
        ValueError,
        r"second.ids has shape \(1",
    ),
    "intersection: float ids": (lambda: intersection(Support(W, W), S), TypeError, "first.ids is torch.float32"),
    "difference: shapes": (lambda: difference(S, Support(S.ids, W)), ValueError, r"second.log_probs \(2, 9\)"),
    "remap: a list": (lambda: remap(S, [1, 2]), TypeError, "mapping is a list; it must be a dict"),
    "remap: words": (lambda: remap(S, {"a": 1}), TypeError, "it must be a dict from ids to ids"),
    "remap: 2-d table": (lambda: remap(S, Y[None]), ValueError, r"mapping has shape \(1, 2\); a table"),
    "remap: student_vocab": (lambda: remap(S, {}, student_vocab=0), ValueError, "student_vocab is 0"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders.ops, "select", lambda *_: pytest.fail("an op ran before the refusal"))
    call, kind, message = REFUSALS[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_single_token_warns_where_the_loss_renormalises_it(recwarn: pytest.WarningsRecorder) -> None:
    support = student_topk(Z, W, 1, normalize=True)
    topk_divergence(Z, support, mass="tail")
    assert not [warning for warning in recwarn.list if "K = 1" in str(warning.message)]
    with pytest.warns(UserWarning, match="K = 1"):
        topk_reverse_kl(Z, support)

"""Nucleus sampling against its definition, and the sampled-token loss against autograd of its surrogate."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import topk_rkl.rows
from topk_rkl.recipe import rollout
from topk_rkl.recipe.rollout import sample_top_p, sampled_token_loss, top_p_filter

INF = math.inf


def random(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def log(*probs: float) -> Tensor:
    return torch.tensor(probs, dtype=torch.float64).log()


def nucleus(logits: Tensor, top_p: float, temperature: float = 1.0) -> list[bool]:
    """The definition, token by token: kept while the tokens ranked above hold less than top_p."""
    probs = (logits.double() / temperature).softmax(-1).tolist()
    kept, above = [False] * len(probs), []
    for token in sorted(range(len(probs)), key=lambda v: (-logits[v].item(), v)):
        kept[token] = math.fsum(above) < top_p
        above.append(probs[token])
    return kept


def surrogate(student: Tensor, teacher: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Value of each position, and the scalar-a-position whose plain derivative is the gradient wanted."""
    log_p = (student / temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    log_q = (teacher / temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    return (log_p - log_q).detach(), (log_p - log_q).detach() * log_p


@pytest.mark.parametrize(
    ("probs", "top_p", "kept"),
    [
        ((0.5, 0.3, 0.2), 0.79, [True, True, False]),
        ((0.5, 0.3, 0.2), 0.81, [True, True, True]),
        ((0.2, 0.5, 0.3), 0.45, [False, True, False]),
        ((0.2, 0.5, 0.3), 0.51, [False, True, True]),
        ((0.2, 0.5, 0.3), 1e-9, [False, True, False]),
        ((0.25, 0.25, 0.25, 0.25), 0.5, [True, True, False, False]),
        ((0.25, 0.25, 0.25, 0.25), 0.501, [True, True, True, False]),
        ((0.1, 0.4, 0.1, 0.4), 0.45, [False, True, False, True]),
        ((0.1, 0.4, 0.1, 0.4), 0.85, [True, True, False, True]),
        ((0.6, 0.0, 0.4), 0.99, [True, False, True]),
        ((1.0,), 0.3, [True]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_p_filter_golden_cases(probs, top_p, kept, dtype):
    logits = log(*probs).to(dtype)
    expected = torch.where(torch.tensor(kept), logits, -INF)
    assert torch.equal(top_p_filter(logits, top_p), expected)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("ties", [False, True])
def test_top_p_filter_agrees_with_the_definition(top_p, temperature, ties):
    logits = random(3, 4, 97, seed=1)
    if ties:
        logits = logits.round()
    got = top_p_filter(logits, top_p, temperature)
    kept = torch.tensor([nucleus(row, top_p, temperature) for row in logits.flatten(0, 1)]).view(3, 4, 97)
    assert torch.equal(got, (logits / temperature).masked_fill(~kept, -INF))
    assert kept.any(-1).all()


def test_temperature_comes_before_the_nucleus():
    logits = log(0.6, 0.3, 0.1)  # squared and renormalised at temperature 0.5: 36/46, 9/46, 1/46
    assert top_p_filter(logits, 0.75).isfinite().tolist() == [True, True, False]
    assert top_p_filter(logits, 0.75, temperature=0.5).isfinite().tolist() == [True, False, False]
    assert top_p_filter(logits, 0.75, temperature=5.0).isfinite().tolist() == [True, True, True]


def test_top_p_one_keeps_every_token():
    logits = random(5, 50_000, scale=8.0)  # long tail: a rounded sum reaches 1 well before the last token
    assert torch.equal(top_p_filter(logits, 1.0, temperature=0.7), logits / 0.7)


def test_low_precision_logits_are_scaled_in_float32():
    logits = random(6, 300, dtype=torch.bfloat16)
    assert torch.equal(top_p_filter(logits, 0.8, 0.7), top_p_filter(logits.float(), 0.8, 0.7))
    assert top_p_filter(logits.double(), 0.8).dtype == torch.float64


def test_nan_is_not_hidden_by_the_filter():
    logits = torch.tensor([[0.0, math.nan, 1.0], [2.0, 0.0, -9.0]])
    got = top_p_filter(logits, 0.5)
    assert got[0].isnan().tolist() == [False, True, False]
    assert got[1].tolist() == [2.0, -INF, -INF]


@pytest.mark.parametrize("top_p", [1e-9, 1e-46, 5e-324])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_best_token_always_stays(top_p, dtype):
    logits = random(7, 90, dtype=dtype)
    assert torch.equal((top_p_filter(logits, top_p) > -INF).int().argmax(-1), logits.argmax(-1))
    assert ((top_p_filter(logits, top_p) > -INF).sum(-1) == 1).all()
    assert torch.equal(sample_top_p(logits, top_p), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tokens_at_infinity_share_the_probability(dtype, temperature):
    row = torch.tensor([1.0, INF, -INF, INF, 0.0, INF, INF], dtype=dtype)
    for top_p, kept in ((1e-9, [1]), (0.5, [1, 3]), (0.51, [1, 3, 5]), (0.99, [1, 3, 5, 6])):
        assert (top_p_filter(row, top_p, temperature) > -INF).nonzero().flatten().tolist() == kept
        ids = sample_top_p(row.expand(2_000, 7), top_p, temperature)
        assert chi_square(ids, torch.zeros(7).index_fill(0, torch.tensor(kept), 1 / len(kept))) < 16.3
    assert torch.equal(top_p_filter(row, 1.0, temperature), row.to(top_p_filter(row, 1.0).dtype) / temperature)
    assert chi_square(sample_top_p(row.expand(2_000, 7)), torch.tensor([0, 0.25, 0, 0.25, 0, 0.25, 0.25])) < 16.3


@pytest.mark.parametrize("top_p", [1e-46, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_row_that_is_no_distribution_gives_no_token_and_stays(top_p, dtype):
    nan = math.nan
    bad = torch.tensor([[0.0, nan, 1], [nan, INF, 0], [INF, 0, nan], [-INF, -INF, -INF], [-nan, nan, nan]], dtype=dtype)
    logits = torch.cat([bad, torch.tensor([[-INF, 0, -INF]], dtype=dtype)])
    assert sample_top_p(logits, top_p).tolist() == [-1, -1, -1, -1, -1, 1]
    filtered = top_p_filter(logits, top_p, 0.5)
    assert torch.equal(filtered.nan_to_num(7.0), (logits.to(filtered.dtype) / 0.5).nan_to_num(7.0))


def clear_of_the_edge(logits: Tensor, top_p: float, temperature: float) -> Tensor:  # (N,) bool
    """Rows where no sum of the best probabilities is so near top_p that the float32 rounding of a CPU decides."""
    sums = (logits.double() / temperature).softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    return ((sums - top_p).abs() > 2e-6).all(-1)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_the_nucleus_does_not_depend_on_the_size_of_the_logits(offset, temperature):
    logits = random(40, 200, scale=temperature, seed=9).round(decimals=1) + offset
    for top_p in (0.3, 0.9):
        rows = logits[clear_of_the_edge(logits, top_p, temperature)]
        kept = torch.tensor([nucleus(row, top_p, temperature) for row in rows])
        assert len(rows) >= 30 and torch.equal(top_p_filter(rows, top_p, temperature) > -INF, kept)
    exact = (logits[0].double() / temperature).softmax(-1)
    ids = sample_top_p(logits[0].expand(20_000, 200), temperature=temperature)
    top = exact.topk(5).indices
    counts = torch.bincount(ids, minlength=200)[top]
    assert ((counts - 20_000 * exact[top]).abs() < 5 * (20_000 * exact[top]).sqrt() + 5).all()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_top_p_filter_agrees_with_transformers(top_p, temperature):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = random(64, 4099, seed=3)
    logits = logits[clear_of_the_edge(logits, top_p, temperature)]
    scaled = process.TemperatureLogitsWarper(temperature)(None, logits)
    want = process.TopPLogitsWarper(top_p)(None, scaled)
    assert len(logits) >= 40 and torch.equal(top_p_filter(logits, top_p, temperature), want)


def chi_square(ids: Tensor, probs: Tensor) -> float:
    """Pearson's statistic of drawn ids against exact probabilities; inf if an impossible token was drawn."""
    counts, expected = torch.bincount(ids, minlength=len(probs)), probs * len(ids)
    if counts[probs == 0].any():
        return INF
    possible = probs > 0
    return ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()


@pytest.mark.parametrize(
    ("top_p", "temperature", "exact"),
    [
        (1.0, 1.0, [0.05, 0.4, 0.3, 0.2, 0.05]),
        (0.85, 1.0, [0.0, 4 / 9, 3 / 9, 2 / 9, 0.0]),
        (0.85, 0.5, [0.0, 16 / 29, 9 / 29, 4 / 29, 0.0]),
        (0.01, 1.0, [0.0, 1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_sampled_frequencies_match_exact_probabilities(top_p, temperature, exact):
    logits = log(0.05, 0.4, 0.3, 0.2, 0.05).float().expand(20_000, 5)
    ids = sample_top_p(logits, top_p, temperature, torch.Generator().manual_seed(0))
    assert chi_square(ids, torch.tensor(exact)) < 18.5  # passed by 999 of 1,000 seeds at 4 degrees of freedom
    if top_p > 0.5:
        assert chi_square(ids, torch.tensor([0.06, 0.39, 0.3, 0.2, 0.05])) > 18.5  # so the bound can fail


def test_each_position_samples_its_own_row():
    targets = torch.tensor([[3, 0, 5], [1, 1, 4]])
    logits = torch.nn.functional.one_hot(targets, 6) * 50.0
    assert torch.equal(sample_top_p(logits), targets)
    assert sample_top_p(logits[0, 0]).item() == 3  # no leading dimension
    assert sample_top_p(logits[:0]).shape == (0, 3)


def test_seeded_generator_repeats():
    logits = random(40, 1000, seed=5)

    def draw(seed: int) -> Tensor:
        return sample_top_p(logits, 0.95, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(7), draw(7))
    assert not torch.equal(draw(7), draw(8))
    generator = torch.Generator().manual_seed(7)
    first, second = (sample_top_p(logits, 0.95, generator=generator) for _ in range(2))
    assert torch.equal(first, draw(7))
    assert not torch.equal(first, second)


def test_a_noise_of_zero_never_picks_a_token_outside_the_nucleus(monkeypatch):
    monkeypatch.setattr(Tensor, "exponential_", lambda noise, **_: noise.zero_())
    assert sample_top_p(log(0.1, 0.2, 0.7), 0.5).item() == 2


def test_sampled_token_loss_golden_case():
    student, teacher = log(0.5, 0.25, 0.25).requires_grad_(), log(0.25, 0.25, 0.5)
    losses = [sampled_token_loss(student, teacher, torch.tensor(y)).item() for y in range(3)]
    assert losses == pytest.approx([math.log(2), 0.0, -math.log(2)], abs=1e-15)
    sampled_token_loss(student, teacher, torch.tensor(0)).backward()
    assert_close(student.grad, math.log(2) * torch.tensor([0.5, -0.25, -0.25], dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_is_that_of_the_surrogate(temperature, reduction, weighted):
    student, teacher = (random(2, 5, 33, seed=s, dtype=torch.float64) for s in (1, 2))
    student.requires_grad_()
    ids = torch.randint(33, (2, 5), generator=torch.Generator().manual_seed(3))
    weights = random(2, 5, seed=4, dtype=torch.float64) if weighted else None
    grad_output = random(5, seed=6, dtype=torch.float64).expand(2, 5) if reduction == "none" else torch.tensor(0.3)

    loss = sampled_token_loss(student, teacher, ids, weights=weights, temperature=temperature, reduction=reduction)
    (grad,) = torch.autograd.grad(loss, student, grad_output.double())

    value, scalar = surrogate(student, teacher, ids, temperature)
    scale = torch.ones_like(value) if weights is None else weights
    norm = scale.sum() if reduction == "mean" else 1
    expected = scale * value if reduction == "none" else (scale * value).sum() / norm
    (expected_grad,) = torch.autograd.grad((scalar * scale * grad_output).sum() / norm, student)
    assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


def test_expectation_over_the_student_is_the_full_reverse_kl_and_its_gradient():
    vocab = 12
    student, teacher = (random(vocab, seed=s, dtype=torch.float64) for s in (1, 2))
    student.requires_grad_()
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    full = (log_p.exp() * (log_p - log_q)).sum()
    (full_grad,) = torch.autograd.grad(full, student)

    rows = student.expand(vocab, vocab)  # every token sampled once, then averaged by its probability
    loss = sampled_token_loss(rows, teacher.expand(vocab, vocab), torch.arange(vocab), reduction="none")
    (grad,) = torch.autograd.grad(loss, student, log_p.exp().detach())
    assert_close((log_p.exp() * loss).sum(), full)
    assert_close(grad, full_grad)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, np.float64(2.5), np.float32(20)])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e3, 1e4, 1e5])
def test_large_logits_cost_no_accuracy(offset, temperature):
    ids = torch.arange(8) * 30
    student, teacher = random(8, 300, seed=1) + offset, random(8, 300, seed=2) - 1.1 * offset
    student[:4].scatter_(1, student[:4].argmax(1, keepdim=True), student[:4].gather(1, ids[:4, None]))
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    value, scalar = surrogate(exact, teacher.double(), ids, float(temperature))
    scalar.sum().backward()
    loss = sampled_token_loss(leaf, teacher, ids, temperature=temperature, reduction="none")
    loss.sum().backward()
    bound = 2e-6 * (1 + value.abs())
    assert ((loss - value).abs() <= bound).all()
    assert ((leaf.grad - exact.grad).abs() <= bound[:, None] / float(temperature)).all()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"dynamic": True}])
def test_the_baseline_compiles_at_most_twice_over_changing_n(options):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def warm(student, teacher, ids, weights):
        return sampled_token_loss(student, teacher, ids, weights=weights, temperature=0.7)

    compiled = torch.compile(warm, backend=counter, fullgraph=True, **options)
    for n in (4, 5, 6, 9):
        teacher, ids, weights = random(n, 50, seed=2), torch.arange(n), torch.rand(n)
        results = []
        for function in (warm, compiled):
            student = random(n, 50, seed=n).requires_grad_()
            loss = function(student, teacher, ids, weights)
            loss.backward()
            results.append((loss.detach(), student.grad))
        assert_close(*results)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_grad_output_of_0_gives_exactly_0(bad):
    student, teacher = random(3, 9, seed=1), random(3, 9, seed=2)
    student[1] = bad
    student.requires_grad_()
    loss = sampled_token_loss(student, teacher, torch.tensor([1, 2, 3]), reduction="none")
    torch.where(torch.tensor([True, False, True]), loss, 0).sum().backward()
    assert student.grad.isfinite().all() and (student.grad[1] == 0).all() and (student.grad[0] != 0).any()


def test_logits_of_plus_inf_make_their_position_nan():
    for student, teacher in ((random(3, 9), random(3, 9, seed=1)), (random(3, 9, seed=1), random(3, 9))):
        student[0, 4] = teacher[1, 4] = INF
        loss = sampled_token_loss(student, teacher, torch.tensor([4, 0, 0]), reduction="none")
        assert loss.isnan().tolist() == [True, True, False]


def test_ids_are_never_narrowed():
    logits = random(1, 9)
    for wrapped in (2**32 + 2, -(2**32) + 2, 2**31, 2**63 - 1):
        on_a_gpu = rollout._LogRatio.apply(
            logits, logits, torch.tensor([wrapped]), torch.ones(1).bool(), torch.ones(())
        )
        assert on_a_gpu.isnan().all()
        assert sampled_token_loss(logits, logits, torch.tensor([wrapped]), weights=torch.zeros(1)) == 0


@pytest.mark.parametrize("kind", [torch.bool, torch.float16, torch.float32, torch.float64])
def test_weight_zero_contributes_exactly_zero_even_where_it_holds_nan(kind):
    student, teacher = random(4, 9, seed=1), random(4, 9, seed=2)
    student[1], teacher[2, 3], student[3, 0] = math.nan, math.nan, INF
    student.requires_grad_()
    ids = torch.tensor([4, -100, 3, 999])
    weights = torch.tensor([1, 0, 0, 0]).to(kind)
    loss = sampled_token_loss(student, teacher, ids, weights=weights)
    loss.backward()

    alone = student.detach()[:1].requires_grad_()
    loss_alone = sampled_token_loss(alone, teacher[:1], ids[:1])
    loss_alone.backward()
    assert torch.equal(loss, loss_alone)
    assert torch.equal(student.grad, torch.cat([alone.grad, torch.zeros(3, 9)]))
    each = sampled_token_loss(student, teacher, ids, weights=weights, reduction="none")
    assert each.tolist() == [loss_alone.item(), 0.0, 0.0, 0.0]
    assert loss.dtype == each.dtype == torch.float32


def test_nan_where_it_counts_stays_in_its_row():
    student, teacher = random(3, 9, seed=1), random(3, 9, seed=2)
    student[1, 0] = math.nan
    student.requires_grad_()
    loss = sampled_token_loss(student, teacher, torch.tensor([1, 2, 3]), reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert student.grad.isnan().any(-1).tolist() == [False, True, False]


def test_denominator_and_empty_weights():
    student, teacher, ids = random(4, 9, seed=1).requires_grad_(), random(4, 9, seed=2), torch.arange(4)
    total = sampled_token_loss(student, teacher, ids, reduction="sum")
    assert_close(sampled_token_loss(student, teacher, ids), total / 4)
    assert_close(sampled_token_loss(student, teacher, ids, denominator=10), total / 10)
    assert_close(sampled_token_loss(student, teacher, ids, denominator=torch.tensor(7.0)), total / 7)
    empty = sampled_token_loss(student, teacher, ids, weights=torch.zeros(4))
    empty.backward()
    assert empty.item() == 0
    assert torch.equal(student.grad, torch.zeros(4, 9))
    assert sampled_token_loss(student[:0], teacher[:0], ids[:0], reduction="sum").item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_the_float32_result_rounded_once(dtype):
    student, teacher, ids = random(6, 300, seed=1, dtype=dtype), random(6, 300, seed=2, dtype=dtype), torch.arange(6)
    wide = student.float().requires_grad_()
    expected = sampled_token_loss(wide, teacher.float(), ids)
    expected.backward()
    student.requires_grad_()
    loss = sampled_token_loss(student, teacher, ids)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(student.grad, wide.grad.to(dtype))


def test_chunks_of_rows_and_padded_rows_change_nothing(monkeypatch):
    student, teacher, ids = random(7, 40, seed=1), random(7, 40, seed=2), torch.arange(7, dtype=torch.int32)

    def run(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student = student.detach().requires_grad_()
        loss = sampled_token_loss(student, teacher, ids, reduction="none", temperature=0.8)
        return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]

    whole = run(student, teacher)
    padded = run(*(torch.cat([x, torch.full((7, 9), math.nan)], -1)[:, :40] for x in (student, teacher)))
    monkeypatch.setattr(topk_rkl.rows, "CHUNK_BYTES", 8 * 3 * 40)
    chunked = run(student, teacher)
    for got in (padded, chunked):
        assert torch.equal(got[0], whole[0])
        assert torch.equal(got[1], whole[1])


def test_identical_logits_give_exactly_zero_and_inputs_stay_untouched():
    student = random(4, 50).requires_grad_()
    before, versions = student.detach().clone(), student._version
    loss = sampled_token_loss(student, student.detach(), torch.arange(4), temperature=0.7)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros(4, 50))
    assert torch.equal(student.detach(), before)
    assert student._version == versions


def test_backward_twice_repeats_and_double_backward_raises():
    student, teacher = random(3, 8, seed=1).requires_grad_(), random(3, 8, seed=2)
    loss = sampled_token_loss(student, teacher, torch.arange(3))
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(loss**2, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.1, math.nan])
def test_top_p_outside_its_range_is_refused(top_p):
    for function in (top_p_filter, sample_top_p):
        with pytest.raises(ValueError, match=f"top_p is {top_p}"):
            function(torch.zeros(3), top_p)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher_logits": torch.zeros(2, 5, requires_grad=True)}, ValueError, "teacher_logits requires grad"),
        ({"teacher_logits": torch.zeros(3, 5)}, ValueError, r"teacher_logits has shape \(3, 5\)"),
        ({"student_logits": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "student_logits is torch.int64"),
        ({"ids": torch.zeros(2)}, TypeError, "ids is torch.float32"),
        ({"ids": torch.zeros(2, 5, dtype=torch.int64)}, ValueError, r"ids has shape \(2, 5\)"),
        ({"weights": torch.ones(3)}, ValueError, r"weights has shape \(3,\)"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"reduction": "batchmean"}, ValueError, "reduction is 'batchmean'"),
        ({"reduction": "sum", "denominator": 3}, ValueError, "denominator is given"),
        ({"ids": torch.tensor([1, 5])}, ValueError, "ids has 5; where the weight is not 0 it must be from 0 to 4"),
        ({"ids": torch.tensor([-1, 2])}, ValueError, "ids has -1"),
        ({"ids": torch.tensor([4, 0]), "teacher_logits": torch.zeros(2, 4)}, ValueError, "ids has 4; .* 0 to 3"),
        ({"ids": torch.tensor([9, 0]), "weights": torch.tensor([1.0, 0])}, ValueError, "ids has 9"),
    ],
)
def test_sampled_token_loss_refuses(change, error, message):
    good = {"student_logits": torch.zeros(2, 5), "teacher_logits": torch.zeros(2, 5), "ids": torch.zeros(2).long()}
    with pytest.raises(error, match=message):
        sampled_token_loss(**(good | change))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, dtype=torch.int32), 0.9), TypeError, "logits is torch.int32"),
        ((torch.tensor(1.0), 0.9), ValueError, r"logits has shape \(\)"),
        ((torch.zeros(3), "0.9"), TypeError, "top_p is a str"),
        ((torch.zeros(3), 0.9, -1.0), ValueError, "temperature is -1.0"),
    ],
)
def test_sampling_refuses(arguments, error, message):
    for function in (top_p_filter, sample_top_p):
        with pytest.raises(error, match=message):
            function(*arguments)


def test_a_second_derivative_of_the_baseline_raises():
    student = torch.randn(3, 9, requires_grad=True)
    loss = sampled_token_loss(student, torch.randn(3, 9), torch.tensor([1, 2, 3]))
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()

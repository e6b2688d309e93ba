"""Pictures of where a student errs: their numbers, their text, and what a browser makes of the page."""

import contextlib
import html
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from topk_rkl import Support, teacher_topk, topk_reverse_kl
from topk_rkl.plot import TokenReport, colours, picture, save_html, save_png, token_report
from topk_rkl.plot.page import page
from topk_rkl.plot.report import Position
from topk_rkl.plot.tokens import shown_tokens, visible
from topk_rkl.vocabulary import BYTES

B, T, V, K = 3, 12, 20, 6
WORDS = [
    "<pad>", " The", " moon", "</script>", "<b>bold</b>", "\n", " a\tb", "$x^2$", "&amp;", " 'quoted\"", "<!--", "é",
    " sun", " shape", " light", ".", "s", "\u200b", " earth", "\u2028",
]  # fmt: skip


def starts(path: str | None) -> bool:
    """A chromium-browser of Ubuntu may only say that it is a snap."""
    return path is not None and subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0


BROWSER = next(filter(starts, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def words(ids: list[int]) -> list[str]:
    return [WORDS[i] for i in ids]


def made(seed: int = 0, **options: Any) -> TokenReport:
    """Of random logits; the first sequence has a prompt of 4 tokens, the last one ends in padding."""
    source = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, B, T, V, generator=source) * 3
    ids, weights = torch.randint(1, V, (B, T), generator=source), torch.ones(B, T)
    weights[0, :3] = weights[2, 5:] = ids[2, 6:] = 0
    given = {"weights": weights, **options}
    return token_report(student, teacher_topk(teacher, K, normalize=True), ids, words, **given)


def one_error(tokens: int = 12, at: int = 6) -> TokenReport:
    """Of a student that equals its teacher everywhere but at one position."""
    source = torch.Generator().manual_seed(3)
    teacher = torch.randn(tokens, V, generator=source)
    student = teacher.clone()
    student[at] = -3 * teacher[at]
    return token_report(student, teacher_topk(teacher, K), torch.full((tokens,), 2), words)


# The numbers


@pytest.mark.parametrize(("own", "of_teacher"), [(1.0, None), (0.7, None), (2.0, 1.0), (1.0, 0.5)])
def test_the_numbers_are_those_of_the_formula(own: float, of_teacher: float | None) -> None:
    student, teacher = torch.randn(2, B, T, V, dtype=torch.float64) * 3
    ids, support = torch.randint(V, (B, T)), teacher_topk(teacher, K, normalize=True)
    shuffled = support.each(lambda x: x[..., torch.randperm(K).tolist()])
    shuffled = Support(*(x.gather(-1, support.ids.argsort(-1)) for x in support.tensors))
    found = token_report(student, shuffled, ids, words, temperature=own, teacher_temperature=of_teacher)
    assert found.loss.shape == (B, T - 1) and found.ids.shape == (B, T - 1, K) and found.lead == 1 and len(found) == B
    for b in range(B):
        for t in range(T - 1):
            best = teacher[b, t].argsort(descending=True)[:K]
            p = (student[b, t, best] / own).softmax(0)
            q = (teacher[b, t, best] / (of_teacher or own)).softmax(0)
            assert found.ids[b, t].tolist() == best.tolist()
            torch.testing.assert_close(found.p[b, t], p)
            torch.testing.assert_close(found.q[b, t], q)
            torch.testing.assert_close(found.terms[b, t], p * (p / q).log())
            torch.testing.assert_close(found.loss[b, t], (p * (p / q).log()).sum())
            everywhere = (student[b, t] / own).softmax(0)
            torch.testing.assert_close(found.student_mass[b, t], everywhere[best].sum())
            torch.testing.assert_close(found.next_prob[b, t], everywhere[ids[b, t + 1]])
            slots = (best == ids[b, t + 1]).nonzero().flatten().tolist()
            assert found.place[b, t] == (slots[0] if slots else -1)
    masses = teacher.softmax(-1).gather(-1, support.ids.long()).sum(-1)[:, :-1]
    if (of_teacher or own) == 1:
        torch.testing.assert_close(found.teacher_mass, masses)
    else:
        assert found.teacher_mass is None
    assert len({*found.place.flatten().tolist()}) > 3


def test_the_loss_is_that_of_the_package_where_the_weight_is_not_0() -> None:
    student, teacher = torch.randn(2, B, T, V)
    student.requires_grad_()
    weights = torch.tensor([0.0, 1.0, 0.5, -2.0]).repeat(3).expand(B, T)
    found = token_report(student, teacher_topk(teacher, K), torch.zeros(B, T).int(), words, weights=weights)
    want = topk_reverse_kl(student, teacher, k=K, weights=weights != 0, reduction="none")[:, :-1].detach()
    assert torch.equal(found.loss, want.double()) and torch.equal(found.counted, weights[:, :-1] != 0)
    torch.testing.assert_close(found.terms.sum(-1)[found.counted], found.loss[found.counted], rtol=1e-5, atol=1e-6)
    assert found.teacher_mass is None  # the support holds logits


def test_longer_ids_have_the_tokens_that_the_positions_predict_at_their_end() -> None:
    student, teacher = torch.randn(2, T, V)
    ids, support = torch.randint(V, (T + 5,)), teacher_topk(teacher, K)
    found, cut = token_report(student, support, ids, words), token_report(student, support, ids[5:], words)
    assert found.loss.shape == (1, T) and found.lead == 5 and cut.loss.shape == (1, T - 1) and cut.lead == 1
    assert torch.equal(found.loss[:, :-1], cut.loss)
    for t in range(T):
        assert found.token((0, t)) == visible(WORDS[ids[5 + t]])
        assert found.context((0, t), 2) == "".join(visible(WORDS[i]) for i in ids[3 + t : 5 + t])
    last = token_report(student, support, torch.cat([ids[:T], ids[-1:]]), words)
    assert last.loss.shape == (1, T) and last.token((0, T - 1)) == visible(WORDS[ids[-1]])


def test_a_support_may_lack_the_last_position() -> None:
    student, teacher = torch.randn(2, B, T, V)
    support, ids = teacher_topk(teacher, K), torch.randint(V, (B, T))
    found, want = (token_report(student, x, ids, words) for x in (support[:, :-1], support))
    assert torch.equal(found.loss, want.loss) and torch.equal(found.ids, want.ids)
    with pytest.raises(ValueError, match=r"support.ids has shape \(3, 11, 6\)"):  # the last one predicts a token
        token_report(student, support[:, :-1], torch.randint(V, (B, T + 1)), words)


def test_empty_slots_are_last_and_nan_stays_where_it_is() -> None:
    student = torch.randn(5, V, dtype=torch.float64)
    ids = torch.tensor([[3, -1, 5, 99], [1, 2, 3, 4], [-1, -1, -1, -1], [1, 2, 3, 4], [1, 2, 3, 4]])
    log_probs = torch.tensor([[-2.0, -1.0, -1.0, -0.1]] + [[-4.0, -3.0, -torch.inf, -1.0]] * 4, dtype=torch.float64)
    student[1, 4] = torch.nan
    student[3, 4] = -torch.inf
    found = token_report(student, Support(ids, log_probs), torch.tensor([0, 1, 2, 3, 4, 5]), words)
    assert found.ids[0].tolist() == [[5, 3, -1, -1], [4, 2, 1, -1], [-1] * 4, [4, 2, 1, -1], [4, 2, 1, -1]]
    p, q = student[0, [5, 3]].softmax(0), torch.tensor([-1.0, -2.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(found.p[0, 0], torch.cat([p, torch.zeros(2).double()]))
    torch.testing.assert_close(found.q[0, 0], torch.cat([q, torch.zeros(2).double()]))
    torch.testing.assert_close(found.loss[0, 0], (p * (p / q).log()).sum())
    assert found.loss[0, 1].isnan() and found.p[0, 1, :3].isnan().all() and found.p[0, 1, 3] == 0
    assert found.loss[0, 2] == 0 and (found.p[0, 2] == 0).all() and found.place[0, 2] == -1
    assert found.p[0, 3, 0] == 0 == found.terms[0, 3, 0] and found.loss[0, 3].isfinite()  # of a logit of -inf
    torch.testing.assert_close(found.terms[0, 3].sum(), found.loss[0, 3])
    assert found.worst(9)[0] == (0, 1) and len(found.worst(9)) == 5 and found.loss_text((0, 1)) == "NaN"
    assert (
        found.summary().endswith("over 5 positions, 1 NaN") and found.largest == found.loss[~found.loss.isnan()].max()
    )


def test_what_weighs_nothing_is_neither_counted_nor_looked_at() -> None:
    student, teacher = torch.randn(2, 2, 6, V)
    student[0, :3], student[1] = torch.nan, teacher[1]  # whose loss is 0, as that of what does not count
    weights = torch.ones(2, 6, dtype=torch.bool)
    weights[0, :3] = False
    ids = torch.tensor([[-100, -100, -100, -100, 1, 2], [4, 5, 6, 7, 8, 9]])
    found = token_report(student, teacher_topk(teacher, K), ids, words, weights=weights)
    assert (found.loss[0, :3] == 0).all() and found.loss.isfinite().all()
    assert sorted(found.worst(99)) == [(0, 3), (0, 4), *((1, t) for t in range(5))]
    assert found.cells(0) == [("⟨-100⟩⟨4 times⟩", None), ("·The", 3), ("·moon", 4)]
    assert [t for _, t in found.cells(1)] == [None, 0, 1, 2, 3, 4]


def test_the_worst_come_first() -> None:
    found = made()
    order = [float(found.loss[at]) for at in found.worst(10_000)]
    assert order == sorted(found.loss[found.counted].tolist(), reverse=True) and len(order) == int(found.counted.sum())
    means = [float(found.loss[i][found.counted[i]].mean()) for i in found.sequences()]
    assert means == sorted(means, reverse=True) and len(means) == B
    assert found.summary(2) == f"mean loss {float(found.loss[2, :5].mean()):.3f} over 5 positions"
    nothing = made(weights=torch.zeros(B, T))
    assert nothing.worst(3) == [] and nothing.largest == 0 and nothing.summary() == "no position counts"
    assert "<li>None: the weight of every position is 0.</li>" in page(nothing, "x") and "loss, nats" in page(
        found, "x"
    )
    assert "loss, nats" not in page(nothing, "x")
    lost = token_report(torch.full((2, V), torch.nan), SUPPORT[0, :2], torch.tensor([1, 2, 3]), words)
    assert lost.summary() == "mean loss NaN over 2 positions, 2 NaN" and lost.worst(1) == [(0, 0)]


# The tokens


def test_nothing_of_a_token_is_unseen() -> None:
    assert visible(" a\n\tb\u200b\x07\u00a0·") == "·a↵⇥b⟨U+200B⟩⟨U+0007⟩⟨U+00A0⟩⟨U+00B7⟩"
    assert visible("naïve 月 🌙") == "naïve·月·🌙"


def test_part_of_a_character_shows_its_bytes() -> None:
    from tokenizers import Tokenizer, decoders, models

    alphabet = list(map(chr, sorted(BYTES, key=BYTES.__getitem__)))
    assert len(alphabet) == 256
    vocab = {x: i for i, x in enumerate(alphabet)} | {"Ġthe": 256, "Ã©": 257, "âĸ": 258, "ĠÃ": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    moon = list("月".encode())
    found = shown_tokens(tokenizer, [256, 257, 258, 259, *moon, 10, 300, -7])
    assert list(found.values()) == ["·the", "é", "⟨e2⟩⟨96⟩", "·⟨c3⟩", "⟨e6⟩", "⟨9c⟩", "⟨88⟩", "↵", "⟨300⟩", "⟨-7⟩"]


def test_a_sentencepiece_token_keeps_its_space() -> None:
    class Tokens:
        """Drops the space of a first token, and gives bytes as pieces, as tokenizers of Llama 2 do."""

        pieces = ("▁the", "he", "<0xE2>", "▁", "<unk>")

        def convert_ids_to_tokens(self, i: int) -> str:
            return self.pieces[i]

        def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
            assert not skip_special_tokens and not clean_up_tokenization_spaces
            return self.pieces[ids[0]].removeprefix("▁").replace("<0xE2>", "\ufffd")

    assert list(shown_tokens(Tokens(), range(7)).values()) == ["·the", "he", "⟨e2⟩", "·", "<unk>", "⟨5⟩", "⟨6⟩"]


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
def test_the_tokens_of_a_real_tokenizer_make_its_text_again(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    text = "The moon isn't a cheese , it  is 月 🌙 <b>naïve</b>\n\n\tDone."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits
    found = token_report(logits.roll(1, 1), teacher_topk(logits, 16, normalize=True), ids, tokenizer)
    shown = "".join(found.names[i] for i in ids[0].tolist())
    encoded = re.sub(r"(?:⟨[0-9a-f]{2}⟩)+", lambda x: bytes.fromhex(re.sub("[⟨⟩]", "", x[0])).decode(), shown)
    assert encoded.replace("·", " ").replace("↵", "\n").replace("⇥", "\t") == text and "⟨" in shown
    assert not any("\ufffd" in name for name in found.names.values())
    save_html(found, tmp_path / "x.html")
    assert found.loss.mean() > 1 and found.token(found.worst(1)[0]) in found.names.values()


# The refusals

REPORT = made()
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "one dimension": (lambda: report_of(student=torch.randn(V)), ValueError, r"student_logits has shape \(20,\)"),
    "four": (lambda: report_of(student=torch.randn(1, B, T, V)), ValueError, r"student_logits has shape \(1, 3"),
    "no position": (lambda: report_of(student=torch.randn(B, 0, V)), ValueError, r"logits has shape \(3, 0, 20"),
    "other positions": (lambda: report_of(support=SUPPORT[:, :4]), ValueError, r"support.ids has shape \(3, 4, 6\)"),
    "a tuple": (lambda: report_of(support=SUPPORT.tensors), TypeError, "support is a tuple; it must be a Support"),
    "few ids": (lambda: report_of(ids=IDS[:, :-1]), ValueError, r"input_ids has shape \(3, 11\).*\(3, 12\), or longer"),
    "flat ids": (lambda: report_of(ids=IDS[0]), ValueError, r"input_ids has shape \(12,\)"),
    "float ids": (lambda: report_of(ids=IDS.float()), TypeError, "input_ids is torch.float32"),
    "one id": (
        lambda: token_report(STUDENT[:, :1], SUPPORT[:, :1], IDS[:, :1], words),
        ValueError,
        "input_ids has 1 token, .*pass 2 tokens at least",
    ),
    "labels for weights": (lambda: report_of(weights=IDS), TypeError, "weights is torch.int64; it must be bool"),
    "flat weights": (lambda: report_of(weights=torch.ones(T)), ValueError, r"weights has shape \(12,\)"),
    "temperature": (lambda: report_of(temperature=0), ValueError, "temperature is 0; it must be positive"),
    "of the teacher": (lambda: report_of(teacher_temperature=-1), ValueError, "teacher_temperature is -1"),
    "per position": (lambda: report_of(temperature=torch.ones(B, T)), TypeError, "temperature is a torch.Tensor"),
    "no tokenizer": (lambda: report_of(tokenizer=None), TypeError, "tokenizer is None; it must be a tokenizer with"),
    "a class": (lambda: report_of(tokenizer=dict), TypeError, "tokenizer is <class 'dict'>"),
    "a text": (lambda: report_of(tokenizer=lambda _: "text"), TypeError, "tokenizer gave a str for a list of"),
    "few texts": (lambda: report_of(tokenizer=lambda _: ["a"]), TypeError, "tokenizer gave a list for a list of"),
    "numbers": (lambda: report_of(tokenizer=lambda ids: ids), TypeError, "a list of as many strings"),
    "count": (lambda: REPORT.worst(1.5), TypeError, "count is 1.5; it must be an int"),
    "html: report": (lambda: save_html({}, "x.html"), TypeError, "report is a dict; it must be a TokenReport"),
    "html: title": (lambda: save_html(REPORT, "x.html", title=3), TypeError, "title is 3; it must be a str"),
    "html: path": (lambda: save_html(REPORT, 3), TypeError, "path is 3; it must be a str or a pathlib.Path"),
    "html: folder": (lambda: save_html(REPORT, "no/x.html"), ValueError, "'no/x.html', whose folder .*mkdir -p no"),
    "html: a folder": (lambda: save_html(REPORT, Path()), ValueError, "path is '.', a folder"),
    "png: report": (lambda: save_png(None, "x.png"), TypeError, "report is a NoneType; it must be a TokenReport"),
    "png: folder": (lambda: save_png(REPORT, "no/x.png"), ValueError, "'no/x.png', whose folder does not exist"),
    "png: path": (lambda: save_png(REPORT, None), TypeError, "path is None"),
    "png: positions": (lambda: save_png(REPORT, "x.png", 3), TypeError, "positions is 3; it must be a list of"),
    "png: a position": (lambda: save_png(REPORT, "x.png", [3]), TypeError, r"positions\[0\] is 3; it must be a \(seq"),
    "png: a float": (lambda: save_png(REPORT, "x.png", [(0, 5), (0, 1.0)]), TypeError, r"positions\[1\] is 1.0"),
    "png: far": (
        lambda: save_png(REPORT, "x.png", [(0, 11)]),
        ValueError,
        r"positions\[0\] is \(0, 11\); its position must be from 0 to 10",
    ),
    "png: negative": (lambda: save_png(REPORT, "x.png", [(-1, 4)]), ValueError, "its sequence must be from 0 to 2"),
    "png: no weight": (lambda: save_png(REPORT, "x.png", [(0, 1)]), ValueError, r"\(0, 1\), whose weight is 0; use"),
}  # fmt: skip
STUDENT, IDS = torch.randn(B, T, V), torch.randint(V, (B, T))
SUPPORT = teacher_topk(torch.randn(B, T, V), K)


def report_of(
    student: Tensor | None = None,
    support: Any = None,
    ids: Tensor | None = None,
    tokenizer: Any = words,
    **options: Any,
) -> TokenReport:
    student, ids = STUDENT if student is None else student, IDS if ids is None else ids
    return token_report(student, SUPPORT if support is None else support, ids, tokenizer, **options)


@pytest.mark.parametrize("name", REFUSED)
def test_errors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_page_is_still_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"save_png needs matplotlib; run pip install 'topk-rkl\[plot\]', or"):
        save_png(REPORT, tmp_path / "x.png")
    save_html(REPORT, tmp_path / "x.html")
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]


@pytest.mark.slow
def test_the_package_does_not_import_it_and_it_does_not_import_matplotlib() -> None:
    code = "import sys, topk_rkl; print('topk_rkl.plot' in sys.modules); "
    code += "import topk_rkl.plot; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# The PNG


def pixels(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Where each colour is, as (x, y) pairs."""
    image = Image.open(path).convert("RGB")
    raw, found = image.tobytes(), {}
    for i in range(0, len(raw), 3):
        found.setdefault("#" + raw[i : i + 3].hex(), []).append((i // 3 % image.width, i // 3 // image.width))
    return found


def test_the_worst_token_of_a_png_is_the_darkest(tmp_path: Path) -> None:
    save_png(one_error(), tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").format == "PNG"
    found, hottest = pixels(tmp_path / "x.png"), colours.RAMPS[0][-1]
    patch = [(x, y) for x, y in found[hottest] if y > 120]  # below the legend
    wide, high = (max(values) - min(values) for values in zip(*patch))
    assert 52 < wide < 60 and 24 <= high <= 30 and len(patch) > 0.6 * wide * high  # "·moon" of 5 characters
    pitch = 5 * 0.602 * 9.5 / 72 * 150 + 2  # pixels of a token: 5 characters of 9.5 points, and a gap
    assert min(x for x, _ in patch) == pytest.approx(0.35 * 150 + 7 * pitch, abs=6)  # the token after position 6
    in_text = {colour for colour, places in found.items() if any(150 < y < 230 for _, y in places)}
    assert in_text & {*colours.RAMPS[0][1:-1]} == set() and colours.STUDENT[0] in found and colours.TEACHER[0] in found


def test_the_bars_of_a_png_are_as_long_as_the_probabilities(tmp_path: Path) -> None:
    report = made()
    at = report.worst(5)[4]
    save_png(report, tmp_path / "x.png", [at])
    found = pixels(tmp_path / "x.png")
    scale = 150 * ((11 - 0.7) / 3 - 1.4)  # pixels of a probability of 1
    for colour, values in ((colours.STUDENT[0], report.p[at]), (colours.TEACHER[0], report.q[at])):
        legend = [y for x, y in found[colour] if x > 52 + 150 + 0.6 * scale]
        lengths: dict[int, list[int]] = {}
        for x, y in found[colour]:
            lengths.setdefault(y, []).append(x)
        longest = max(max(row) - min(row) for y, row in lengths.items() if y not in legend or max(row) - min(row) > 60)
        assert longest == pytest.approx(float(values.max()) * scale, abs=3)


@pytest.mark.slow
def test_a_png_may_show_nothing_that_counts_and_text_that_fonts_lack(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_png(made(weights=torch.zeros(B, T)), tmp_path / "x.png")
        student, teacher = torch.randn(2, 60, V)
        support = teacher_topk(teacher, 2)
        save_png(
            token_report(student, support, torch.randint(V, (60,)), lambda i: ["月🌙$\\frac$"] * len(i)),
            tmp_path / "y.png",
        )
    assert Image.open(tmp_path / "x.png").height < Image.open(tmp_path / "y.png").height


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of a PNG, while it is drawn."""
    from matplotlib.axes import Axes

    texts, text = [], Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, *args, **options: (texts.append(args[2]), text(self, *args, **options))[1]
    )
    return texts


@pytest.mark.parametrize("at", [6, 1200, 1998])
def test_a_png_of_a_long_text_is_of_what_is_around_the_positions(
    at: int, drawn: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "LINES", 12)
    save_png(one_error(2000, at), tmp_path / "x.png", [(0, at)])
    shown = drawn.count("·moon")
    assert 200 < shown < 300 and f"… and {2000 - shown:,} tokens before and after" in drawn
    assert drawn.count(" 1") == 1  # the number of the position, at its token


def test_a_chart_of_nan_has_the_teacher_s_largest(tmp_path: Path) -> None:
    student, teacher = torch.randn(2, 1, V)
    student[:] = torch.nan
    report = token_report(student, teacher_topk(teacher, V), torch.tensor([1, 2]), words)
    figure = picture._figure(report, [(0, 0)])
    names = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert names == [picture._short(visible(WORDS[i])) for i in teacher[0].topk(picture.BARS).indices]


# The page


def embedded(text: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def test_the_page_has_the_numbers_of_the_report() -> None:
    report = made()
    data = embedded(page(report, "x"))
    assert len(data["at"]) == report.counted.sum() and data["k"] == K
    for key, (loss, mass, of_teacher, next_prob, place, token, ids, p, q) in data["at"].items():
        at = tuple(map(int, key.split(".")))
        assert report.counted[at] and ids == report.ids[at].tolist() and place == report.place[at]
        assert token == report.input_ids[at[0], at[1] + 1] and data["names"][str(token)] == report.token(at)
        for found, want in ((loss, report.loss), (mass, report.student_mass), (of_teacher, report.teacher_mass),
                            (next_prob, report.next_prob), (p, report.p), (q, report.q)):  # fmt: skip
            assert found == pytest.approx(want[at].tolist(), rel=5e-4)


def test_the_page_loads_nothing_and_tokens_are_no_markup() -> None:
    text = page(made(), "</title><script>alert(1)</script>")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert f'http-equiv="Content-Security-Policy" content="{policy}"' in text
    assert not re.search(r"https?:|\bsrc=|url\(|@import|<link|<b>bold|alert\(1\)</script>", text)
    assert text.count("<script") == text.count("</script>") == 2 and "<!--" not in text
    assert '<html lang="en">' in text and "<title>&lt;/title&gt;" in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text and "&amp;amp;" in text and "&lt;/script&gt;" in text


def test_the_size_of_a_page_is_bounded() -> None:
    source = torch.Generator().manual_seed(0)
    k, length = 64, 200
    student, teacher = torch.randn(2, length, 150_000, generator=source) * 6
    report = token_report(student, teacher_topk(teacher, k), torch.zeros(length).long(), lambda ids: ["a"] * len(ids))
    data = embedded(page(report, "x"))
    assert len(json.dumps(data["at"], separators=(",", ":"))) / (length - 1) < 29 * k + 80
    assert max(len(repr(x)) for numbers in data["at"].values() for x in numbers[7] + numbers[8]) <= 9


def luminance(colour: str) -> float:
    channels = [x / 255 for x in bytes.fromhex(colour[1:])]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return sum(x * y for x, y in zip(linear, (0.2126, 0.7152, 0.0722)))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_on_every_colour() -> None:
    for ink, ramp, paper in zip(colours.INK, colours.RAMPS, colours.PAPER):
        assert ramp[0] == paper and len(ramp) == len({*ramp}) == colours.LEVELS
        assert min(contrast(ink, colour) for colour in ramp) >= 4.5
        from_paper = [contrast(paper, colour) for colour in ramp]
        assert from_paper == sorted(from_paper) and from_paper[-1] > 3  # more loss, further from the paper
    assert contrast("#ffffff", colours.NOT_A_NUMBER) >= 4.5
    text = page(REPORT, "x")
    for scheme, paper in enumerate(colours.PAPER):
        other = [re.findall(rf"--{name}: (#\w{{6}});", text)[scheme] for name in ("faint", "card")]
        assert (
            contrast(other[0], paper) >= 4.5 <= contrast(other[0], other[1])
            and f".nan {{ background: {colours.NOT_A_NUMBER};" in text
        )


def test_a_colour_tells_the_loss() -> None:
    assert [colours.level(x, 9.0) for x in (0.0, 1.0, 4.0, 9.0)] == [0, 5, 10, 15]
    assert [colours.loss_at(x, 9.0) for x in (0, 5, 10, 15)] == [0.0, 1.0, 4.0, 9.0]
    assert colours.level(float("nan"), 9.0) is None and colours.level(0.0, 0.0) == 0


# In a browser


def browse(target: str, folder: Path, *options: str) -> str:
    """What a headless browser prints, its console included; nothing may be reported there."""
    profile = folder / "profile"
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
            f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--window-size=1280,900", *options, target,
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout + "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no browser starts here; apt-get install chromium")


def panel_of(dom: str) -> str:
    return dom.partition('id="panel"')[2].partition("</div>")[0]


def cells_of(panel: str) -> list[list[str]]:
    body = panel.partition("<tbody>")[2]
    return [
        [html.unescape(re.sub("<[^>]*>", "", x)) for x in re.findall(r"<td.*?</td>", row)]
        for row in body.split("</tr>")[:-1]
    ]


def shown(x: float) -> str:
    return f"{x:.3f}" if x == 0 or x >= 0.0005 else ""


def press(*keys: str) -> str:
    return "".join(f'dispatchEvent(new KeyboardEvent("keydown", {{key: "{key}"}}));' for key in keys)


def play(report: TokenReport, folder: Path, *steps: str) -> list[tuple[str, str]]:
    """What is chosen, and what the panel shows, after each of the steps in JavaScript."""
    script = """<pre id="log"></pre><script>(async () => {
        const log = [];
        for (const step of [%s]) {
            step();
            await new Promise(done => setTimeout(done, 20));  // of the event that a fragment makes
            const chosen = [...document.querySelectorAll("[aria-current], [tabindex='0']")].map(x => x.id);
            log.push([...new Set(chosen), document.getElementById("panel").innerHTML]);
        }
        document.getElementById("log").textContent = JSON.stringify(log);
    })()</script></body>"""
    functions = ", ".join(f"() => {{ {step} }}" for step in steps)
    (folder / "x.html").write_text(page(report, "x").replace("</body>", script % functions))
    dom = browse(f"file://{folder}/x.html", folder, "--dump-dom")
    assert "CONSOLE" not in dom
    found = json.loads(html.unescape(dom.partition('<pre id="log">')[2].partition("</pre>")[0]))
    return [(chosen, panel) for chosen, panel in found]  # one chosen each


@pytest.mark.slow
@in_a_browser
def test_a_fragment_chooses_a_position(tmp_path: Path) -> None:
    report = made()
    save_html(report, tmp_path / "x.html")
    at: Position = report.worst(7)[6]
    dom = browse(f"file://{tmp_path}/x.html#{at[0]}.{at[1]}", tmp_path, "--dump-dom")
    assert "CONSOLE" not in dom
    chosen = re.findall(r'<a id="([^"]*)"[^>]*aria-current="true"', dom)
    assert chosen == [f"p{at[0]}.{at[1]}"]
    panel = panel_of(dom)
    assert f"Sequence {at[0]}, position {at[1]}, token id" in panel
    assert f"<dt>loss</dt><dd>{float(report.loss[at]):.3f} nats</dd>" in panel
    assert f"<dd>{float(report.student_mass[at]):.3f}</dd>" in panel
    rows = cells_of(panel)
    folded = [i for i in range(K) if report.p[at][i] < 0.01 and report.q[at][i] < 0.01 and i != report.place[at]]
    kept = [i for i in range(K) if i not in folded]
    assert [row[0] for row in rows] == [report.names[int(report.ids[at][i])] for i in kept] and len(rows) > 2
    for i, (_, _, p, q, term) in zip(kept, rows):
        assert (p, q) == (shown(report.p[at][i]) or p, shown(report.q[at][i]) or q)
        assert float(term.replace("\u2212", "-")) == pytest.approx(float(report.terms[at][i]), abs=2e-3)
    assert ("Show the other" in panel) == bool(folded)


@pytest.mark.slow
@in_a_browser
def test_markup_in_tokens_is_text_in_a_browser(tmp_path: Path) -> None:
    student, teacher = torch.randn(2, V, V)
    report = token_report(student, teacher_topk(teacher, V), torch.arange(V), words)
    save_html(report, tmp_path / "x.html", title="a <i>b</i> & c")
    dom = browse(f"file://{tmp_path}/x.html#0.2", tmp_path, "--dump-dom")
    assert "CONSOLE" not in dom and "<title>a &lt;i&gt;b&lt;/i&gt; &amp; c</title>" in dom
    tokens = [html.unescape(re.sub("<[^>]*>", "", x)) for x in re.findall(r'<a id="p0.*?</a>', dom)]
    assert tokens == [visible(word) for word in WORDS[1:]]
    rows = cells_of(panel_of(dom))
    assert {"</script>", "<b>bold</b>", "<!--", "&amp;"} <= {row[0] for row in rows}
    assert "</b>" not in re.sub(r"<b>[^<]*(<i>.</i>)?[^<]*</b>|<b class.*?</b>", "", dom.partition("<body>")[2])


@pytest.mark.slow
@in_a_browser
def test_keys_clicks_and_the_pointer_choose_too(tmp_path: Path) -> None:
    report = made()
    first, second, third, fourth = (f"p{sequence}.{t}" for sequence, t in report.worst(4))
    chosen, panels = zip(
        *play(
            report, tmp_path, "0", press("j"), press("j", "j", "k"), 'location.hash = "nowhere"',
            'document.querySelectorAll("#worst a")[3].click()', 'document.getElementById("p1.4").click()',
            press("ArrowRight", "ArrowRight", "ArrowLeft"),
            'document.getElementById("p2.1").dispatchEvent(new MouseEvent("mouseover", {bubbles: true}))',
            'document.querySelector("main").dispatchEvent(new MouseEvent("mouseleave"))',
        )
    )  # fmt: skip
    assert chosen == (first, second, third, third, fourth, "p1.4", "p1.5", "p1.5", "p1.5")
    looked_at = (*chosen[:-2], "p2.1", "p1.5")
    for at, panel in zip(looked_at, panels):
        assert "Sequence {}, position {},".format(*at[1:].split(".")) in panel


@pytest.mark.slow
@in_a_browser
def test_a_nan_and_an_empty_support_are_shown(tmp_path: Path) -> None:
    student, support = torch.randn(4, V), teacher_topk(torch.randn(4, V), K)
    student[0, int(support.ids[0, 1])] = torch.nan
    support = Support.cat([support[:1], support[1:].without(torch.ones(3, K, dtype=torch.bool))])
    report = token_report(student, support, torch.arange(5), words)
    (_, nan), (_, empty) = play(report, tmp_path, "0", 'location.hash = "0.1"')
    assert "<dd>NaN nats</dd>" in nan and [row[2] for row in cells_of(nan)] == ["NaN"] * K
    assert "S is empty here, and the loss 0" in empty and "<dd>0.000 nats</dd>" in empty


@pytest.mark.slow
@in_a_browser
def test_a_browser_refuses_to_load_anything_for_the_page(tmp_path: Path) -> None:
    aliens = (
        '<script src="other.js"></script>', '<link rel="stylesheet" href="other.css">', '<img src="other.png">',
        '<iframe src="other.html"></iframe>', '<video src="other.mp4"></video>',
    )  # fmt: skip
    (tmp_path / "x.html").write_text(page(REPORT, "x").replace("</body>", f"{''.join(aliens)}</body>"))
    (tmp_path / "y.html").write_text(f"<body>{''.join(aliens)}</body>")
    with_page, without = (browse(f"file://{tmp_path}/{x}.html", tmp_path, "--dump-dom") for x in "xy")
    told = [line for line in with_page.splitlines() if "violates the following Content Security Policy" in line]
    assert all(any(f"other.{kind}" in line for line in told) for kind in ("js", "css", "png", "html", "mp4"))
    assert "Content Security Policy" not in without


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_worst_token_has_its_colour_on_the_screen(scheme: str, tmp_path: Path) -> None:
    save_html(one_error(), tmp_path / "x.html")
    dark = scheme == "dark"
    shot = tmp_path / "x.png"
    options = (f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={shot}")
    assert "CONSOLE" not in browse(f"file://{tmp_path}/x.html#0.2", tmp_path, *options)
    found, ramp = pixels(shot), colours.RAMPS[dark]
    in_text = [(x, y) for x, y in found[ramp[-1]] if x < 840 and y > 145]
    wide, high = (max(values) - min(values) for values in zip(*in_text))
    assert 30 < wide < 70 and 15 < high < 40 and len(in_text) > 0.5 * wide * high
    assert len(found[colours.PAPER[dark]]) > 100_000  # neither blank nor of the other scheme
    assert len(found) > 100 and colours.STUDENT[dark] in found and colours.TEACHER[dark] in found


def test_the_page_of_pictures_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "pictures.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    with contextlib.redirect_stdout(None):
        exec(block, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors.html", "errors.png"]

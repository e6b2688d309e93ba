"""examples/distill.py without its model: what it measures of logits, and what it writes."""

import argparse
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import report

MISSING = [name for name in ("accelerate", "gguf", "matplotlib", "tqdm", "transformers")
           if importlib.util.find_spec(name) is None]  # fmt: skip
if MISSING:
    pytest.skip(f"examples.distill needs {', '.join(MISSING)}", allow_module_level=True)

from examples import distill  # noqa: E402
from examples.smollm2 import Rollout  # noqa: E402
from topk_rkl import topk_reverse_kl  # noqa: E402

V, K, END = 12, 3, 7
HISTORY = {"topk": [{"full": 1.0, "student_mass": 0.6}, {"full": 0.9, "student_mass": 0.7}]}
NATS = dict.fromkeys(distill.IN_NATS, 1.25)
SCORES = {"before": NATS | {"student_mass": 0.5}, "topk": NATS | {"student_mass": 0.75}}


def test_the_students_mass_is_the_mean_over_the_tokens_that_count() -> None:
    source = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 2, 4, V, generator=source) * 2  # (B, T, V) each
    ids = torch.tensor([[1, 2, 3, 4, END], [1, 5, END, END, END]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    demo = distill.Demo(argparse.Namespace(k=K), None, SimpleNamespace(all_special_ids=[END]), {})
    found = distill.losses(demo, ours, theirs, Rollout(ids, mask, 4))
    counted = [(0, 0), (0, 1), (0, 2), (1, 0)]  # the first END of a response does not count, nor does padding
    masses = [ours[at].softmax(-1)[theirs[at].topk(K).indices].sum() for at in counted]
    assert float(found["student_mass"]) == pytest.approx(float(sum(masses)) / 4, rel=1e-5)
    assert not found["student_mass"].requires_grad and found["topk"] > 0


def test_errors_are_those_of_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.Generator().manual_seed(0)
    logits = {"student": torch.randn(2, 4, V, generator=source), "teacher": torch.randn(2, 4, V, generator=source)}
    ids = torch.tensor([[1, 2, 3, 4, 5, END], [END, 1, 5, END, END, END]])  # two tokens of a prompt, four of an answer
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]).bool()
    monkeypatch.setattr(distill, "rollout", lambda *_: Rollout(ids, mask, 4))
    monkeypatch.setattr(distill, "response_logits", lambda model, _: logits[model])
    tokenizer = SimpleNamespace(all_special_ids=[END], decode=lambda ids, **_: f" t{ids[0]}")
    args = argparse.Namespace(k=K, length=4, seed=0)
    found = distill.errors(distill.Demo(args, "teacher", tokenizer, {"held back": ["a", "b"]}), "student")
    want = topk_reverse_kl(logits["student"], logits["teacher"], k=K, reduction="none").double()  # (2, 4)
    counted = [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert sorted(found.worst(9)) == counted and found.teacher_mass is not None
    for at in counted:
        assert (
            float(found.loss[at]) == pytest.approx(float(want[at]), rel=1e-5)
            and found.token(at) == f"·t{ids[at[0], 2 + at[1]]}"
        )


def test_tables_show_the_mass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = distill.table(SCORES, {"teacher": "a | b"}, "why?")
    assert "| full reverse KL, fixed responses | student's mass on S |" in text
    assert "| after, top-K | 1.250 | 1.250 | 1.250 | 1.250 | 0.750 |" in text
    made = {"metrics": distill.METRICS, "rows": distill.ROWS, "held_back": SCORES, "peak_bytes": 1e9, "seconds": 1.0}
    made |= {"options": {"steps": 2, "batch": 1}, "cores": 1, "torch": ""}
    (tmp_path / "demo.json").write_text(json.dumps(made))
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    assert "| after, top-K | 1.250 | 1.250 | 1.250 | 1.250 | 0.750 |" in report.demo("scores")


def test_the_picture_has_a_panel_of_the_mass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(distill.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    distill.plot(SCORES, HISTORY, tmp_path / "x.png")
    left, middle, right = drawn[0].axes
    assert [list(panel.lines[0].get_ydata()) for panel in (left, middle)] == [[1.0, 0.9], [0.6, 0.7]]
    assert (middle.get_ylabel(), right.get_ylabel()) == ("student's mass on S", "nats per token")
    assert len(right.patches) == 2 * len(distill.IN_NATS)

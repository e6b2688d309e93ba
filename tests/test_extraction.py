"""The teacher's top K in a store is what the teacher says of each row alone, and a run that was stopped goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from tests import tiny_teacher
from tests.tiny_models import V, rows, tiny
from topk_rkl.extraction import Extraction, batches, extract, positions, windows
from topk_rkl.loss import teacher_topk, topk_reverse_kl
from topk_rkl.store import Store

K = 8
TOKENIZER = tiny_teacher.tokenizer()
ROWS = [{"input_ids": row["input_ids"]} for row in rows(12)]
MASKED = [row | {"loss_mask": [True] * len(row["input_ids"])} for row in ROWS]

pytestmark = pytest.mark.usefixtures("one_thread")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def alone(model: Any, ids: list[int], temperature: float = 1.0) -> Any:
    with torch.no_grad():
        return teacher_topk(model(torch.tensor([ids])).logits[0] / temperature, K, normalize=True)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("full_logits", [False, True])
def test_each_row_is_what_the_teacher_says_of_it_alone(
    family: str, temperature: float, full_logits: bool, tmp_path: Path
) -> None:
    model = tiny(family)
    options: dict = {"temperature": temperature, "full_logits": full_logits, "dtype": "float32", "batch_tokens": 40}
    store = extract(model, TOKENIZER, ROWS, tmp_path / "store", K, **options)
    assert len(store) == len(ROWS)
    for row, given in zip(store, ROWS):
        want = alone(model, given["input_ids"], temperature)
        assert row.input_ids.tolist() == given["input_ids"] and row.loss_mask is None
        assert torch.equal(row.support.ids, want.ids)
        torch.testing.assert_close(row.support.log_probs, want.log_probs, rtol=1e-5, atol=1e-5)


def test_the_header_says_what_was_read_and_how(tmp_path: Path) -> None:
    given = [row | {"loss_mask": [i % 3 > 0 for i in range(len(row["input_ids"]))]} for row in ROWS]
    store = extract(tiny(), TOKENIZER, given, tmp_path, K, teacher="a tiny one", temperature=0.5)
    header = store.header
    assert (header.k, header.vocab_size, header.teacher, header.temperature) == (K, V, "a tiny one", 0.5)
    assert header.normalized and header.log_probs_dtype == "float16"
    assert header.source.startswith(f"12 rows, {sum(len(row['input_ids']) for row in ROWS)} tokens, sha256 ")
    store.require_tokenizer(TOKENIZER)
    assert [row.loss_mask.tolist() for row in store] == [row["loss_mask"] for row in given]
    assert extract(tiny(), TOKENIZER, ROWS, tmp_path / "named", K).header.teacher == "LlamaForCausalLM"


@pytest.mark.parametrize("calls", [1, 2, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_bytes(calls: int, tmp_path: Path) -> None:
    options: dict = {"shard_mb": 0.001, "batch_tokens": 20}
    whole = extract(tiny(), TOKENIZER, ROWS, tmp_path / "whole", K, **options)
    assert len(whole.shards) > 3

    def stop(*_: Any) -> None:
        seen.append(0)
        if len(seen) > calls + 1:  # the first call is the one that looks at the head
            raise KeyboardInterrupt

    seen: list[int] = []
    model = tiny()
    model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        extract(model, TOKENIZER, ROWS, tmp_path / "stopped", K, **options)
    part = Store(tmp_path / "stopped", partial=True)
    assert len(part) < len(ROWS) and files(tmp_path / "whole").items() >= files(part.folder).items() - {
        ("manifest.json", (part.folder / "manifest.json").read_bytes())
    }
    before = files(part.folder)
    extract(tiny(), TOKENIZER, ROWS, tmp_path / "stopped", K, **options)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert calls < 3 or len(before) > 1


def test_a_whole_store_is_left_as_it_is(tmp_path: Path) -> None:
    extract(tiny(), TOKENIZER, ROWS, tmp_path, K)
    before = files(tmp_path)
    assert len(extract(tiny(seed=1), TOKENIZER, ROWS, tmp_path, K)) == len(ROWS) and files(tmp_path) == before


@pytest.mark.parametrize("change", ["rows", "a mask", "k", "temperature", "dtype", "teacher", "tokenizer"])
def test_other_data_or_options_are_refused_where_a_store_is_there(change: str, tmp_path: Path) -> None:
    given: dict = {
        "tokenizer": TOKENIZER,
        "rows": MASKED,
        "k": K,
        "temperature": 1.0,
        "dtype": "float16",
        "teacher": "t",
    }
    other: dict = {
        "rows": ROWS, "k": K + 1, "temperature": 0.5, "dtype": "float32", "teacher": "u",
        "tokenizer": tiny_teacher.tokenizer(special="<unused>"),
        "a mask": [{**MASKED[0], "loss_mask": [False] * len(MASKED[0]["input_ids"])}, *MASKED[1:]],
    }  # fmt: skip
    extract(tiny(), out=tmp_path, **given)
    before = files(tmp_path)
    name = {"a mask": "source", "rows": "source", "dtype": "log_probs_dtype"}.get(change, change)
    with pytest.raises(ValueError, match=rf"has {name} = .*another folder"):
        extract(tiny(), out=tmp_path, **given | {"rows" if change == "a mask" else change: other[change]})
    assert files(tmp_path) == before


class Bent(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("where", ["the head", "the model"])
def test_logits_that_the_head_alone_does_not_tell_are_made_whole(where: str, tmp_path: Path) -> None:
    model = tiny()
    if where == "the head":
        model.lm_head.__class__ = Bent
    else:
        model.register_forward_hook(lambda *call: CausalLMOutput(logits=2 * call[-1].logits))
    store = extract(model, TOKENIZER, ROWS, tmp_path, K, dtype="float32")
    for row in store:
        want = alone(model, row.input_ids.tolist())
        torch.testing.assert_close(row.support.log_probs, want.log_probs, rtol=1e-5, atol=1e-5)


def test_a_16_bit_teacher_is_read_with_sums_in_float32(tmp_path: Path) -> None:
    model = tiny().bfloat16()
    store = extract(model, TOKENIZER, ROWS, tmp_path, K, dtype="float32")
    with torch.no_grad():
        hidden = model.model(torch.tensor([ROWS[0]["input_ids"]])).last_hidden_state[0].float()
        want = teacher_topk(hidden @ model.lm_head.weight.float().T, K, normalize=True)
    torch.testing.assert_close(store[0].support.log_probs, want.log_probs, rtol=0, atol=1e-4)
    assert (store[0].support.log_probs != store[0].support.log_probs.bfloat16()).any()


def test_windows_and_batches_hold_every_row_once_within_their_tokens() -> None:
    lengths = [5, 3, 9, 1, 1, 12, 4]
    assert list(windows(lengths, 10, 0)) == [range(2), range(2, 4), range(4, 5), range(5, 6), range(6, 7)]
    assert list(windows(lengths, 10, 4)) == list(windows(lengths, 10, 0))[2:]
    assert list(windows(lengths, 10, 7)) == []
    assert list(batches(lengths, 10)) == [[5], [2], [0, 6], [1, 3, 4]]
    assert list(batches([2, 2, 2], 4)) == [[0, 1], [2]]


def test_a_batch_has_no_more_padded_tokens_than_asked_for(tmp_path: Path) -> None:
    shapes: list[torch.Size] = []
    model = tiny()
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    extract(model, TOKENIZER, ROWS, tmp_path, K, batch_tokens=30)
    lengths = [len(row["input_ids"]) for row in ROWS]
    assert max(shape.numel() for shape in shapes) <= 30 and max(len(shape) for shape in shapes) == 2
    assert sum(shape[0] for shape in shapes[1:]) == len(ROWS) and max(shape[1] for shape in shapes) == max(lengths)


def test_a_bar_counts_tokens(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    extract(tiny(), TOKENIZER, ROWS, tmp_path, K, progress=True)
    total = sum(len(row["input_ids"]) for row in ROWS)
    assert f"{total}/{total}" in capsys.readouterr().err


def test_a_teacher_of_nan_is_refused_by_the_row(tmp_path: Path) -> None:
    model = tiny()
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(ValueError, match=r"NaN in rows\[0\]; load it in bfloat16 or float32"):
        extract(model, TOKENIZER, ROWS, tmp_path, K)
    assert len(Store(tmp_path, partial=True)) == 0


REFUSALS = {
    "k 0": ({"k": 0}, "k is 0"),
    "k above V": ({"k": V + 1}, f"k is {V + 1}; it must be between 1 and V = {V}"),
    "dtype": ({"dtype": "int8"}, "dtype is 'int8'; use one of float16, bfloat16, float32"),
    "temperature": ({"temperature": 0.0}, "temperature is 0.0"),
    "batch_tokens": ({"batch_tokens": 0}, "batch_tokens is 0; it must be a positive int"),
    "shard_mb": ({"shard_mb": -1}, "shard_mb is -1; it must be positive"),
    "no rows": ({"rows": []}, "rows is a list of 0 items; it must be a list of at least one row"),
    "rows an iterator": ({"rows": iter(ROWS)}, "rows is a list_iterator; it must be a list"),
    "rows a mapping": ({"rows": ROWS[0]}, "rows is a dict of 1 items"),
    "out": ({"out": 3}, "out is 3; it must be the path of a folder"),
    "rows of text": ({"rows": ["The sea"]}, r"rows\[0\]: a str; it must have input_ids"),
    "another column": ({"rows": [{"text": "The sea"}]}, r"rows\[0\]: a row of text; it must have input_ids"),
    "no ids": ({"rows": [*ROWS, {"input_ids": []}]}, r"rows\[12\]\['input_ids'\] has shape \(0,\)"),
    "ids not ints": ({"rows": [{"input_ids": [1.5]}]}, "dtype float64; it must be"),
    "ids above V": ({"rows": [{"input_ids": [1, V]}]}, rf"rows\[0\]\['input_ids'\] holds {V}; .* 0 to {V - 1}"),
    "ids negative": ({"rows": [{"input_ids": [1, -100]}]}, "holds -100"),
    "a row too long": (
        {"rows": [*ROWS, {"input_ids": [1] * 65}]},
        r"rows\[12\] has 65 tokens and the teacher 64 positions; cut rows to 64 tokens, .* --max-length 64",
    ),
    "mask of other length": ({"rows": [{"input_ids": [1], "loss_mask": [True, False]}]}, r"loss_mask'\] has shape"),
    "mask of ints": ({"rows": [{"input_ids": [1], "loss_mask": [1]}]}, "dtype int64; it must be"),
    "tokenizer": ({"tokenizer": "tiny"}, "tokenizer is 'tiny'; it must have get_vocab"),
    "model": ({"model": "tiny"}, "model is a str; it must be a causal language model"),
    "model without config": ({"model": torch.nn.Linear(2, 2)}, "model has no config with a vocab_size"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_done_is_refused_before_a_folder_is_made(name: str, tmp_path: Path) -> None:
    wrong, message = REFUSALS[name]
    given: dict = {"model": tiny(), "tokenizer": TOKENIZER, "rows": ROWS, "out": tmp_path / "store", "k": K}
    with pytest.raises((TypeError, ValueError), match=message):
        extract(**given | wrong)
    assert not (tmp_path / "store").exists()


def test_a_row_may_have_as_many_tokens_as_the_config_tells(tmp_path: Path) -> None:
    longest = [{"input_ids": [1] * 64}]
    for i, family in enumerate(("llama", "gemma3_text")):
        assert positions(tiny(family).config) == 64
        assert len(extract(tiny(family), TOKENIZER, longest, tmp_path / str(i), K)) == 1
    stretched = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    model = tiny(rope_parameters=stretched)
    assert positions(model.config) is None and positions(PretrainedConfig(vocab_size=V)) is None
    assert len(extract(model, TOKENIZER, [{"input_ids": [1] * 65}], tmp_path / "long", K)) == 1


def test_a_stored_temperature_is_not_applied_again(tmp_path: Path) -> None:
    """The student's logits alone are divided then."""
    teacher, student = tiny(), tiny(seed=1)
    (row,) = extract(teacher, TOKENIZER, ROWS[:1], tmp_path, K, temperature=0.7, dtype="float32")
    with torch.no_grad():
        z, w = (model(row.input_ids[None]).logits[0] for model in (student, teacher))
    found = topk_reverse_kl(z, row.support, temperature=0.7, teacher_temperature=1.0)
    torch.testing.assert_close(found, topk_reverse_kl(z, w, k=K, temperature=0.7), rtol=1e-4, atol=0)
    assert abs(topk_reverse_kl(z, row.support, temperature=0.7) / found - 1) > 0.01


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        extract(tiny(), TOKENIZER, ROWS, tmp_path, K)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_extraction_without_a_model_knows_what_there_is_to_do(tmp_path: Path) -> None:
    extraction = Extraction(ROWS, tmp_path, K, tokenizer=TOKENIZER, teacher="t", vocab_size=V)
    assert extraction.tokens == sum(len(row["input_ids"]) for row in ROWS) and extraction.writer.rows == 0
    assert len(extraction.run(tiny())) == len(ROWS)

"""Promise: stored sets. What is written is read again bit by bit, and what is not whole is refused by its file."""

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.stored import HEADER, V, contents, rows, same, written
from topk_rkl.loss import topk_divergence
from topk_rkl.store import Header, Row, Store, Writer
from topk_rkl.store.files import FORMAT, MANIFEST, shard_metadata
from topk_rkl.support import Support
from topk_rkl.tokenizers import tokenizer_hash

WIDE = replace(HEADER, vocab_size=70_000)
SECOND = "shard-00001.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "set"


@pytest.mark.parametrize("header", [HEADER, WIDE, replace(HEADER, vocab_size=65_535)], ids=["V 50", "70000", "65535"])
@pytest.mark.parametrize("masked", [True, False])
def test_rows_are_read_as_they_were_written(folder: Path, header: Header, masked: bool) -> None:
    made = written(folder, header=header, masked=masked)
    store = Store(folder, check="full")
    assert (len(store), store.header, store.positions) == (12, header, sum(len(row.input_ids) for row in made))
    assert all(same(store[i], row) for i, row in enumerate(made))
    assert all(same(a, b) for a, b in zip(store, made, strict=True))
    assert same(store[-1], made[-1]) and same(store[-12], made[0])
    dtypes = store[0].input_ids.dtype, store[0].support.ids.dtype, store[0].support.log_probs.dtype
    assert dtypes == (torch.int64, torch.int32, torch.float32)
    assert store.bytes == sum(path.stat().st_size for path in folder.glob("shard-*"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_log_probs_are_rounded_to_the_dtype_of_the_header(folder: Path, dtype: str) -> None:
    header = replace(HEADER, log_probs_dtype=dtype)
    made = written(folder, header=header, dtype=torch.float32)
    for stored, row in zip(Store(folder), made, strict=True):
        assert torch.equal(stored.support.log_probs, row.support.log_probs.to(header.dtype).float())
    assert load_file(folder / SECOND)["log_probs"].dtype == header.dtype


@pytest.mark.parametrize(("header", "width"), [(HEADER, 2), (WIDE, 4), (replace(HEADER, vocab_size=65_536), 4)])
def test_ids_take_two_bytes_where_the_vocabulary_allows(folder: Path, header: Header, width: int) -> None:
    written(folder, header=header)
    tensors = load_file(folder / SECOND)
    assert (tensors["ids"].itemsize, tensors["input_ids"].itemsize, tensors["log_probs"].itemsize) == (width, width, 2)


def test_the_largest_id_and_an_empty_slot_are_kept(folder: Path) -> None:
    header = Header(3, 65_535, "t", "h", "s")
    support = Support(torch.tensor([[65_534, -7, 0]]), torch.tensor([[-0.5, -1.0, 0.0]]) - 1)
    with Writer(folder, header) as writer:
        writer.append([Row(torch.tensor([65_534]), support)])
        writer.finish()
    row = Store(folder, check="full")[0]
    assert row.input_ids.tolist() == [65_534] and row.support.ids.tolist() == [[65_534, -1, 0]]
    assert row.support.log_probs.tolist() == [[-1.5, -torch.inf, -1.0]] and row.loss_mask is None


def test_an_empty_slot_may_have_any_id(folder: Path) -> None:
    """Programs leave what was in memory there."""
    support = Support(torch.tensor([[1, V + 7, 2**31 - 1, -9]]), torch.tensor([[-1.0, *[-torch.inf] * 3]]))
    with Writer(folder, HEADER) as writer:
        writer.append([Row(torch.tensor([1]), support)])
        writer.finish()
    assert Store(folder, check="full")[0].support.ids.tolist() == [[1, -1, -1, -1]]


def test_a_row_without_a_mask_beside_others_counts_every_token(folder: Path) -> None:
    first, second = rows(2)
    with Writer(folder, HEADER) as writer:
        writer.append([first, second._replace(loss_mask=None)])
        writer.finish()
    assert Store(folder)[1].loss_mask.tolist() == [True, True]
    assert torch.equal(Store(folder)[0].loss_mask, first.loss_mask)


def test_a_row_has_memory_of_its_own(folder: Path) -> None:
    made = written(folder)
    store, before = Store(folder), contents(folder)
    for x in (store[3].input_ids, *store[3].support.tensors, store[3].loss_mask):
        x.zero_()
    assert same(store[3], made[3]) and contents(folder) == before


def test_logits_are_stored_as_logits(folder: Path) -> None:
    header = replace(HEADER, normalized=False, log_probs_dtype="float32")
    support = Support(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[9.0, 8.0, 7.0, -torch.inf]]), normalized=False)
    with Writer(folder, header) as writer:
        writer.append([Row(torch.tensor([1]), support)])
        writer.finish()
    assert Store(folder)[0].support.as_dict()["teacher_logits"].tolist() == [[9.0, 8.0, 7.0, -torch.inf]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0], ids=["flat", "middling", "one token"])
def test_rounded_log_probs_are_still_those_of_probabilities(folder: Path, dtype: str, spread: float) -> None:
    """With mass="tail", a position whose probabilities add up to more than 1 is NaN; here they add up to all but 1."""
    header = Header(V, V, "t", "h", "s", log_probs_dtype=dtype)
    log_probs, ids = (spread * torch.randn(64, V)).log_softmax(-1).topk(V)
    with Writer(folder, header) as writer:
        writer.append([Row(torch.zeros(64, dtype=torch.long), Support(ids, log_probs))])
        writer.finish()
    z = torch.randn(64, V)
    stored = topk_divergence(z, Store(folder)[0].support, mass="tail", reduction="none")
    exact = topk_divergence(z, Support(ids, log_probs), mass="tail", reduction="none")
    assert stored.isfinite().all()
    torch.testing.assert_close(stored, exact, rtol=0.02, atol=0.1)


def test_a_writer_goes_on_where_another_ended(folder: Path) -> None:
    made = rows(12)
    with Writer(folder, HEADER) as writer:
        assert writer.rows == 0
        writer.append(made[:7])
    with pytest.raises(ValueError, match=r"unfinished, with 7 rows; .*partial=True"):
        Store(folder)
    assert [same(a, b) for a, b in zip(Store(folder, partial=True), made[:7], strict=True)] == [True] * 7
    with Writer(folder, HEADER) as writer:
        assert writer.rows == 7 and not writer.complete
        writer.append(made[7:])
        writer.finish()
    with Writer(folder, HEADER) as writer:
        assert writer.rows == 12 and writer.complete
    assert all(same(a, b) for a, b in zip(Store(folder, check="full"), made, strict=True))


def test_a_store_goes_to_another_process_without_its_data(folder: Path) -> None:
    made = written(folder)
    store = Store(folder)
    again = pickle.loads(pickle.dumps(store))
    assert same(again[7], made[7]) and len(pickle.dumps(store)) < 3_000


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    vocab = options.pop("vocab", {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4})
    backend = Tokenizer(BPE(vocab, options.pop("merges", [("a", "b"), ("b", "c")])))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "c", **options})


def test_a_tokenizer_of_other_ids_is_refused(folder: Path) -> None:
    first = tokenizer_hash(tokenizer())
    written(folder, header=replace(HEADER, tokenizer=first))
    assert len(Store(folder, tokenizer=tokenizer())) == 12
    with pytest.raises(ValueError, match=f"tokenizer has the hash .* and the set in .* {first}; ids mean other tokens"):
        Store(folder, tokenizer=tokenizer(vocab={"a": 0, "b": 1, "c": 2, "ab": 4, "bc": 3}))


def spoilt(text: str) -> Callable[[Path], object]:
    """Rewrites the manifest with `change` of what it says."""

    def spoil(folder: Path) -> None:
        said = json.loads((folder / MANIFEST).read_text())
        exec(text, {"said": said})
        (folder / MANIFEST).write_text(json.dumps(said))

    return spoil


def rewritten(change: Callable[[dict[str, torch.Tensor]], object], index: int = 1, told: bool = True) -> Any:
    """The second shard with other tensors, of which the manifest is told length and hash."""

    def spoil(folder: Path) -> None:
        from topk_rkl.store.files import digest, read_manifest

        tensors = load_file(folder / SECOND)
        change(tensors)
        save_file(tensors, folder / SECOND, shard_metadata(HEADER, index))
        manifest = read_manifest(folder)
        path = folder / SECOND
        manifest.shards[1] = replace(manifest.shards[1], bytes=path.stat().st_size, sha256=digest(path))
        (folder / MANIFEST).write_text(manifest.text())

    return spoil


def truncate(folder: Path) -> None:
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-1])


def swap(folder: Path) -> None:
    """Two shards of one length."""
    first, second = folder / "shard-00000.safetensors", folder / SECOND
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def flip(folder: Path) -> None:
    path = folder / SECOND
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_set(folder: Path) -> None:
    """A shard of a set of another K, under the right name and of the length that the manifest says."""
    written(folder.parent / "other", header=replace(HEADER, k=3))
    data = (folder.parent / "other" / SECOND).read_bytes()
    (folder / SECOND).write_bytes(data)
    spoilt(f"said['shards'][1]['bytes'] = {len(data)}")(folder)


def no_end(folder: Path) -> None:
    """The length is that of the manifest, but the file ends where its header says it goes on."""
    truncate(folder)
    spoilt("said['shards'][1]['bytes'] -= 1")(folder)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json is not there"),
    "no JSON": (lambda f: (f / MANIFEST).write_text("{"), "manifest.json is not JSON"),
    "another manifest": (lambda f: (f / MANIFEST).write_text("{}"), f"manifest.json is not a manifest of {FORMAT}"),
    "a list": (lambda f: (f / MANIFEST).write_text("[]"), f"manifest.json is not a manifest of {FORMAT}"),
    "a later version": (spoilt("said['version'] = 2"), "has version 2 and this package reads 1; update it"),
    "no header": (spoilt("del said['header']"), r"manifest.json is damaged \('header'\)"),
    "a header without k": (spoilt("del said['header']['k']"), "damaged .the header has vocab_size.* must have k"),
    "a wrong k": (spoilt("said['header']['k'] = 0"), "damaged .k is 0; it must be from 1"),
    "complete of no sense": (spoilt("said['complete'] = 'yes'"), "damaged .complete is 'yes'"),
    "a shard of no sense": (spoilt("said['shards'][0]['rows'] = '5'"), "damaged .shard 0 has rows = '5'"),
    "a shard of another name": (spoilt("said['shards'].reverse()"), "shard 0 is called shard-00002"),
    "a shard without a hash": (spoilt("del said['shards'][0]['sha256']"), "damaged .*sha256"),
    "a missing shard": (lambda f: (f / SECOND).unlink(), "shard-00001.safetensors is missing; restore it"),
    "a truncated shard": (truncate, r"shard-00001.safetensors has \d+ bytes and the manifest says \d+; restore"),
    "no end": (no_end, "shard-00001.safetensors is not a whole file of safetensors"),
    "a shard of another K": (other_set, 'shard-00001.safetensors is a shard of another set.*"k.*: 3'),
    "another V": (spoilt("said['header']['vocab_size'] = 49"), "shard-00000.safetensors is a shard of another set"),
    "another tokenizer": (spoilt("said['header']['tokenizer'] = 'x'"), "shard-00000.* is a shard of another set"),
    "a foreign file": (lambda f: (f / "notes.txt").touch(), "notes.txt is no part of a stored set"),
    "a shard too many": (lambda f: (f / "shard-00003.safetensors").touch(), "shard-00003.* is not in the manifest"),
    "two shards swapped": (swap, "shard-0000[01].safetensors is a shard of another set, or of another place in it"),
    "a tensor too few": (rewritten(lambda t: t.pop("ids")), "shard-00001.safetensors holds input_ids"),
    "another dtype": (
        rewritten(lambda t: t.update(ids=t["ids"].int())),
        r"shard-00001.safetensors holds ids as torch.int32 \(\d+, 4\), not \(torch.uint16",
    ),
    "offsets that do not grow": (
        rewritten(lambda t: t["offsets"].__setitem__(2, 0)),
        "shard-00001.safetensors has offsets that do not grow",
    ),
    "offsets that begin late": (rewritten(lambda t: t["offsets"].__setitem__(0, 1)), "offsets that do not grow"),
}
HIDDEN: dict[str, tuple[Callable[[Path], object], str]] = {  # what the full check alone finds
    "a flipped bit": (flip, "shard-00001.safetensors has SHA-256 .* and the manifest says"),
    "an id above V": (
        rewritten(lambda t: t.update(ids=(t["ids"].int() + V).to(torch.uint16))),
        "shard-00001.safetensors has ids out of their bounds, for V = 50",
    ),
    "a token that is empty": (
        rewritten(lambda t: t.update(input_ids=torch.zeros_like(t["input_ids"]))),
        "has input_ids out of their bounds",
    ),
    "an empty slot with a log-prob": (
        rewritten(lambda t: t.update(ids=torch.zeros_like(t["ids"]))),
        "has ids out of their bounds",
    ),
    "a log-prob that is NaN": (
        rewritten(lambda t: t["log_probs"][0].fill_(torch.nan)),
        "has log_probs out of their bounds",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_set_is_refused_by_its_file(folder: Path, name: str) -> None:
    spoil, message = DAMAGES[name]
    made = rows(5)
    with Writer(folder, HEADER) as writer:  # shards of one length
        for _ in range(3):
            writer.append(made)
        writer.finish()
    assert len(Store(folder)) == 15
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Store(folder)


@pytest.mark.parametrize("name", HIDDEN)
def test_the_full_check_reads_every_file(folder: Path, name: str) -> None:
    spoil, message = HIDDEN[name]
    written(folder, 15)
    spoil(folder)
    store = Store(folder)
    for check in (store.check, lambda: Store(folder, check="full")):
        with pytest.raises(ValueError, match=message):
            check()


ONE = torch.tensor([1])
GOOD = Support(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log())
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no list": (Row(ONE, GOOD), r"rows\[0\] is a torch.Tensor; it must be a topk_rkl.store.Row"),
    "a generator": ((x for x in ()), "rows is a generator; it must be a list of rows"),
    "none": ([], "rows is empty"),
    "a plain tuple": ([(ONE, GOOD)], r"rows\[0\] is a tuple"),
    "tokens as a list": ([Row([1], GOOD)], r"rows\[0\].input_ids is a list"),
    "float tokens": ([Row(ONE.float(), GOOD)], r"rows\[0\].input_ids is torch.float32"),
    "no token": ([Row(ONE[:0], GOOD[:0])], r"rows\[0\].input_ids has shape \(0,\)"),
    "a batch": ([Row(ONE[None], GOOD[None])], r"rows\[0\].input_ids has shape \(1, 1\); it must be \(T,\)"),
    "a token above V": ([Row(ONE * V, GOOD)], r"input_ids has ids from 50 to 50; they must be from 0 to 49"),
    "a negative token": ([Row(-ONE, GOOD)], r"input_ids has ids from -1 to -1"),
    "tokens elsewhere": ([Row(ONE.to("meta"), GOOD)], r"input_ids is on meta"),
    "no support": ([Row(ONE, None)], r"rows\[0\].support is a NoneType"),
    "another K": ([Row(ONE, GOOD.each(lambda x: x[:, :3]))], r"support has 3 slots per position and the header k = 4"),
    "no last position": ([Row(ONE.repeat(2), GOOD)], r"support has positions \(1,\); it must have \(T,\) = \(2,\)"),
    "logits": ([Row(ONE, Support(*GOOD.tensors, normalized=False))], "normalized is False and the header's .* True"),
    "an id above V": ([Row(ONE, GOOD.each(lambda x: x.clone() * V))], r"support.ids has 200; ids must be below"),
    "an id that 16 bits wrap": ([Row(ONE, Support(GOOD.ids + 65_536, GOOD.log_probs))], "support.ids has 65540"),
    "NaN": ([Row(ONE, Support(GOOD.ids, GOOD.log_probs * torch.nan))], "log_probs has nan, which float16"),
    "too low": (
        [Row(ONE, GOOD), Row(ONE, Support(GOOD.ids, GOOD.log_probs - 1e5))],
        r"rows\[1\].support.log_probs has -100001, which float16 cannot hold; use a header with",
    ),
    "logits unsaid": ([Row(ONE, Support(GOOD.ids, GOOD.log_probs + 1))], "position 0 has probabilities .* up to 2.72"),
    "a mask of numbers": ([Row(ONE, GOOD, ONE)], r"rows\[0\].loss_mask is torch.int64; use one of bool"),
    "a longer mask": ([Row(ONE, GOOD, torch.ones(2).bool())], r"rows\[0\].loss_mask has shape \(2,\)"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_is_not_as_the_header_says_is_refused_before_anything_is_written(folder: Path, name: str) -> None:
    given, message = BAD_ROWS[name]
    with Writer(folder, HEADER) as writer:
        before = contents(folder)
        with pytest.raises((TypeError, ValueError), match=message):
            writer.append(given)
        assert contents(folder) == before and writer.rows == 0
        writer.append([Row(ONE, GOOD)])  # and the writer goes on


def test_what_refusals_of_rows_advise_works(folder: Path) -> None:
    low = Support(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[-0.1, -1e9, torch.nan, -torch.inf]]))
    emptied = low.without(~(low.log_probs.abs() < 6e4))
    with Writer(folder, HEADER) as writer:
        writer.append([Row(ONE.repeat(2), emptied.pad(2))])
        writer.finish()
    assert Store(folder)[0].support.ids.tolist() == [[1, -1, -1, -1], [-1] * 4]
    with Writer(folder.parent / "wide", replace(HEADER, log_probs_dtype="float32")) as writer:
        writer.append([Row(ONE, Support(low.ids, torch.tensor([[-0.1, -1e9, -2e9, -torch.inf]])))])
        writer.finish()
    assert Store(folder.parent / "wide")[0].support.log_probs[0, 1] == -1e9
    with Writer(folder.parent / "logits", replace(HEADER, normalized=False)) as writer:
        writer.append([Row(ONE, Support(GOOD.ids, GOOD.log_probs + 1, normalized=False))])


def test_an_id_that_stands_twice_is_counted_once(folder: Path) -> None:
    twice = Support(torch.tensor([[1, 1, 2, 3]]), torch.tensor([[0.9, 0.9, 0.05, 0.05]]).log())
    with Writer(folder, HEADER) as writer:
        writer.append([Row(ONE, twice)])
    with Writer(folder, HEADER) as writer, pytest.raises(ValueError, match=r"add up to 1.9"):
        writer.append([Row(ONE, Support(GOOD.ids, twice.log_probs))])


@pytest.mark.parametrize(
    ("field", "other"),
    [("k", 5), ("vocab_size", 51), ("teacher", "b"), ("tokenizer", "b"), ("source", "b"), ("temperature", 2.0),
     ("normalized", False), ("log_probs_dtype", "bfloat16")],
)  # fmt: skip
def test_a_writer_refuses_another_header_by_its_field(folder: Path, field: str, other: Any) -> None:
    written(folder)
    before = contents(folder)
    with pytest.raises(ValueError, match=rf"the set in .* has {field} = .*, and the header given says {other!r}; give"):
        Writer(folder, replace(HEADER, **{field: other}))
    assert contents(folder) == before
    Writer(folder, HEADER).close()  # the lock was let go


def test_a_set_without_rows_takes_another_header(folder: Path) -> None:
    Writer(folder, replace(HEADER, k=7, source="a typing error")).close()
    written(folder)
    assert Store(folder, check="full").header == HEADER


def test_hidden_files_are_left_alone(folder: Path) -> None:
    """Those of a file system, or of a program that has copied the set."""
    folder.mkdir()
    for name in (".nfs0001", ".gitattributes"):
        (folder / name).touch()
    (folder / ".cache").mkdir()
    made = written(folder)
    assert same(Store(folder, check="full")[3], made[3]) and (folder / ".nfs0001").exists()


def test_a_full_disk_loses_no_stored_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    made = rows(12)
    with Writer(folder, HEADER) as writer:
        writer.append(made[:5])
        before = contents(folder)
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(OSError, match=rf"{SECOND} cannot be written, No space left on device; make room"):
                writer.append(made[5:])
        assert contents(folder) == before and writer.rows == 5
        writer.append(made[5:])
        writer.finish()
    assert all(same(a, b) for a, b in zip(Store(folder, check="full"), made, strict=True))


def test_a_file_system_without_locks_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(OSError, match="cannot be locked, No locks available; write to a local disk, and copy"):
        Writer(folder, HEADER)
    assert not (folder / MANIFEST).exists()
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", lambda *_: None)
        written(folder.parent / "local")
    shutil.copytree(folder.parent / "local", folder, dirs_exist_ok=True)
    assert len(Store(folder)) == 12  # reading needs no lock


def test_a_writer_refuses_a_folder_that_is_not_its_own(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"thesis.tex is no part of a stored set; give a folder of the set's own"):
        Writer(folder, HEADER)
    assert contents(folder) == {"thesis.tex": b""}
    with pytest.raises(ValueError, match=r"thesis.tex, a file; give a folder"):
        Writer(folder / "thesis.tex", HEADER)
    for given in (None, 3, b"x"):
        with pytest.raises(TypeError, match=r"folder is .*; it must be a path"):
            Writer(given, HEADER)
        with pytest.raises(TypeError, match=r"folder is .*; it must be a path"):
            Store(given)
    with pytest.raises(TypeError, match=r"header is a dict; it must be a topk_rkl.store.Header"):
        Writer(folder, HEADER.as_dict())


def test_a_writer_refuses_shards_without_a_manifest_and_damaged_ones(folder: Path) -> None:
    written(folder)
    (folder / SECOND).write_bytes(b"short")
    with pytest.raises(ValueError, match=r"shard-00001.safetensors has 5 bytes"):
        Writer(folder, HEADER)
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"has shard-00000.safetensors and no manifest.json; restore the manifest"):
        Writer(folder, HEADER)


def test_a_writer_says_when_it_is_done(folder: Path) -> None:
    made = written(folder)
    with Writer(folder, HEADER) as writer, pytest.raises(RuntimeError, match="complete; write further rows to another"):
        writer.append(made)
    with pytest.raises(RuntimeError, match=r"closed; make another: Writer\(folder, header\)"):
        writer.append(made)
    with pytest.raises(RuntimeError, match="closed"):
        writer.finish()
    with (
        Writer(folder.parent / "empty", HEADER) as writer,
        pytest.raises(RuntimeError, match="has no rows; append some"),
    ):
        writer.finish()


def test_an_index_is_an_int_within_the_set(folder: Path) -> None:
    written(folder)
    store = Store(folder)
    for index in (12, -13):
        with pytest.raises(IndexError, match=rf"index is {index}; the set in .* has 12 rows"):
            store[index]
    with pytest.raises(TypeError, match="index is slice"):
        store[0:2]
    with pytest.raises(ValueError, match="check is 'some'; use one of fast, full"):
        Store(folder, check="some")
    with pytest.raises(TypeError, match="partial is 1; it must be True or False"):
        Store(folder, partial=1)


def test_what_is_not_installed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    for call in (lambda: Writer(folder, HEADER), lambda: Store(folder)):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'topk-rkl\[store\]'"):
            call()
    assert not folder.exists()

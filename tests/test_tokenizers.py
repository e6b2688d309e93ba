"""Tokenizers are told apart by what their tokens spell, and the report's code puts one's ids into the other's."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from topk_rkl.loss import Support, teacher_topk
from topk_rkl.recipe.builders import remap
from topk_rkl.recipe.weighting import special_token_mask
from topk_rkl.tokenizers import PROBE, TokenizerReport, check_tokenizers, tokenizer_hash
from topk_rkl.vocabulary import BYTES, Vocabulary

PAGE = (Path(__file__).parent.parent / "docs" / "tokenizers.md").read_text()
LETTERS = {byte: chr(letter) for letter, byte in BYTES.items()}  # of GPT-2
PAIRS = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("i", "n"), ("in", "g")]
TOKENS = [LETTERS[byte] for byte in range(256)] + ["".join(pair) for pair in PAIRS]
NAMES = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
V = len(TOKENS) + len(NAMES)  # 265: 256 bytes, " t" to " the", "in" and "ing", and 261 to 264
BOS, EOS, IM_START, IM_END = range(len(TOKENS), V)
A, B = ord("a"), ord("b")


def fast(backend: Tokenizer, names: tuple[str, ...] = NAMES, **roles: str) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(list(names))
    roles = {"bos_token": names[0], "eos_token": names[1], **roles}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def byte_level(
    tokens: list[str] = TOKENS, names: tuple[str, ...] = NAMES, pairs: Any = PAIRS, **roles: str
) -> PreTrainedTokenizerFast:
    """As GPT-2's: the tokens have the ids 0, 1, ..., and the names those that follow."""
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return fast(backend, names, **roles)


def sentencepiece(extra: tuple[str, ...] = (), order: Any = None, **roles: str) -> PreTrainedTokenizerFast:
    """The same tokens as Llama writes them: bytes that are no ASCII character are pieces such as <0xE9>."""
    tokens = [piece(token) for token in (*TOKENS, *extra)]
    tokens = tokens if order is None else [tokens[i] for i in order]
    pairs = [(piece(a), piece(b)) for a, b in PAIRS]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    return fast(backend, **roles)


def piece(token: str) -> str:
    spelled = bytes(BYTES.get(ord(letter), 0) for letter in token)
    if token.startswith("<0x"):
        return token
    return f"<0x{spelled[0]:02X}>" if spelled[0] > 127 else spelled.decode().replace(" ", "▁")


def word_level(*words: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("[UNK]", *words))}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def follow(report: TokenizerReport, teacher_logits: torch.Tensor, k: int = 2, ids: Any = (0,)) -> SimpleNamespace:
    """What the report's code, as `str` prints it, makes of the teacher's logits and the student's ids."""
    printed = re.findall(r"^    (.*)", str(report), re.MULTILINE)
    assert "\n".join(printed) == report.code
    ids = torch.tensor([list(ids)])
    scope = {
        "report": report, "teacher_logits": teacher_logits, "k": k, "support": teacher_topk(teacher_logits, k),
        "weights": torch.ones(ids.shape), "response_ids": ids, "input_ids": ids, "teacher_input_ids": ids,
        "teacher_topk": teacher_topk, "remap": remap, "special_token_mask": special_token_mask,
    }  # fmt: skip
    exec(report.code, scope)
    return SimpleNamespace(**scope)


def logits(size: int, *best: int) -> torch.Tensor:
    """(size,) with the highest at the given ids, in their order."""
    made = torch.zeros(size)
    made[list(best)] = torch.arange(len(best), 0, -1).float()
    return made


def test_a_tokenizer_is_the_same_as_itself() -> None:
    report = check_tokenizers(byte_level(), byte_level())
    assert report.verdict == "same" and report.same and report.common == report.cut_alike == 1
    assert report.mapping == {} and report.special_ids == [] and report.code == "" and report.probed == len(PROBE)
    assert report.to_student == report.to_teacher == {i: i for i in range(V)}
    assert torch.equal(report.table(), torch.arange(V))
    assert str(report).endswith("What to do: nothing. Ids can be compared as they are.")
    report.require()


def test_padded_logits_are_counted_and_cut() -> None:
    report = check_tokenizers(byte_level(), byte_level(), student_vocab=V, teacher_vocab=V + 15)
    assert report.same and (report.teacher.logits, report.teacher.end) == (V + 15, V)
    assert "280 logits, the last 15 of no token" in str(report)
    assert report.code == "support = teacher_topk(teacher_logits[..., :265], k)"
    assert follow(report, logits(V + 15, 270, 5, 9)).support.ids.tolist() == [5, 9]


def test_a_base_and_an_instruct_model_end_with_two_tokens() -> None:
    report = check_tokenizers(byte_level(), byte_level(eos_token="<|im_end|>"))
    assert report.verdict == "same but for special tokens" and not report.same
    assert report.renamed == {"eos": (EOS, IM_END)} and report.special_ids == [EOS, IM_END]
    assert report.mapping == {} and f"- eos: '</s>' ({EOS}), teacher '<|im_end|>' ({IM_END})" in str(report)
    assert follow(report, logits(V, 3), ids=[A, EOS, IM_END, B, EOS]).weights.tolist() == [[1, 0, 0, 1, 0]]


def test_a_special_token_of_another_name_is_known_by_its_role() -> None:
    names = ("<s>", "<|end|>", "<|im_start|>", "<|im_end|>")
    report = check_tokenizers(byte_level(), byte_level(names=names))
    assert report.verdict == "same but for special tokens" and report.common == (V - 1) / V
    assert report.mapping == {} and report.special_ids == [EOS] and report.clashes == [EOS]
    assert report.to_student[EOS] == report.to_teacher[EOS] == EOS

    swapped = check_tokenizers(
        byte_level(), byte_level(names=("<|end|>", *NAMES), bos_token="<s>", eos_token="<|end|>")
    )
    assert swapped.mapping == {BOS: EOS, EOS: BOS, EOS + 1: EOS, IM_END: IM_START, V: IM_END}
    done = follow(swapped, logits(V + 1, BOS, V, A), k=3, ids=[BOS, IM_END, A])
    assert done.support.ids.tolist() == [EOS, IM_END, A]
    assert done.teacher_input_ids.tolist() == [[EOS, V, A]]


def test_a_special_token_that_one_side_lacks_is_left_out() -> None:
    names = ("<s>", "</s>", "<|one|>", "<|im_end|>")
    report = check_tokenizers(byte_level(), byte_level(names=names), student_vocab=V + 3)
    assert report.verdict == "same but for special tokens" and report.renamed == {}
    assert report.student_lacks == report.teacher_lacks == report.clashes == [IM_START]
    assert report.mapping == {IM_START: -1} and report.special_ids == [IM_START]
    assert f"ids of two meanings (1): {IM_START} ('<|im_start|>', teacher '<|one|>')" in str(report)
    assert follow(report, logits(V, IM_START, A)).support.ids.tolist() == [-1, A]


def test_an_added_marker_is_special_and_an_added_word_is_not() -> None:
    marked, worded = byte_level(), byte_level()
    marked.add_tokens(["<think>"])
    worded.add_tokens(["quark"])
    report = check_tokenizers(byte_level(), marked)
    assert report.verdict == "same but for special tokens" and report.mapping == {V: -1}
    report = check_tokenizers(byte_level(), worded)
    assert report.verdict == "remap" and report.mapping == {V: -1} and report.special_ids == []
    assert check_tokenizers(worded, byte_level()).verdict == "remap"
    assert check_tokenizers(byte_level(), worded, probe=["a quark"]).verdict == "different"


def test_a_token_that_is_special_on_one_side_is_special() -> None:
    added, trained = word_level("a", "b", "c"), word_level("a", "b", "c", "unused", "<think>")
    added.add_tokens(["<think>", "unused"])
    for pair in ((added, trained), (trained, added)):
        report = check_tokenizers(*pair, probe=["a b"])
        assert report.verdict == "remap" and sorted(report.moved) == sorted([(4, 5), (5, 4)])
        assert report.special_ids == [pair[0].get_vocab()["<think>"]]
    added, trained = word_level("a", "b"), word_level("a", "b", "<|0|>", "<think>")
    added.add_tokens(["<think>", "<|0|>"])
    for pair in ((added, trained), (trained, added)):
        assert check_tokenizers(*pair, probe=["a b"]).verdict == "same but for special tokens"


def test_a_token_with_a_role_is_special_however_it_came_to_be() -> None:
    student, teacher = (NoIds({"a": 0, "None": 1, name: 2}) for name in ("END", "STOP"))
    student.eos_token, teacher.eos_token = "END", "STOP"
    student.encode = teacher.encode = lambda *_, **__: [0]
    report = check_tokenizers(student, teacher)
    assert report.verdict == "same but for special tokens" and report.special_ids == [2]
    assert report.student.roles == {"eos": 2} and report.student.special == {2}
    student.eos_token = teacher.eos_token = None
    assert check_tokenizers(student, teacher).verdict == "remap"


def test_an_added_token_is_written_as_text() -> None:
    student, teacher = byte_level(), sentencepiece()
    student.add_tokens(["é à", "   "])
    teacher.add_tokens(["é▁à", "▁▁▁"])
    report = check_tokenizers(student, teacher)
    assert report.student.spelled[V] == report.teacher.spelled[V] == "é à".encode()
    assert report.student.spelled[V + 1] == report.teacher.spelled[V + 1] == b"   "


def test_one_string_may_spell_two_tokens() -> None:
    student = Tokenizer(models.WordLevel({"a": 0, "Ġa": 1, "Ġb": 2}))
    teacher = Tokenizer(models.WordLevel({"a": 0, "Ġa": 1, "▁b": 2, "▁a": 3, "▁c": 4}))
    report = check_tokenizers(student, teacher, probe=["a"])
    assert report.teacher.spelled[1] == "Ġa".encode() and report.student.spelled[1] == b" a"
    assert report.to_student == {0: 0, 1: -1, 2: 2, 3: 1, 4: -1} and report.clashes == [1]


def test_permuted_ids_are_mapped_both_ways() -> None:
    report = check_tokenizers(byte_level(), byte_level(TOKENS[::-1]), student_vocab=V)
    assert report.verdict == "remap" and report.cut_alike == report.common == 1 and report.special_ids == []
    assert report.mapping == {t: 260 - t for t in range(261) if t != 130} and len(report.moved) == 260
    done = follow(report, logits(V, 260 - A, EOS, 260 - B), k=3, ids=[A, 130, EOS, -100])
    assert done.support.ids.tolist() == [A, EOS, B]
    assert done.teacher_input_ids.tolist() == [[260 - A, 130, EOS, -1]]
    assert "report.table(support.device)" in report.code
    by_dict = remap(Support(torch.tensor([[7, EOS]]), torch.zeros(1, 2)), report.mapping)
    assert by_dict.ids.tolist() == [[253, EOS]]


def test_few_ids_are_spelled_out() -> None:
    swapped = TOKENS.copy()
    swapped[A], swapped[B] = swapped[B], swapped[A]
    report = check_tokenizers(byte_level(), byte_level(swapped))
    assert report.code.splitlines()[1] == f"support = remap(support, {{{A}: {B}, {B}: {A}}}, student_vocab={V})"


def test_two_spellings_of_one_vocabulary_are_the_same() -> None:
    report = check_tokenizers(byte_level(), sentencepiece())
    assert (report.student.spelling, report.teacher.spelling) == ("byte-level", "sentencepiece")
    assert report.student.strings[258] == "Ġthe" and report.teacher.strings[258] == "▁the"
    assert report.student.spelled == report.teacher.spelled and report.student.spelled[258] == b" the"
    assert report.verdict == "same"
    report = check_tokenizers(byte_level(), sentencepiece(order=range(260, -1, -1)))
    assert report.verdict == "remap" and report.mapping == {t: 260 - t for t in range(261) if t != 130}


def test_a_space_before_the_text_is_another_cut() -> None:
    teacher = sentencepiece()
    teacher.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    report = check_tokenizers(byte_level(), teacher)
    assert report.verdict == "different" and report.common == 1 and report.cut_alike == 0
    assert report.code == "" and "texts: 0 of 8 are cut alike" in str(report)
    assert "What to do: do not compare ids." in str(report)


def test_ids_that_spell_the_same_are_told() -> None:
    teacher = sentencepiece(extra=("<0x61>", "<0x0A>"))
    report = check_tokenizers(byte_level(), teacher)
    assert report.teacher.merged == [[10, 262], [A, 261]] and report.student.merged == []
    assert "2 spellings of several ids" in str(report)
    assert report.mapping[261] == A and report.mapping[262] == 10  # their probabilities are added
    twice = check_tokenizers(teacher, byte_level(), student_vocab=263, teacher_vocab=261)
    assert twice.verdict == "remap" and twice.moved == [(261, A), (262, 10)] and twice.mapping == {}
    assert follow(twice, logits(261, 4), ids=[261, A]).teacher_input_ids.tolist() == [[A, A]]
    assert report.student.fragments == list(range(128, 256)) and "128 parts of characters" in str(report)


def test_of_several_ids_that_spell_the_same_the_first_is_taken() -> None:
    student = sentencepiece(extra=("<0x20>",))
    assert student.get_vocab()["▁"] == 32 and student.get_vocab()["<0x20>"] == 261
    assert check_tokenizers(student, byte_level()).to_student[32] == 32
    assert check_tokenizers(student, byte_level(TOKENS[::-1])).to_student[260 - 32] == 32
    swapped = sentencepiece(extra=("<0x20>",), order=[*range(32), 261, *range(33, 261), 32])  # "▁" is 261
    assert check_tokenizers(swapped, byte_level()).to_student[32] == 32
    unequal = check_tokenizers(swapped, byte_level(TOKENS[:32] + TOKENS[33:] + ["Ġ"]))
    assert unequal.to_student[260] == 32


def test_texts_may_be_cut_differently_by_one_vocabulary() -> None:
    report = check_tokenizers(byte_level(), byte_level(pairs=PAIRS[:3]), probe=["at home", "singing", "the"])
    assert report.verdict == "different" and report.clashes == [] and report.moved == []
    assert report.cut_differently == ["singing"] and report.cut_alike == pytest.approx(2 / 3)
    assert "texts: 2 of 3 are cut alike" in str(report) and "- cut differently (1): 'singing'" in str(report)


def test_a_vocabulary_of_other_words_is_different() -> None:
    student, teacher = word_level("the", "fox", "jumps"), word_level("the", "der", "Fuchs", "springt", "hoch")
    report = check_tokenizers(student, teacher, probe=["the"])
    assert report.cut_alike == 1 and report.common == pytest.approx(2 / 6) and report.verdict == "different"
    assert str(report).startswith("Verdict: different. The student has 2 of the teacher's 6 tokens.")
    assert check_tokenizers(word_level("a", "b"), word_level("a", "c"), probe=["a", "q"]).verdict == "remap"


def test_an_id_that_only_the_student_uses_is_left_out() -> None:
    student, teacher = byte_level(), byte_level(names=NAMES[:3])
    report = check_tokenizers(student, teacher, student_vocab=V, teacher_vocab=V)
    assert report.mapping == {IM_END: -1} and report.special_ids == [IM_END]
    assert follow(report, logits(V, IM_END, A)).support.ids.tolist() == [A, 0]
    done = follow(report, logits(V, IM_END, A), ids=[IM_END, A])
    assert done.teacher_input_ids.tolist() == [[-1, A]] and done.readable.tolist() == [False]


def test_an_id_that_only_the_teacher_uses_is_not_read() -> None:
    report = check_tokenizers(byte_level(names=NAMES[:3]), byte_level(), student_vocab=V + 2, teacher_vocab=V + 1)
    assert report.teacher_ids(torch.tensor([A, IM_END, V, V + 1])).tolist() == [A, -1, V, -1]


def test_two_strings_of_one_id_both_have_a_logit() -> None:
    plain = NoIds({"a": 0, "b": 1, "c": 1, "d": 2})
    plain.encode = lambda *_, **__: [0]
    report = check_tokenizers(plain, plain, student_vocab=2)
    assert (report.student.beyond, report.teacher.beyond) == (1, 0)


def test_tokens_without_a_logit_are_counted_and_left_out() -> None:
    report = check_tokenizers(byte_level(), byte_level(), student_vocab=V - 1, teacher_vocab=V - 1)
    assert report.same and report.student.beyond == 1 and IM_END not in report.student.strings
    assert "264 logits; 1 more without a logit" in str(report)


def test_the_markers_of_chat_templates_are_compared() -> None:
    student, teacher = byte_level(), byte_level()
    teacher.chat_template = "<|im_start|>{{ messages[0].content }}<|im_end|>"
    assert check_tokenizers(student, teacher).same
    student.chat_template = "{{ messages[0].content }}<|im_end|>"
    report = check_tokenizers(student, teacher)
    assert report.verdict == "same but for special tokens" and report.markers == ["<|im_start|>"]
    assert report.special_ids == [IM_START] and "- in one chat template only (1): '<|im_start|>'" in str(report)
    student.chat_template = "Answer: " + teacher.chat_template
    assert check_tokenizers(student, teacher).same
    other = byte_level(names=(*NAMES, "<|user|>"))
    other.chat_template = teacher.chat_template + "<|user|>"
    report = check_tokenizers(student, other)
    assert report.markers == ["<|user|>"] and report.special_ids == []  # the student has no such id


def test_padding_is_read_and_not_compared() -> None:
    student, teacher = byte_level(pad_token="</s>"), byte_level(pad_token="<|im_end|>")
    assert check_tokenizers(student, teacher).same
    padded = byte_level(names=(*NAMES, "<pad>"), pad_token="<pad>")
    for other, there in ((teacher, IM_END), (byte_level(), 0)):
        report = check_tokenizers(padded, other)
        assert report.to_teacher[V] == -1 and report.teacher_ids(torch.tensor([V, A])).tolist() == [there, A]
        assert "teacher_ids(" in report.code and "readable" not in report.code


def test_what_require_advises_is_followed() -> None:
    report = check_tokenizers(byte_level(), byte_level(eos_token="<|im_end|>"))
    with pytest.raises(
        ValueError, match=r"'same but for special tokens', but must be 'same'.*then require\('same but"
    ) as e:
        report.require()
    assert str(report) in str(e.value)
    report.require("same but for special tokens")
    report.require("remap")
    with pytest.raises(ValueError, match="worst is 'best'; use one of same, same but for special tokens, remap, diff"):
        report.require("best")
    with pytest.raises(ValueError, match=r"'different', but must be 'remap'; compare texts, or take a teacher with"):
        check_tokenizers(byte_level(), word_level("a")).require("remap")


def test_ids_for_the_teacher_are_a_tensor() -> None:
    report = check_tokenizers(byte_level(), byte_level())
    with pytest.raises(TypeError, match=r"ids is a list; it must be a torch.Tensor"):
        report.teacher_ids([1])
    assert report.teacher_ids(torch.tensor([[1, V]], dtype=torch.int32)).dtype == torch.int32


def test_a_tokenizer_of_tokenizers_and_a_slow_one_will_do() -> None:
    plain = byte_level().backend_tokenizer
    assert check_tokenizers(byte_level(), plain).same and check_tokenizers(plain, byte_level()).same
    slow = ByT5Tokenizer()
    assert check_tokenizers(slow, ByT5Tokenizer()).same
    report = check_tokenizers(slow, ByT5Tokenizer(extra_ids=3), student_vocab=384, teacher_vocab=384)
    assert report.verdict == "same but for special tokens" and len(report.teacher_lacks) == 122


def test_more_special_ids_than_can_be_read_are_taken_from_the_report() -> None:
    reserved = tuple(f"<|reserved_{i}|>" for i in range(20))
    report = check_tokenizers(byte_level(names=(*NAMES, *reserved)), byte_level())
    assert report.special_ids == list(range(V, V + 20)) and "report.special_ids" in report.code
    assert follow(report, logits(V, 3), ids=[A, V, V]).weights.tolist() == [[1, 0, 0]]


def test_a_report_is_printed_in_short_by_repr() -> None:
    report = check_tokenizers(byte_level(), sentencepiece())
    assert repr(report) == (
        "TokenizerReport('same', student=Vocabulary(265 tokens, 265 logits, byte-level), "
        "teacher=Vocabulary(265 tokens, 265 logits, sentencepiece))"
    )


def test_the_hash_is_of_the_tokens_with_their_ids(tmp_path: Path) -> None:
    base = tokenizer_hash(byte_level())
    assert re.fullmatch("[0-9a-f]{64}", base) and tokenizer_hash(byte_level()) == base

    used = byte_level(pad_token="</s>", eos_token="<|im_end|>")
    used.chat_template, used.padding_side = "{{ messages }}", "left"
    used(["a", "the fox"], padding=True, truncation=True, max_length=2)
    used.save_pretrained(tmp_path)
    cut = byte_level()
    cut.backend_tokenizer.normalizer = normalizers.NFC()
    merged = byte_level(pairs=PAIRS[:4])  # of the same tokens
    for same in (merged, used, used.backend_tokenizer, AutoTokenizer.from_pretrained(tmp_path), cut):
        assert tokenizer_hash(same) == base

    added = byte_level()
    added.add_tokens(["<think>"])
    others = byte_level(TOKENS[::-1]), byte_level(names=(*NAMES[:3], "<|end|>")), added
    slow = ByT5Tokenizer(), ByT5Tokenizer(extra_ids=3)
    assert len({base, *map(tokenizer_hash, (*others, *slow))}) == 6


def test_the_hash_is_that_of_every_process(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    code = (
        "import sys; from tokenizers import Tokenizer; from topk_rkl.tokenizers import tokenizer_hash; "
        "print(tokenizer_hash(Tokenizer.from_file(sys.argv[1])))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tokenizer.json")],
        env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == tokenizer_hash(byte_level())


class NoIds:
    def __init__(self, ids: object) -> None:
        self.ids, self.eos_token = ids, None

    def get_vocab(self) -> object:
        return self.ids

    def encode(self, *_: object, **__: object) -> list[int]:
        raise AssertionError("it was asked to cut a text")


REFUSALS = {
    "a name": (lambda: check_tokenizers("gpt2", byte_level()), TypeError, "student is 'gpt2'; it must have get_vocab"),
    "a class": (lambda: check_tokenizers(byte_level(), ByT5Tokenizer), TypeError, "teacher is <class .*ByT5Tokenizer"),
    "None": (lambda: tokenizer_hash(None), TypeError, "tokenizer is a NoneType; it must have get_vocab"),
    "a processor": (
        lambda: check_tokenizers(byte_level(), SimpleNamespace(tokenizer=byte_level())),
        TypeError,
        "teacher is a types.SimpleNamespace; pass teacher.tokenizer",
    ),
    "no token": (lambda: check_tokenizers(NoIds({}), byte_level()), ValueError, r"student.get_vocab\(\) gives no ids"),
    "ids of bytes": (lambda: tokenizer_hash(NoIds({b"a": 1})), ValueError, r"tokenizer.get_vocab\(\).*from tokens to"),
    "a list of tokens": (lambda: tokenizer_hash(NoIds(["a"])), ValueError, r"it must be a dict from tokens to ids"),
    "student_vocab 0": (
        lambda: check_tokenizers(byte_level(), byte_level(), student_vocab=0),
        ValueError,
        "student_vocab is 0; it must be a positive int",
    ),
    "teacher_vocab a float": (
        lambda: check_tokenizers(byte_level(), byte_level(), teacher_vocab=3.0),
        TypeError,
        "teacher_vocab is 3.0; it must be an int",
    ),
    "no token below V": (
        lambda: check_tokenizers(NoIds({"a": 7}), byte_level(), student_vocab=7),
        ValueError,
        "student_vocab is 7, and no token of student has an id below",
    ),
    "probe a text": (
        lambda: check_tokenizers(NoIds({"a": 0}), NoIds({"a": 0}), probe="text"),
        TypeError,
        "probe is a str; it must be a list of texts",
    ),
    "probe empty": (
        lambda: check_tokenizers(NoIds({"a": 0}), NoIds({"a": 0}), probe=[]),
        ValueError,
        "probe is empty; it must hold at least one of the texts",
    ),
    "probe of ids": (
        lambda: check_tokenizers(NoIds({"a": 0}), NoIds({"a": 0}), probe=["a", 7]),
        TypeError,
        r"probe\[1\] is 7; it must be a str",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name: str) -> None:
    call, kind, message = REFUSALS[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_processor_s_tokenizer_is_taken_as_the_message_says() -> None:
    processor = SimpleNamespace(tokenizer=byte_level())
    assert check_tokenizers(byte_level(), processor.tokenizer).same


def test_the_letters_of_bytes_are_those_of_tokenizers() -> None:
    assert sorted(map(chr, BYTES)) == sorted(pre_tokenizers.ByteLevel.alphabet()) and sorted(BYTES.values()) == [
        *range(256)
    ]
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((written, _),) = encoder.pre_tokenize_str("a é\n€")
    assert written.translate(BYTES).encode("latin-1").decode() == "a é\n€"


@pytest.mark.xdist_group("smollm2")
@pytest.mark.slow
def test_the_tokenizer_of_smollm2(loaded: Any) -> None:
    tokenizer = loaded[1]
    base = copy.deepcopy(tokenizer)
    base.eos_token = "<|endoftext|>"
    report = check_tokenizers(base, tokenizer, student_vocab=49152, teacher_vocab=49280)
    assert report.verdict == "same but for special tokens" and report.special_ids == [0, 2]
    assert report.renamed["eos"] == (0, 2) and report.teacher.spelled[260] == tokenizer.decode([260]).encode()
    sure = [i for i, x in report.teacher.spelled.items() if i not in report.teacher.special]
    texts = tokenizer.batch_decode([[i] for i in sure], clean_up_tokenization_spaces=False)
    assert [report.teacher.spelled[i].decode(errors="replace") for i in sure] == texts
    assert len(report.teacher.fragments) == sum("�" in text for text in texts)
    assert tokenizer_hash(base) == tokenizer_hash(tokenizer)


def test_the_page_shows_what_is_printed() -> None:
    code, output = re.findall(r"^```(?:python|text)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[:2]
    teacher = byte_level(names=(*NAMES, "<think>"), eos_token="<|im_end|>")
    models_ = {name: SimpleNamespace(config=SimpleNamespace(vocab_size=size)) for name, size in (("s", V), ("t", 272))}
    scope = {
        "student_tokenizer": byte_level(), "teacher_tokenizer": teacher, "student": models_["s"],
        "teacher": models_["t"], "print": lambda report: printed.append(str(report)),
    }  # fmt: skip
    printed: list[str] = []
    exec(code, scope)
    assert printed == [output.rstrip("\n")]
    assert isinstance(scope["report"].student, Vocabulary)

"""Whether teacher and student give the same ids to the same tokens, and what to do where they do not.

report = check_tokenizers(student_tokenizer, teacher_tokenizer, student_vocab=49152, teacher_vocab=49280)
print(report)
report.require()

A tokenizer is any object with `get_vocab` and `encode`, as those of transformers and of tokenizers have.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.vocabulary import Vocabulary, read_vocabulary, tokenizer_hash

__all__ = ["TokenizerReport", "Verdict", "Vocabulary", "check_tokenizers", "tokenizer_hash"]

Verdict = Literal["same", "same but for special tokens", "remap", "different"]
PROBE = (
    "The quick brown fox doesn't jump over 1234567 lazy dogs.",
    "def mean(x):\n    return sum(x) / len(x)  # of a list\n\n\tif __name__ == '__main__': pass\n",
    "Let $x^2 + 3x = 10$; then \\boxed{x = 2} or x = -5.0e-3.",
    "  two spaces before, three   within, and one after ",
    "Déjà vu à Zürich, naïve façade, Привет мир, γειά σου",  # noqa: RUF001
    "你好，世界。こんにちは 안녕하세요 مرحبا नमस्ते",  # noqa: RUF001
    "👩‍💻 costs €5 → 🚀…",
    "https://example.org/a_b?c=1&d=%20#CamelCaseAndSNAKE_CASE",
)
COMMON = 0.5  # the share of the teacher's tokens below which the vocabularies are different
NAMED = 3  # of each list, in the text
WRITTEN = 16  # ids, at most, in the code; more are read from the report


@dataclass(frozen=True, eq=False, repr=False)
class TokenizerReport:
    """What `check_tokenizers` found. `print(report)` tells what is the same, what differs and what to do."""

    student: Vocabulary
    teacher: Vocabulary
    to_student: dict[int, int]
    """The student's id of each of the teacher's tokens; -1 where the student has no such token."""
    to_teacher: dict[int, int]
    """The teacher's id of each of the student's tokens; -1 where the teacher has no such token."""
    renamed: dict[str, tuple[int, int]]
    """The roles, of bos, eos and unk, that the two give to different tokens: the ids of student and teacher."""
    probed: int
    """The number of texts that both cut into tokens."""
    cut_differently: list[str]
    """The texts that the two cut into different tokens."""

    def __repr__(self) -> str:
        return f"TokenizerReport({self.verdict!r}, student={self.student}, teacher={self.teacher})"

    def __str__(self) -> str:
        return "\n".join(_text(self))

    @cached_property
    def verdict(self) -> Verdict:
        """How far ids may be compared, from the best to the worst.

        - "same": as they are. The numbers of logits may differ, and so may the tokens of padding.
        - "same but for special tokens": as they are, where special tokens are mapped or masked.
        - "remap": after the teacher's ids are mapped. Other tokens have two ids, or are missing on one side.
        - "different": not at all. A text is cut differently, or most tokens of the teacher are not the student's.
        """
        if self.common < COMMON or self.cut_differently:
            return "different"
        special_moved = all(self._is_special(*pair) for pair in self.moved)
        mine, theirs = self.student.special, self.teacher.special
        if not (special_moved and theirs.issuperset(self.student_lacks) and mine.issuperset(self.teacher_lacks)):
            return "remap"
        if any((self.moved, self.student_lacks, self.teacher_lacks, self.renamed, self.markers)):
            return "same but for special tokens"
        return "same"

    def _is_special(self, s: int, t: int) -> bool:
        return s in self.student.special or t in self.teacher.special

    @property
    def same(self) -> bool:
        """Whether ids can be compared as they are."""
        return self.verdict == "same"

    @property
    def common(self) -> float:
        """The share of the teacher's tokens that the student has, under whatever id."""
        return self.shared / len(self.teacher.strings)

    @cached_property
    def shared(self) -> int:
        """The number of the teacher's tokens that the student has, under whatever id."""
        return sum(spelled in self.student.first for spelled in self.teacher.spelled.values())

    @property
    def cut_alike(self) -> float:
        """The share of the texts that both cut into the same tokens."""
        return 1 - len(self.cut_differently) / self.probed

    @cached_property
    def moved(self) -> list[tuple[int, int]]:
        """The student's and the teacher's ids of each token that has two, ascending."""
        pairs = {(s, t) for t, s in self.to_student.items()} | {*self.to_teacher.items()}
        return sorted((s, t) for s, t in pairs if s != t and s >= 0 <= t)

    @cached_property
    def student_lacks(self) -> list[int]:
        """The teacher's ids of the tokens that the student has not."""
        return [t for t, s in self.to_student.items() if s < 0]

    @cached_property
    def teacher_lacks(self) -> list[int]:
        """The student's ids of the tokens that the teacher has not."""
        return [s for s, t in self.to_teacher.items() if t < 0]

    @cached_property
    def clashes(self) -> list[int]:
        """The ids that mean one token to the student and another to the teacher."""
        theirs = self.teacher.spelled
        return [i for i, spelled in self.student.spelled.items() if theirs.get(i, spelled) != spelled]

    @property
    def markers(self) -> list[str]:
        """The special tokens that only one of the two chat templates writes; none where a template is missing."""
        mine, theirs = self.student.markers, self.teacher.markers
        return [] if mine is None or theirs is None else sorted(mine ^ theirs)

    @cached_property
    def mapping(self) -> dict[int, int]:
        """The teacher's ids that change, each with the student's id, or -1 to leave the token out; for `remap`.

        An id that is no token of the teacher's but one of the student's is left out too.
        """
        changed = {t: s for t, s in self.to_student.items() if s != t}
        unused = [i for i in self.student.strings if i not in self.teacher.strings and i < self.teacher.logits]
        return changed | dict.fromkeys(unused, -1)

    @cached_property
    def special_ids(self) -> list[int]:
        """The student's ids of the special tokens that differ in id, name or role; for `special_token_mask`."""
        student = self.student
        found = {s for s, t in self.moved if self._is_special(s, t)}
        found.update(student.special.intersection(self.teacher_lacks))
        for mine, theirs in self.renamed.values():
            found.update((mine, self.to_student[theirs]))
        found.update(student.ids.get(token, -1) for token in self.markers)
        return sorted(found - {-1})

    def table(self, device: torch.device | str | None = None) -> Tensor:  # (V_teacher,) int64
        """The student's id of each of the teacher's; `remap` takes it as it takes `mapping`, which may be long."""
        return _table(self.teacher.logits, self.mapping).to(device)

    def teacher_ids(
        self,
        ids: Tensor,  # (...) int32 or int64
    ) -> Tensor:  # (...) of the same dtype
        """The teacher's ids of the student's tokens, for the teacher to read.

        The student's token of padding is the teacher's, or 0 where the teacher has none. -1 stands where the teacher
        lacks the token: no embedding has a row for it, so leave out the sequence, as the report's code tells.
        """
        checks.require_tensor("ids", ids, checks.INTEGERS)
        table = _table(self.student.logits, self._read).to(ids.device, ids.dtype)
        known = (ids >= 0) & (ids < len(table))
        return torch.where(known, table[torch.where(known, ids, 0).long()], -1)

    @cached_property
    def _read(self) -> dict[int, int]:
        """`to_teacher` with the student's padding, and its ids of no token that are a token of the teacher's."""
        student, teacher, padding = self.student, self.teacher, self.student.roles.get("pad")
        unused = (i for i in range(student.logits) if i not in student.strings)
        found = self.to_teacher | {i: -1 for i in unused if i in teacher.strings or i >= teacher.logits}
        if padding is not None and found[padding] < 0:
            found[padding] = teacher.roles.get("pad", 0)
        return found

    def require(self, worst: Verdict = "same") -> None:
        """Goes on where the verdict is `worst` or better.

        Raises:
            ValueError: the verdict is worse. The text of the report follows.
        """
        order = get_args(Verdict)
        checks.require_one_of("worst", worst, order)
        if order.index(self.verdict) > order.index(worst):
            remedy = "compare texts, or take a teacher with the student's tokenizer"
            if self.verdict != "different":
                remedy = f"do what the report says, then require({self.verdict!r})"
            raise ValueError(f"the tokenizers are {self.verdict!r}, but must be {worst!r}; {remedy}\n\n{self}")

    @property
    def code(self) -> str:
        """What to do, in lines of Python; empty where there is nothing to do, or no remedy."""
        lines, end = [], self.teacher.end
        if self.verdict == "different":
            return ""
        if any(t != s for s, t in self.to_teacher.items()):
            lines.append("teacher_input_ids = report.teacher_ids(input_ids)")
            if min(self._read.values()) < 0:
                lines.append("readable = (teacher_input_ids >= 0).all(-1)  # a row with -1 the teacher cannot read")
        if end < self.teacher.logits:
            lines.append(f"support = teacher_topk(teacher_logits[..., :{end}], k)")
        if self.mapping:
            mapping = self.mapping if len(self.mapping) <= WRITTEN else "report.table(support.device)"
            lines.append(f"support = remap(support, {mapping}, student_vocab={self.student.logits})")
        if self.special_ids:
            ids = self.special_ids if len(self.special_ids) <= WRITTEN else "report.special_ids"
            lines.append(f'weights = weights * special_token_mask(response_ids, {ids}, "all")')
        return "\n".join(lines)


def check_tokenizers(
    student: object,
    teacher: object,
    *,
    student_vocab: int | None = None,
    teacher_vocab: int | None = None,
    probe: Sequence[str] = PROBE,
) -> TokenizerReport:
    """Compares two tokenizers: tokens, ids, special tokens, chat templates, sizes, and how texts are cut.

    Tokens are compared by the bytes that they spell, so that "Ġ" and "▁" are both a space. A special token is its
    name. A special token that the other side lacks is that of the same role there: bos, eos or unk.

    Args:
        student, teacher: tokenizers with `get_vocab` and `encode`: those of transformers, fast or slow, and
            tokenizers.Tokenizer.
        student_vocab, teacher_vocab: the sizes of the models' logits, such as model.config.vocab_size; None takes
            the largest id and one more. Tokens with larger ids are left out, and counted.
        probe: texts without special tokens, which both cut into tokens; the package's eight by default.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    student_vocab = checks.require_count("student_vocab", student_vocab)
    teacher_vocab = checks.require_count("teacher_vocab", teacher_vocab)
    _require_texts(probe)
    mine = read_vocabulary("student", student, student_vocab)
    theirs = read_vocabulary("teacher", teacher, teacher_vocab)
    for name, side in (("student", mine), ("teacher", theirs)):
        if not side.strings:
            raise ValueError(f"{name}_vocab is {side.logits}, and no token of {name} has an id below; pass V")
    to_student, to_teacher = _matched(theirs, mine), _matched(mine, theirs)
    renamed = {
        role: (mine.roles[role], t)
        for role, t in theirs.roles.items()
        if role != "pad" and mine.roles.get(role, to_student[t]) != to_student[t]
    }
    for s, t in renamed.values():
        to_student[t] = s if to_student[t] < 0 else to_student[t]
        to_teacher[s] = t if to_teacher[s] < 0 else to_teacher[s]
    differently = [
        text for text in probe if [to_student.get(t, -1) for t in _cut(teacher, text)] != _cut(student, text)
    ]
    return TokenizerReport(mine, theirs, to_student, to_teacher, renamed, len(probe), differently)


def _matched(source: Vocabulary, target: Vocabulary) -> dict[int, int]:
    """The target's id of each token of the source: that of its string, else the first of its bytes, else -1."""
    found = {}
    for i, spelled in source.spelled.items():
        there = target.ids.get(source.strings[i], -1)
        if target.spelled.get(there) != spelled:
            there = target.first.get(spelled, -1)
        found[i] = there
    return found


def _cut(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(ids, "ids", ids))


def _table(size: int, changes: dict[int, int]) -> Tensor:  # (size,) int64
    """Every id is itself but for the changes."""
    table = torch.arange(size)
    if changes:
        table[torch.tensor(list(changes))] = torch.tensor(list(changes.values()))
    return table


def _require_texts(probe: object) -> None:
    checks.require_list("probe", probe, "texts")
    for i, text in enumerate(probe):  # type: ignore[arg-type, var-annotated]
        if not isinstance(text, str):
            raise TypeError(f"probe[{i}] is {checks.seen(text)}; it must be a str")


def _text(report: TokenizerReport) -> Iterable[str]:
    """The lines of `str(report)`."""
    student, teacher = report.student, report.teacher
    have = f"{report.shared:,} of the teacher's {len(teacher.strings):,} tokens"
    yield f"Verdict: {report.verdict}. The student has {have}."
    yield ""
    for name, side in (("student", student), ("teacher", teacher)):
        yield f"{name}: {_size(side)}"
    yield f"texts: {report.probed - len(report.cut_differently)} of {report.probed} are cut alike"
    differences = list(_differences(report))
    yield from ("", "What differs:", *(f"- {line}" for line in differences)) if differences else ()
    yield ""
    if report.verdict == "different":
        yield "What to do: do not compare ids. Take a teacher with the student's tokenizer, or compare texts."
    elif report.code:
        yield from ("What to do:", *(f"    {line}" for line in report.code.splitlines()))
    else:
        yield "What to do: nothing. Ids can be compared as they are."


def _size(side: Vocabulary) -> str:
    text = f"{len(side.strings):,} tokens ({side.spelling}), {side.logits:,} logits"
    if side.end < side.logits:
        text += f", the last {side.logits - side.end:,} of no token"
    if side.beyond:
        text += f"; {side.beyond:,} more without a logit"
    if alike := len(side.merged):
        text += f"; {alike:,} spellings of several ids"
    if side.fragments:
        text += f"; {len(side.fragments):,} parts of characters"
    return text


def _differences(report: TokenizerReport) -> Iterable[str]:
    mine, theirs = report.student.strings, report.teacher.strings
    lists: dict[str, tuple[Sequence[Any], Callable[[Any], str]]] = {
        "have another id": (report.moved, lambda ids: f"{mine[ids[0]]!r} ({ids[0]}, teacher {ids[1]})"),
        "only the teacher has": (report.student_lacks, lambda t: f"{theirs[t]!r} ({t})"),
        "only the student has": (report.teacher_lacks, lambda s: f"{mine[s]!r} ({s})"),
        "ids of two meanings": (report.clashes, lambda i: f"{i} ({mine[i]!r}, teacher {theirs[i]!r})"),
        "in one chat template only": (report.markers, repr),
        "cut differently": (report.cut_differently, repr),
    }
    for what, (found, name) in lists.items():
        if found:
            more = ", ..." if len(found) > NAMED else ""
            yield f"{what} ({len(found):,}): {', '.join(map(name, found[:NAMED]))}{more}"
    for role, (s, t) in report.renamed.items():
        yield f"{role}: {mine[s]!r} ({s}), teacher {theirs[t]!r} ({t})"

"""Which tokens are compared: the support S of each position, and what is refused as one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import default_collate_fn_map

from topk_rkl import checks
from topk_rkl.rows import repeats

LARGEST_LOG_SUM = 1 / 16  # of true log-probs, 0 but for rounding: in bfloat16, 1/32 where they are from -8 to -16


@dataclass(eq=False)
class Support:
    """The tokens on which student and teacher are compared, and what the teacher gives them.

    A slot is empty, and outside S, when its id is negative or not in the student's vocabulary, or its log-prob is -inf.
    Ids may come in any order. An id given twice is two classes, each with its own share of probability; see `unique`.

    An index is one of positions, and takes all K slots along: `support[:, :-1]`, `support[mask]`, `support[0]`.
    A Support is not unpacked: take `support.tensors`. It is a pytree of its two tensors, into which `tree_map`,
    torch.compile and torch.export look. A DataLoader stacks and pins supports. accelerate, the Trainer of transformers
    and Lightning move them. The `device_ids` of DDP do not: move the batch before.
    """

    ids: Tensor
    """(..., K) int32 or int64, vocabulary ids; negative where the slot is empty."""
    log_probs: Tensor
    """(..., K) float: the teacher's log-probs or logits there, since a constant per row cancels; -inf where empty."""
    normalized: bool = True
    """Whether log_probs are true log-probs, of probabilities among all tokens. False: logits, up to a constant per row.

    Where true log-probs are needed, logits are refused. A position whose probabilities add up to more than 1 gives NaN.
    """

    @property
    def shape(self) -> torch.Size:
        """(...), that of the positions, without K."""
        return self.ids.shape[:-1]

    @property
    def k(self) -> int:
        """K, the number of slots per position."""
        return self.ids.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The ids and the log-probs, (..., K) each."""
        return self.ids, self.log_probs

    @property
    def device(self) -> torch.device:
        """Where both tensors are."""
        return self.ids.device

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"a Support of one position has no len(); its {self.k} slots are support.k")
        return self.shape[0]

    def __getitem__(self, index: Any) -> "Support":
        index = index if isinstance(index, tuple) else (index,)
        return self.each(lambda x: x[(*index, slice(None))])

    __iter__ = None  # two rows would unpack into two supports; Lightning iterates over what has a function here

    def each(self, function: Callable[[Tensor], Tensor]) -> "Support":
        """A Support of what the function makes of the ids, and of the log-probs."""
        return Support(function(self.ids), function(self.log_probs), self.normalized)

    def to(self, *args: Any, **options: Any) -> "Support":
        """As `Tensor.to`: a device moves both tensors, a dtype is that of the log-probs alone."""
        log_probs = self.log_probs.to(*args, **options)
        if not log_probs.is_floating_point():
            raise TypeError(
                f"the dtype is {log_probs.dtype}, but is that of the log_probs; change the ids alone, by "
                "Support(support.ids.long(), support.log_probs, support.normalized)"
            )
        of_both = {name: options[name] for name in ("non_blocking", "copy") if name in options}
        return Support(self.ids.to(log_probs.device, **of_both), log_probs, self.normalized)

    def pin_memory(self) -> "Support":
        """In page-locked memory, as a DataLoader with pin_memory=True asks for it."""
        return self.each(Tensor.pin_memory)

    def reshape(self, *shape: int | Sequence[int]) -> "Support":
        """Other positions, in the same order: `support.reshape(-1)` makes (B, T) one dimension of B T."""
        positions = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        return self.each(lambda x: x.reshape(*positions, self.k))

    def pad(self, length: int, *, side: Literal["right", "left"] = "right") -> "Support":
        """Positions with empty slots up to `length`, in the last dimension of positions.

        Args:
            length: at least that dimension, which stays where it has this length.
            side: where they are added: "left" for rows that end together, as prompts do.
        """
        require_support("support", self)
        checks.require_one_of("side", side, ("right", "left"))
        length = checks.require_integer("length", length)
        if not self.shape or length < self.shape[-1]:
            raise ValueError(
                f"length is {length}, but the support has positions {tuple(self.shape)}; cut it: [..., :length]"
            )
        more = length - self.shape[-1]
        return self._filled((0, 0, 0, more) if side == "right" else (0, 0, more, 0))

    @staticmethod
    def cat(supports: "Sequence[Support]", dim: int = 0) -> "Support":
        """The supports one after another in dimension `dim` of the positions.

        Those of fewer slots get empty ones at the end. The result is `normalized` where all are.
        """
        return _joined(torch.cat, supports, dim)

    @staticmethod
    def stack(supports: "Sequence[Support]", dim: int = 0) -> "Support":
        """The supports, of one shape, side by side in a new dimension `dim` of the positions; otherwise as `cat`."""
        return _joined(torch.stack, supports, dim)

    def as_dict(self, prefix: str = "teacher_") -> dict[str, Tensor]:
        """The columns of a batch: {"teacher_ids", "teacher_log_probs"}, or "teacher_logits" where they are logits."""
        return {f"{prefix}ids": self.ids, f"{prefix}{LOG_PROBS if self.normalized else LOGITS}": self.log_probs}

    @staticmethod
    def from_dict(batch: Mapping[str, Any], prefix: str = "teacher_") -> "Support":
        """The Support whose columns `as_dict` gave; other columns of the batch are left alone.

        Raises:
            ValueError: the batch lacks one of the columns, or has log-probs and logits.
        """
        found = [name for name in (LOG_PROBS, LOGITS) if f"{prefix}{name}" in batch]
        if f"{prefix}ids" not in batch or len(found) != 1:
            raise ValueError(
                f"the batch has {', '.join(map(str, batch)) or 'no column'}; it must have {prefix}ids, and either "
                f"{prefix}{LOG_PROBS} or {prefix}{LOGITS}"
            )
        return Support(batch[f"{prefix}ids"], batch[f"{prefix}{found[0]}"], found[0] == LOG_PROBS)

    def unique(self) -> "Support":
        """Keeps the first slot of each id of a row that is not empty, and empties the others."""
        require_support("support", self)
        ids, slots = self.ids.masked_fill(self.log_probs == -torch.inf, -1).sort(dim=-1, stable=True)
        repeated = torch.zeros_like(ids, dtype=torch.bool).scatter(-1, slots, repeats(ids))
        return self.without(repeated)

    def without(
        self,
        slots: Tensor,  # (..., K) bool, or (..., 1)
    ) -> "Support":
        """The support with these slots emptied, or all slots of a position: `support.without(mask[..., None])`."""
        checks.require_tensor("slots", slots, (torch.bool,))
        if slots.shape[-1:] not in ((self.k,), (1,)) or slots.shape[:-1] != self.shape:
            raise ValueError(
                f"slots has shape {checks.shape_of(slots)}; it must be {(*self.shape, self.k)}, or {(*self.shape, 1)} "
                "for whole positions, such as mask[..., None]"
            )
        checks.require_same_device("slots", slots, "the support", self.ids)
        return Support(self.ids.masked_fill(slots, -1), self.log_probs.masked_fill(slots, -torch.inf), self.normalized)

    def _filled(self, padding: tuple[int, ...]) -> "Support":
        """With empty slots, as torch.nn.functional.pad counts them."""
        ids, log_probs = pad(self.ids, padding, value=-1), pad(self.log_probs, padding, value=-torch.inf)
        return Support(ids, log_probs, self.normalized)


LOG_PROBS, LOGITS = "log_probs", "logits"  # names of a column


def _joined(join: Callable[..., Tensor], supports: Sequence[Support], dim: int) -> Support:
    checks.require_list("supports", supports, "supports")
    for i, x in enumerate(supports):
        require_support(f"supports[{i}]", x)
        checks.require_same_device(f"supports[{i}]", x.ids, "supports[0]", supports[0].ids)
    dim, dims = checks.require_integer("dim", dim), len(supports[0].shape) + (join is torch.stack)
    if dims == 0:
        raise ValueError("supports[0] is of one position, which has no dimension; use Support.stack")
    if not -dims <= dim < dims:
        raise ValueError(f"dim is {dim}; it must be a dimension of the positions, from {-dims} to {dims - 1}")
    dim %= dims
    _require_alike([tuple(x.shape) for x in supports], dim if join is torch.cat else None)
    k = max(x.k for x in supports)
    wide = [x._filled((0, k - x.k)) for x in supports]
    ids, log_probs = (join(tensors, dim) for tensors in ([x.ids for x in wide], [x.log_probs for x in wide]))
    return Support(ids, log_probs, all(x.normalized for x in supports))


def _require_alike(shapes: list[tuple[int, ...]], free: int | None) -> None:
    """Refuses positions that differ in more than the dimension `free`."""

    def differ(shapes: list[tuple[int, ...]]) -> bool:
        fixed = shapes if free is None else [(len(x), *x[:free], *x[free + 1 :]) for x in shapes]
        return any(x != fixed[0] for x in fixed)

    if differ(shapes):
        longest = max(x[-1] if x else 0 for x in shapes)
        mended = not differ([(*x[:-1], longest) if x else x for x in shapes])
        raise ValueError(
            f"supports have positions {' and '.join(map(str, sorted(set(shapes))))}; make them alike"
            + ("" if free is None else f" but for dimension {free}")
            + (f", by support.pad({longest})" if mended else "")
        )


def true_log_probs(
    log_probs: Tensor,  # (..., K), -inf where empty
    distinct: Tensor,  # (..., K) the same without the later slots of an id
) -> Tensor:  # (..., K)
    """The log-probs, and NaN for a position where they are logits, since their probabilities add up to more than 1."""
    return log_probs.masked_fill(distinct.double().logsumexp(-1, keepdim=True) > LARGEST_LOG_SUM, torch.nan)


def require_support(name: str, x: Support) -> None:
    if not isinstance(x, Support):
        raise TypeError(f"{name} is {checks.kind_of(x)}; it must be a Support(ids, log_probs)")
    ids, log_probs = x.tensors
    checks.require_tensor(f"{name}.ids", ids, checks.INTEGERS)
    checks.require_tensor(f"{name}.log_probs", log_probs, checks.FLOATS)
    checks.require_constant(f"{name}.log_probs", log_probs)
    if ids.shape != log_probs.shape or ids.dim() == 0 or ids.shape[-1] == 0:
        raise ValueError(
            f"{name}.ids has shape {checks.shape_of(ids)} and {name}.log_probs {checks.shape_of(log_probs)}; "
            "both must be (..., K) with K of at least 1"
        )
    checks.require_same_device(f"{name}.log_probs", log_probs, f"{name}.ids", ids)
    checks.require_flag(f"{name}.normalized", x.normalized)


def require_teacher(
    teacher: object,  # (..., V_teacher) logits, or a Support of (..., K)
    k: int | None,
    mass: str | None,  # None where no loss is taken
    temperature: float | Tensor,  # of the teacher
    student: Tensor,  # (..., V) or (..., H)
    student_name: str,
    sharded: bool = False,
) -> int | None:
    """K of teacher logits, as an int, and None of a Support."""
    if isinstance(teacher, Support):
        if k is not None:
            raise ValueError(f"k is {k}, but teacher is a Support, whose last dimension is K; leave k out")
        require_support("teacher", teacher)
        checks.require_same_device("teacher", teacher.ids, student_name, student)
        checks.require_same_positions("teacher.ids", teacher.ids, student, student_name=student_name)
        if mass == "renormalized":
            checks.warn_of_single_slot(teacher.ids.shape[-1])
        elif mass is not None:
            require_true_log_probs(f"mass={mass!r}", teacher, temperature)
            if mass.startswith("ema_pg"):
                raise ValueError(
                    f"teacher is a Support with mass={mass!r}, which needs the teacher's log-prob of every sampled "
                    "token; pass teacher logits"
                )
        return None
    if isinstance(teacher, (tuple, list)):
        raise TypeError("teacher is a plain tuple or list; wrap it: Support(ids, log_probs)")
    if not isinstance(teacher, Tensor):
        raise TypeError(f"teacher is {checks.kind_of(teacher)}; it must be a (..., V) tensor of logits or a Support")
    k = checks.require_teacher_logits("teacher", teacher, k, mass == "renormalized", sharded)
    checks.require_same_positions("teacher", teacher, student, student_name=student_name)
    return k


def require_normalized(name: str, support: Support, asked: str) -> None:
    if not support.normalized:
        raise ValueError(
            f"{name} holds logits, as its field `normalized` says, but {asked} needs true log-probs; take them, as of "
            "teacher_topk(teacher_logits, k, normalize=True)"
        )


def require_true_log_probs(asked: str, support: Support, temperature: float | Tensor) -> None:
    """Refuses logits, and another temperature, where `asked` needs the teacher's probabilities among all tokens."""
    require_normalized("teacher", support, asked)
    if isinstance(temperature, Tensor) or temperature != 1:
        raise ValueError(
            f"temperature is {checks.seen(temperature)} with {asked} and a Support, whose log-probs do not tell the "
            "teacher's normaliser at that temperature; pass teacher logits, or take log-probs at that temperature, as "
            "of teacher_topk(teacher_logits / temperature, k, normalize=True), and teacher_temperature=1.0"
        )


def _flatten(support: Support) -> tuple[list[Any], bool]:
    return [support.ids, support.log_probs], support.normalized


def _unflatten(parts: Iterable[Any], normalized: bool) -> Support:
    ids, log_probs = parts
    return Support(ids, log_probs, normalized)


def _flatten_with_keys(support: Support) -> tuple[list[tuple[pytree.KeyEntry, Any]], bool]:
    parts, normalized = _flatten(support)
    return [(pytree.GetAttrKey(name), x) for name, x in zip(("ids", LOG_PROBS), parts)], normalized


pytree.register_pytree_node(
    Support, _flatten, _unflatten,
    serialized_type_name="topk_rkl.Support", flatten_with_keys_fn=_flatten_with_keys,
)  # fmt: skip
torch.serialization.add_safe_globals([Support])  # torch.load(weights_only=True) then takes a saved one
default_collate_fn_map[Support] = lambda batch, **_: Support.stack(batch)

"""Triton's interpreter without work that changes no result: kernels take a third of the time."""

from dataclasses import replace
from typing import Any

import numpy
import triton.language as tl
from triton.runtime import interpreter

KNOWN = (
    "_LangPatchScope", "_patch_lang", "_get_np_dtype", "GridExecutor", "InterpreterBuilder", "ReduceOps",
    "interpreter_builder",
)  # fmt: skip


def hasten() -> None:
    """Once per process, and only where this release has the internals that are replaced."""
    if all(hasattr(interpreter, name) for name in KNOWN) and not hasattr(interpreter, "hastened"):
        interpreter.hastened = True
        patch_the_language_once_per_launch()
        remember_dtypes()
        drop_unread_checks()
        reduce_xor_at_once()
        remember_shapes()
        remember_block_types()


def patch_the_language_once_per_launch() -> None:
    """Not again in every call of a device function, which sees the builtins that the launch has replaced."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[int, ...]] = set()

    def patch_lang(function: Any) -> Any:
        seen = tuple(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if seen in patched:
            return interpreter._LangPatchScope()
        patched.add(seen)
        return patch(function)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


def remember_dtypes() -> None:
    """Each question builds a table of all dtypes anew."""
    find, found = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype: Any) -> numpy.dtype:
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return numpy.dtype(numpy.uint64)
        if scalar.name not in found:
            found[scalar.name] = find(scalar)
        return found[scalar.name]

    interpreter._get_np_dtype = get_np_dtype


def drop_unread_checks() -> None:
    """Overflow is looked for in every sum, and asserted only in debug mode."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def reduce_xor_at_once() -> None:
    """A sort takes its partners by a xor over two elements, which the interpreter does one by one."""
    apply = interpreter.ReduceOps.apply_impl

    def apply_impl(self: Any, arguments: Any) -> Any:
        if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
            return apply(self, arguments)
        data = numpy.bitwise_xor.reduce(arguments[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(data, arguments[0].dtype)

    interpreter.ReduceOps.apply_impl = apply_impl


def remember_shapes() -> None:
    """Of a tensor, as a tuple of constants with a type of its own, which takes longer to make than most sums."""
    begin, found = tl.tensor.__init__, {}

    def init(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in found:
            begin(self, handle, type)
            found[shape] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = found[shape]

    tl.tensor.__init__ = init


def remember_block_types() -> None:
    """One object for each dtype and shape; those of pointers have no name that tells all apart."""
    found: dict[tuple[Any, ...], Any] = {}

    def block_type(scalar: Any, shape: Any) -> Any:
        if isinstance(scalar, tl.pointer_type):
            return tl.block_type(scalar, shape)
        key = (scalar.name, *shape)
        if key not in found:
            found[key] = tl.block_type(scalar, shape)
        return found[key]

    tl.block_type.with_element_ty = lambda self, scalar: block_type(scalar, self.shape)
    interpreter.InterpreterBuilder.get_block_ty = lambda _, scalar, shape: block_type(scalar, shape)

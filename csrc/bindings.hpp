// Makes the struct of an op from a tuple of Python's, field by field: pointers are integers, structs tuples.
#pragma once

#include <pybind11/pybind11.h>

#include <type_traits>
#include <utility>

#include "ops.hpp"

namespace topk_rkl {

namespace py = pybind11;

template <class T>
T from_python(py::handle value);

// Becomes whatever the field that it initialises is.
struct Argument {
  py::handle value;

  template <class T>
  operator T() const {
    return from_python<T>(value);
  }
};

template <class T, class... Arguments>
constexpr size_t count_fields() {
  if constexpr (requires { T{Arguments()..., Argument()}; }) return count_fields<T, Arguments..., Argument>();
  else return sizeof...(Arguments);
}

template <class T, size_t... I>
T from_items(PyObject* items, std::index_sequence<I...>) {
  return {Argument{PyTuple_GET_ITEM(items, I)}...};
}

inline Divergence divergence_of(PyObject* code) {  // (family, parameters...), as in topk_rkl/divergence.py
  Divergence divergence;
  const Py_ssize_t size = PyTuple_Check(code) ? PyTuple_GET_SIZE(code) : 0;
  if (size < 1 || size > 5) throw py::type_error("a divergence is a tuple of a family and at most 4 parameters");
  divergence.family = Family(int(PyFloat_AsDouble(PyTuple_GET_ITEM(code, 0))));
  for (Py_ssize_t i = 1; i < size; ++i) divergence.parameters[i - 1] = PyFloat_AsDouble(PyTuple_GET_ITEM(code, i));
  return divergence;
}

// What is no number leaves a Python error, which `op_of` throws.
template <class T>
T from_python(py::handle value) {
  PyObject* const from = value.ptr();
  if constexpr (std::is_pointer_v<T>) return static_cast<T>(PyLong_AsVoidPtr(from));
  else if constexpr (std::is_floating_point_v<T>) return PyFloat_AsDouble(from);
  else if constexpr (std::is_arithmetic_v<T> || std::is_enum_v<T>) return T(PyLong_AsLongLong(from));
  else if constexpr (std::is_same_v<T, Divergence>) return divergence_of(from);
  else {
    constexpr size_t FIELDS = count_fields<T>();
    if (!PyTuple_Check(from) || PyTuple_GET_SIZE(from) != Py_ssize_t(FIELDS)) {
      throw py::type_error("expected a tuple of " + std::to_string(FIELDS));
    }
    return from_items<T>(from, std::make_index_sequence<FIELDS>());
  }
}

template <class Op>
Op op_of(py::handle arguments) {
  const Op op = from_python<Op>(arguments);
  if (PyErr_Occurred()) throw py::error_already_set();
  return op;
}

// name(the arguments of the op, what the function needs besides), without the GIL.
template <class Result, class Op, class Besides>
void define(py::module_& m, const char* name, Result (*function)(const Op&, Besides)) {
  m.def(name, [function](const py::object& arguments, const py::object& besides) {
    const Op op = op_of<Op>(arguments);
    const auto what = op_of<std::decay_t<Besides>>(besides);
    const py::gil_scoped_release released;
    return function(op, what);
  });
}

}  // namespace topk_rkl

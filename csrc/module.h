// An empty Python module, with Python's limited API. Importing it loads its library, which registers the operator.
// Include this header first, as Python.h requires.
#pragma once
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#define PATS_MODULE(name)                 \
  PyMODINIT_FUNC PyInit_##name() {        \
    static PyModuleDef module{};          \
    module.m_base = PyModuleDef_HEAD_INIT; \
    module.m_name = #name;                \
    module.m_size = -1;                   \
    return PyModule_Create(&module);      \
  }

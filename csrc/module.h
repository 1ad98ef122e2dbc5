// A Python module with nothing in it, under Python's limited API: importing it loads the library around it, and
// so registers that library's operator. Comes before everything else, as Python.h does.
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

// Replaces Python.h: only what an empty module needs.
#pragma once

struct PyModuleDef {
  int m_base;
  const char* m_name;
  int m_size;
};
#define PyModuleDef_HEAD_INIT 0
#define PyMODINIT_FUNC [[maybe_unused]] static PyModuleDef*
inline PyModuleDef* PyModule_Create(PyModuleDef* module) { return module; }

// Stands in for torch's checks: one that fails ends the program.
#pragma once
#include <cstdio>
#include <cstdlib>

#define STD_TORCH_CHECK(condition, ...)                                   \
  do {                                                                    \
    if (!(condition)) fprintf(stderr, "%s\n", #condition), abort();       \
  } while (false)

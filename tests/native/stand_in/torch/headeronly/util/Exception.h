// Replaces torch's checks. A failed check ends the program.
#pragma once
#include <cstdio>
#include <cstdlib>

#define STD_TORCH_CHECK(condition, ...)                                   \
  do {                                                                    \
    if (!(condition)) fprintf(stderr, "%s\n", #condition), abort();       \
  } while (false)

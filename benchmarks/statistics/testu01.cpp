// TestU01's batteries (L'Ecuyer, Simard, 2007) on the words from standard input:
//
//   words training | testu01 SmallCrush|Crush|BigCrush [reversed]
//
// The batteries look at the upper bits most; `reversed` turns every word round. A line for each p-value,
// "P <number of the test> <p> <name>", follows TestU01's own report.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

extern "C" {
#include <testu01/bbattery.h>
#include <testu01/swrite.h>
#include <testu01/unif01.h>
}

namespace {

unsigned int next_word() {
  static uint32_t buffer[1 << 14];
  static size_t at = 0, filled = 0;
  if (at == filled) {
    at = 0, filled = fread(buffer, sizeof buffer[0], 1 << 14, stdin);
    if (filled == 0) {
      fprintf(stderr, "the words have come to their end\n");
      exit(1);
    }
  }
  return buffer[at++];
}

unsigned int next_reversed() {
  uint32_t x = next_word(), reversed = 0;
  for (int i = 0; i < 32; ++i, x >>= 1) reversed = reversed << 1 | (x & 1);
  return reversed;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string battery = argc > 1 ? argv[1] : "", order = argc > 2 ? argv[2] : "";
  char name[] = "Philox4x32-7";
  swrite_Basic = FALSE;
  unif01_Gen* gen = unif01_CreateExternGenBits(name, order == "reversed" ? next_reversed : next_word);
  if (battery == "SmallCrush") {
    bbattery_SmallCrush(gen);
  } else if (battery == "Crush") {
    bbattery_Crush(gen);
  } else if (battery == "BigCrush") {
    bbattery_BigCrush(gen);
  } else {
    return fprintf(stderr, "no battery %s\n", battery.c_str()), 2;
  }
  for (int i = 0; i < bbattery_NTests; ++i) printf("P %d %.17g %s\n", i, bbattery_pVal[i], bbattery_TestNames[i]);
  unif01_DeleteExternGenBits(gen);
  return 0;
}

"""`python -m benchmarks.gpu_check --out DIR`."""

import sys

from benchmarks.gpu_check.check import main

sys.exit(main())

"""`python -m benchmarks.gpu_report FILE`: tables and a picture from a `gpu_check`."""

import sys

from benchmarks.gpu_check.report import main

if __name__ == "__main__":
    sys.exit(main())

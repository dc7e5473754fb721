"""One thread everywhere: the number of threads changes the last bits of sums, and the laws compare bits."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported anywhere

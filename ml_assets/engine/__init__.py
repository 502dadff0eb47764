"""Model compute, shared by adapters, eval reports and the gateway."""

import os

# Before torch is imported. Threads of OpenMP that wait for each other by spinning take the cores from whoever
# else computes, and both then crawl; a short spin keeps most of the speed of one process alone.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

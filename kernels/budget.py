"""How much the kernels may hold where nobody says."""

from __future__ import annotations

WORKSPACE = 64 << 20  # bytes beyond inputs and results; tasks carry their own

# Parts evaluated at once in D dimensions: a handful of passes go over them, which should stay in a core's
# cache (2 cores, D = 576: 11 ms per 10,000 pairs at 256 KiB, 20 ms at 128 KiB, 58 ms from 512 KiB up).
EVALUATION_BYTES = 256 << 10

"""How close each phase comes to the ceilings: fitted by `benchmarks/predict.py`, which writes this file.

`lmtt.profile.predict.Efficiency` says how they enter; a call is one layer of one prompt.
"""

from __future__ import annotations

FITTED_ON = "not yet fitted: round figures"
SHARE: dict[str, float] = {
    "closure": 0.5,
    "decode": 0.5,
    "discovery": 0.5,
    "dry run": 0.5,
    "exact evaluation": 0.5,
    "forward": 0.6,
    "graph": 0.5,
    "lens": 0.5,
    "read": 1.0,
    "reduction": 0.5,
    "screening": 0.5,
    "store": 0.5,
    "transfer": 0.5,
}
MEMORY_SHARE: dict[str, float] = {}
EXTRA: dict[str, float] = dict.fromkeys(SHARE, 0.0)

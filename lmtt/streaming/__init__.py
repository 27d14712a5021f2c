"""Models that do not stay in memory: a plan in bytes, a ring read ahead, layers that come and go."""

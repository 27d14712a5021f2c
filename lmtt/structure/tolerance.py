"""How exactly parts must add up, by the model's dtype; relative, dimensionless."""

from __future__ import annotations

import torch

# Sum of parts against what a sublayer wrote, accumulated in float64 for float64 models, else float32.
# A float64 model is allowed 1e-6 because most norms and softmaxes compute in float32 even there.
SUBLAYER_BOUND = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.1}

# Sums of a stage against the stream: only the rounding of the recorded stream.
STAGE_BOUND = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}

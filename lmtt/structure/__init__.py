"""From a transformers model to parts that add up, with no per-architecture code.

replay     run the model's forward with its layers left out, then the layers one at a time
discover   what a layer adds to the residual stream and by which modules (lineage, modules, experts)
capture    one run's parts: q, k, v, W_O; activations, W_down (attention_hook)
verify     do the parts add up to what was written (tolerance)
spec       the records that these hand to each other
"""

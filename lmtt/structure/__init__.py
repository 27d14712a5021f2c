"""From a transformers model to parts that add up, with no per-architecture code.

replay     run the model's forward with its layers left out, then the layers one at a time (handed_on)
discover   what a layer adds to the residual stream and by which modules (lineage, modules)
capture    one run's parts: q, k, v, W_O (heads, attention_hook); activations, W_down (experts, scatter);
           through the factors and norms on their way to the stream (path)
verify     do the parts add up to what was written (tolerance)
opaque     let in what does not, as one part, where the caller asks for that
spec       the records that these hand to each other
"""

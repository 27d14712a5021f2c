"""One file per backend; the contract is in `lmtt.kernels.registry`."""

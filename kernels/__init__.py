"""The mathematics of lmtt, installed as `lmtt.kernels`; see README.md in this folder."""

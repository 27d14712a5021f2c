"""Traces at rest: the stored run, its writer and its reader; numpy only, no model and no torch."""

from lmtt.run.data import Edges, Neurons, Predictions, TraceData
from lmtt.run.layout import Tail, assemble, split
from lmtt.run.reader import read_run
from lmtt.run.writer import Resumed, RunWriter, write_packed, write_run

__all__ = [
    "Edges",
    "Neurons",
    "Predictions",
    "Resumed",
    "RunWriter",
    "Tail",
    "TraceData",
    "assemble",
    "read_run",
    "split",
    "write_packed",
    "write_run",
]

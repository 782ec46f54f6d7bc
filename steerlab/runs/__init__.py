"""A run is a folder: what was asked, what happened, what came out, and what it cost.

A package rather than one file: four small concepts (atomic files, the codec, the cost ledger, the folder itself).
"""

from steerlab.runs.codec import decode, encode
from steerlab.runs.cost import CostLedger
from steerlab.runs.files import atomic_path, atomic_write
from steerlab.runs.machine import environment, free_memory_bytes, give_back_memory, ran_out
from steerlab.runs.run import Run, RunStore, tensors_sha256

__all__ = [
    "CostLedger",
    "Run",
    "RunStore",
    "atomic_path",
    "atomic_write",
    "decode",
    "encode",
    "environment",
    "free_memory_bytes",
    "give_back_memory",
    "ran_out",
    "tensors_sha256",
]

"""Embedding tables: row-wise quantised ones as codes, scales and biases, in files and in memory."""

from ckptflip.faults.rowwise import LAYOUTS
from ckptflip.recsys.tables.access import count_ids, write_counts
from ckptflip.recsys.tables.quantised import dequantise, quantise

__all__ = ["LAYOUTS", "count_ids", "dequantise", "quantise", "write_counts"]

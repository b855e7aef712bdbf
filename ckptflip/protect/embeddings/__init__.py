"""Embedding bags whose tables carry check bytes: every row that is looked up is checked, and every addition.

The tables need numpy alone. What needs PyTorch is imported by name: `module` (a stand-in for `EmbeddingBag`),
`conversion` (a whole model in one call), `collections` (tables by feature), `unfused` (other schemes).
"""

from ckptflip.protect.embeddings.rows import LAYOUTS
from ckptflip.protect.embeddings.tables import bad_rows, protect_table, unprotect_table

__all__ = ["LAYOUTS", "bad_rows", "protect_table", "unprotect_table"]

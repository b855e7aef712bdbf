"""The store of a campaign: one SQLite file, written by one process, read by any number.

`writing` gives a `Writer`, `reading` a `Reader`; `merge` makes one store of several, `export` writes its
tables as Parquet or CSV. `rows` describes what they hand over.
"""

from ckptflip.campaign.store.exporting import export
from ckptflip.campaign.store.lock import Holder, holder_of
from ckptflip.campaign.store.merging import Merged, merge
from ckptflip.campaign.store.reading import Reader, reading
from ckptflip.campaign.store.writing import Writer, writing

__all__ = ["Holder", "Merged", "Reader", "Writer", "export", "holder_of", "merge", "reading", "writing"]

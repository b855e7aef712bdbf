"""PyTorch's zip files, read without PyTorch and without running what they say."""

from __future__ import annotations

from pathlib import Path

# The pickled magic number that began every file before PyTorch 1.6.
_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19."
_TAR_MAGIC = slice(257, 262)
_PICKLE_PROTOCOLS = (2, 3, 4, 5)


def legacy_reason(path: Path, head: bytes) -> str | None:
    """What to say of a file of PyTorch's that is no zip; None if it is none.

    Args:
        path: the file.
        head: its first 512 bytes.
    """
    if _MAGIC in head[:32]:
        kind = "is in PyTorch's format of before version 1.6"
    elif head[_TAR_MAGIC] == b"ustar" and head.startswith((b"sys_info", b"pickle", b"storages", b"tensors")):
        kind = "is in PyTorch's first format, a tar archive"
    elif head[:1] == b"\x80" and len(head) > 2 and head[1] in _PICKLE_PROTOCOLS:
        kind = "is a plain pickle"
    else:
        return None
    if kind == "is a plain pickle":
        how = "If it is yours, load it with the program that wrote it and save its tensors with torch.save"
    else:
        how = (
            "Save it again: python -c 'import sys, torch; "
            f"torch.save(torch.load(sys.argv[1], weights_only=True), sys.argv[2])' {path} NEW.pt"
        )
    return (
        f"{path} {kind}, which cannot be altered word by word. {how}. "
        "Never unpickle a file from a stranger: it can run any code"
    )

"""Opening a store: what every connection is set to, whose file it is, and what SQLite's errors mean."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ckptflip.campaign.store import schema
from ckptflip.checkpoints.files import new_file
from ckptflip.errors import CampaignError, CheckpointError, CkptflipError

# Seconds to wait for another connection: a reader that closes may tidy up the log for an instant.
_PATIENCE = 10.0


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what SQLite, or a damaged row, raises into a CampaignError about the store at `path`.

    Raises:
        CampaignError: with what is wrong and what to do.
    """
    try:
        yield
    except sqlite3.Error as why:
        raise CampaignError(explanation(path, why)) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError) as why:
        raise CampaignError(damaged(path, str(why))) from None


@contextlib.contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """As `explained`, around code that works on what the store at `path` holds, and trusts it.

    Raises:
        CampaignError: likewise; also where a value is of another kind than it should be, or an id of none.
    """
    with explained(path):
        try:
            yield
        except CkptflipError:
            raise
        except KeyError as why:
            raise CampaignError(damaged(path, f"it has no {why} that another row names")) from None
        except (ValueError, TypeError, AttributeError, IndexError, ArithmeticError) as why:
            # A number that is none, a text that should be one, an amount that cannot be.
            raise CampaignError(damaged(path, str(why))) from None


def explanation(path: Path, why: sqlite3.Error) -> str:
    """What an error of SQLite means for the store at `path`, and what to do."""
    # The extended codes keep the primary one in their lowest byte.
    code = getattr(why, "sqlite_errorcode", -1) & 0xFF
    if code == sqlite3.SQLITE_NOTADB:
        return f"{path} is not the store of a campaign: it is no SQLite file, or its first bytes are damaged"
    if code == sqlite3.SQLITE_CORRUPT:
        return damaged(path, str(why))
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return (
            f"{path} cannot be written: {why}. Every trial that was finished before is kept; "
            "free space on its disk and run the same command again"
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"{path} is in use by another program ({why}); close it there and try again"
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_AUTH):
        return f"{path} cannot be opened: {why}. Its folder must be writable too; or copy the store elsewhere"
    if code == sqlite3.SQLITE_CONSTRAINT:
        return f"{path} refused a row, and nothing was changed: {why}"
    if isinstance(why, sqlite3.OperationalError) and code == sqlite3.SQLITE_ERROR:
        return f"{path} has not the tables of its version ({why}): it was altered by hand, or is damaged"
    return damaged(path, str(why))


def opened_to_write(path: Path, *, make: bool) -> sqlite3.Connection:
    """A connection that writes a store; the caller holds its lock.

    Args:
        path: the store.
        make: make one where there is none.

    Raises:
        CampaignError: it is missing, no store, damaged, of a newer version, or cannot be written.
    """
    _plain(path, missing_ok=make)
    if make and not path.exists():
        _make(path)
    if not os.access(path, os.W_OK):  # SQLite would say so at the first trial
        raise CampaignError(f"{path} cannot be written: permission denied; ask its owner, or copy it as them")
    with explained(path), _closed_on_error(_connect(path, "rw")) as connection:
        connection.execute("PRAGMA recursive_triggers = ON")  # so that REPLACE fires those of DELETE
        fresh = _is_empty(connection)
        if not fresh:
            _check(connection, path)
        elif not make:
            raise CampaignError(f"{path} is empty: no campaign was ever begun in it")
        # What is committed outlives a loss of power as well; the log lets readers in meanwhile.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if fresh:
            schema.create(connection)
        schema.migrate(connection)
        connection.execute("PRAGMA foreign_keys = ON")
        return connection


def opened_to_read(path: Path) -> sqlite3.Connection:
    """A connection that only reads a store, beside a running writer too; an older one as if it were migrated.

    Raises:
        CampaignError: it is missing, no store, damaged, of a newer version, or cannot be read.
    """
    _plain(path, missing_ok=False)
    with explained(path), _closed_on_error(_reader(path)) as connection:
        connection.execute("PRAGMA query_only = ON")
        if _is_empty(connection):
            raise CampaignError(f"{path} is empty: no campaign was ever begun in it")
        found = _check(connection, path)
        return connection if found == schema.VERSION else _migrated_copy(connection)


@contextlib.contextmanager
def draft_store(path: Path) -> Iterator[sqlite3.Connection]:
    """A new store without a log beside it, to be filled and then given its name.

    Args:
        path: an empty file.

    Raises:
        CampaignError: it cannot be written.
    """
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        with explained(path):
            connection.execute("PRAGMA journal_mode = MEMORY")
            schema.create(connection)
            connection.execute("PRAGMA foreign_keys = ON")
        yield connection
        with explained(path):
            connection.execute("PRAGMA journal_mode = WAL")  # as every writer leaves it


def _make(path: Path) -> None:
    """Make an empty store, which nobody meets half made."""
    try:
        with new_file(path, overwrite=False) as draft, explained(path), draft_store(draft):
            pass
    except CheckpointError as why:
        raise CampaignError(str(why)) from None


def _reader(path: Path) -> sqlite3.Connection:
    # Not mode=ro: such a reader may not take away the log and index files that it had SQLite make.
    connection = _connect(path, "rw")
    try:
        connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
    except sqlite3.OperationalError as why:
        connection.close()
        if why.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise
        log = _log(path)
        if log is not None:
            raise CampaignError(
                f"{path} has trials in {log.name} that a killed run left there, and its folder cannot be "
                "written: copy both files to a folder of your own and read them there"
            ) from None
        # A folder that cannot be written: nobody alters what lies in it, so no locks are needed.
        return _connect(path, "ro&immutable=1")
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{Path(os.path.realpath(path)).as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=_PATIENCE, isolation_level=None, cached_statements=256)


@contextlib.contextmanager
def _closed_on_error(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    try:
        yield connection
    except BaseException:
        connection.close()
        raise


def _plain(path: Path, *, missing_ok: bool) -> None:
    if path.is_dir():
        raise CampaignError(f"{path} is a folder; name the store in it, such as {path / 'runs.db'}")
    try:
        exists = path.exists()
    except OSError as why:
        raise CampaignError(f"{path} cannot be opened: {why.strerror}") from None
    if exists and not path.is_file():
        raise CampaignError(f"{path} is not a plain file")
    if exists and not os.access(path, os.R_OK):
        raise CampaignError(f"{path} cannot be read: permission denied; ask its owner, or copy it as them")
    if exists or (missing_ok and path.parent.is_dir()):
        return
    if missing_ok:
        raise CampaignError(f"{path} cannot be made: there is no folder {path.parent}")
    raise CampaignError(f"{path} does not exist; `ckptflip run CAMPAIGN.toml --store {path}` makes one")


def _is_empty(connection: sqlite3.Connection) -> bool:
    """Whether nothing was ever put in the file, as after a kill before the first table."""
    if connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone():
        return False
    return not connection.execute("PRAGMA application_id").fetchone()[0]


def _check(connection: sqlite3.Connection, path: Path) -> int:
    """The version of a store that this version can use."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != schema.APPLICATION:
        raise CampaignError(f"{path} is a SQLite file, but not the store of a campaign: name another")
    if version > schema.VERSION:
        raise CampaignError(
            f"{path} is a store of version {version}, and this ckptflip knows up to {schema.VERSION}: "
            "a newer ckptflip wrote it. Upgrade with pip install -U ckptflip. Nothing was changed"
        )
    if version < 0:
        raise CampaignError(damaged(path, f"its version is {version}"))
    for old in range(version, schema.VERSION):
        if old not in schema.STEPS:
            raise CampaignError(
                f"{path} is a store of version {old}, which nothing brings to version {old + 1}: read it "
                "with the ckptflip that wrote it (`ckptflip export`)"
            )
    (page,) = connection.execute("PRAGMA page_size").fetchone()
    # SQLite itself would take the missing end of the last page for zeros.
    if path.stat().st_size % page and not _log(path):
        raise CampaignError(damaged(path, "its end is missing"))
    return int(version)


def _log(path: Path) -> Path | None:
    """The log beside a store that holds trials which are not in the file yet."""
    log = Path(f"{os.path.realpath(path)}-wal")
    return log if log.exists() and log.stat().st_size else None


def _migrated_copy(connection: sqlite3.Connection) -> sqlite3.Connection:
    """An up-to-date copy of an older store, in a temporary file that SQLite deletes."""
    copy = sqlite3.connect("", isolation_level=None)
    with contextlib.closing(connection), _closed_on_error(copy):
        connection.backup(copy)
        schema.migrate(copy)
    return copy


def damaged(path: Path, why: str) -> str:
    """What is said of a damaged store."""
    return (
        f"{path} is damaged: {why}. Restore a copy of it, or save what can be read with "
        f"`sqlite3 {path.name} .recover`"
    )

"""The database that the ledger is kept in, whatever SQLAlchemy speaks to."""

import os
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from vllm_cachescope.config.error import ConfigError
from vllm_cachescope.config.ledger import FILE, LedgerSettings

BUSY_S = 10
"""How long SQLite waits for another process that writes, in seconds."""


def address(settings: LedgerSettings) -> URL:
    """Return the database's address, with its password.

    Raises:
        ConfigError: if it is none, or the password's file cannot be read. The message shows no
            value.
    """
    if settings.directory is not None:
        return URL.create("sqlite", database=str(settings.directory.absolute() / FILE))
    assert settings.url is not None
    url = parse(settings.url.get_secret_value(), "ledger.url")
    password = settings.password()
    return url if password is None else url.set(password=password)


def parse(text: str, key: str) -> URL:
    """Return the address that ``text`` is, if its driver is installed.

    Raises:
        ConfigError: if it is none; the message begins with ``key`` and shows no value.
    """
    try:
        url = make_url(text)
        url.get_dialect().import_dbapi()
    except NoSuchModuleError as error:
        raise ConfigError(f"{key}: {error} (value not shown)") from None
    except ImportError as error:
        raise ConfigError(f"{key}: the database's driver is not installed: {error}") from None
    except (ArgumentError, ValueError):
        raise ConfigError(
            f"{key}: this is no address of SQLAlchemy's, as in "
            "postgresql+psycopg://user@host/database (value not shown)"
        ) from None
    return url


def connect(url: URL) -> Engine:
    """Return an engine for a database. Nothing is connected to before it is used."""
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True, pool_size=2, max_overflow=4)
    engine = create_engine(url, connect_args={"timeout": BUSY_S})
    event.listen(engine, "connect", _set_up_sqlite)
    return engine


def make_private(url: URL) -> None:
    """Make SQLite's file, if that is the database, so that nobody but its owner can read it.

    Raises:
        OSError: if it cannot be made.
    """
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return
    path = Path(url.database)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


def describe(error: BaseException) -> str:
    """Return what is wrong with a database, in one line, without what was being written."""
    if isinstance(error, SQLAlchemyError):
        error = getattr(error, "orig", None) or error
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    # Readers do not wait for whoever writes; a power cut may cost the last seconds, no more.
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()

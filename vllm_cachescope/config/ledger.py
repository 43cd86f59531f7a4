"""The settings of the ledger: where it is kept, and for how long what stays in it."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, model_validator

from vllm_cachescope.config.private_directory import check_private_directory
from vllm_cachescope.config.secret import secret_text
from vllm_cachescope.config.values import Duration, Model

PASSWORD_VARIABLE = "CACHESCOPE_LEDGER_PASSWORD"
"""Environment variable the database's password is taken from where no file is named."""

FILE = "usage.db"
"""Name of SQLite's file in the ledger's directory."""

_DAY_S = 86400


class LedgerSettings(Model):
    """The ledger of what was used, in a database.

    Attributes:
        directory: where SQLite keeps it, readable to nobody but the server. It is made if it is
            not there.
        url: another database, as SQLAlchemy writes it, which several servers may share.
        password_file: file the database's password is read from; without one, the environment
            counts, and then `url`.
        replica: this server's name in its rows; None for host name and port.
        max_requests: how many of the latest requests are kept one by one.
        requests_for: how long they are, in seconds.
        sessions_for: how long sums are kept by session, in seconds, and after that without.
        max_session_rows: how many rows by session are kept; the oldest lose the session first.
        hours_for: how long sums are kept by hour, in seconds, and after that by day.
        days_for: how long they are kept at all, in seconds.
    """

    directory: Path | None = None
    url: Annotated[SecretStr, Field(min_length=1)] | None = None
    password_file: Path | None = None
    replica: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    max_requests: Annotated[int, Field(strict=True, ge=0)] = 100_000
    requests_for: Duration = 7 * _DAY_S
    sessions_for: Annotated[Duration, Field(ge=_DAY_S)] = 35 * _DAY_S
    max_session_rows: Annotated[int, Field(strict=True, ge=1000)] = 2_000_000
    hours_for: Annotated[Duration, Field(ge=_DAY_S)] = 90 * _DAY_S
    days_for: Annotated[Duration, Field(ge=_DAY_S)] = 800 * _DAY_S

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if (self.directory is None) == (self.url is None):
            raise ValueError("set directory (SQLite keeps a file there) or url, one of the two")
        if not self.sessions_for <= self.hours_for <= self.days_for:
            raise ValueError(
                "sessions_for may not be longer than hours_for, nor that than days_for"
            )
        return self

    def password(self) -> str | None:
        """Return the database's password from its file or the environment; None if it is in
        neither.

        Raises:
            ConfigError: if the file cannot be read, or is empty.
        """
        return secret_text(
            None, self.password_file, "ledger.password", PASSWORD_VARIABLE, shortest=1
        )

    def check(self) -> None:
        """Check that the directory can be used, or made if it is not there.

        Raises:
            ConfigError: if it can be neither used nor made, or the password's file not be read.
        """
        self.password()
        if self.directory is not None:
            check_private_directory(self.directory, "ledger.directory")

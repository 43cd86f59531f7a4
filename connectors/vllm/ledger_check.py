"""The check of the ledger's database: whether it can be reached, and written to."""

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from vllm_cachescope.config import ConfigError, LedgerSettings
from vllm_cachescope.connectors.vllm.findings import Finding, Status
from vllm_cachescope.usage import database


def check(settings: LedgerSettings) -> Finding:
    """Return how the database is. SQLite's file is not looked for: the server makes it.

    A database that cannot be reached is a warning: requests are served without it.
    """
    try:
        url = database.address(settings)
    except ConfigError as error:
        return Finding("ledger", Status.FAILURE, str(error.args[0]))
    # The fields behind the question mark may hold a password, too.
    where = url.set(query={}).render_as_string(hide_password=True)
    if url.get_backend_name() == "sqlite":
        return Finding("ledger", Status.OK, f"{where} can be used")
    engine = database.connect(url)
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    except (SQLAlchemyError, OSError) as error:
        found = f"{where} cannot be reached: {database.describe(error)}"
        return Finding("ledger", Status.WARNING, found, "a database that answers from here")
    finally:
        engine.dispose()
    return Finding("ledger", Status.OK, f"{where} answers")

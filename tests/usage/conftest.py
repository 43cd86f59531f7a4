from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url

from tests.usage import postgres
from tests.usage.ledgers import Books
from vllm_cachescope.usage.database import connect
from vllm_cachescope.usage.tables import METADATA


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    if postgres.programs() is None:
        pytest.skip("PostgreSQL is not installed")
    with postgres.serve() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[URL]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield make_url(f"sqlite:///{tmp_path / 'ledger.db'}")
        return
    url = make_url(request.getfixturevalue("postgres_url"))
    yield url
    engine = connect(url)
    METADATA.drop_all(engine)
    engine.dispose()


@pytest.fixture
def books(database: URL) -> Iterator[Books]:
    books = Books(database)
    yield books
    books.close()

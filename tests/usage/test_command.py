import io
import json
from pathlib import Path

import pytest
from pyarrow import parquet
from rich.console import Console
from sqlalchemy import URL

from tests.usage.ledgers import MONDAY, Books, record
from vllm_cachescope.cli.main import main
from vllm_cachescope.cli.usage_tables import print_usage
from vllm_cachescope.usage.database import connect
from vllm_cachescope.usage.prices import Prices
from vllm_cachescope.usage.query import Query
from vllm_cachescope.usage.store import WEEK_S
from vllm_cachescope.usage.usage_ledger import usage_of

PERIOD = ["--since", "2026-11-01", "--until", "2027-02-01"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The directory of a ledger with two organisations, the name of one session a trap."""
    books = Books(URL.create("sqlite", database=str(tmp_path / "usage.db")))
    books.write(
        record(session="\x1b[31mred[/bold]"),
        *(record(MONDAY + week * WEEK_S, "header:b") for week in range(4)),
    )
    books.close()
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["usage", *map(str, arguments), *PERIOD]) == 0
    return capsys.readouterr().out


def test_a_table(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prices = directory / "prices.yaml"
    prices.write_text("models: {toy: {input: 1000000}}")
    shown = run(capsys, "--directory", directory, "--by", "org,session", "--prices", prices)
    assert "\x1b" not in shown and "\N{REPLACEMENT CHARACTER}[31mred[/bold]" in shown
    row = next(line for line in shown.splitlines() if "header:b" in line)
    # 4 requests of 125 tokens: 5 uncached, 20 created at 1.25, 100 read at 0.1.
    for value in ("500", "80.0 %", "5.0", "500.0000", "160.0000", "68.0 %"):
        assert value in row, row
    assert "625" in shown.splitlines()[-2]


def test_without_prices_there_are_no_costs(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = json.loads(run(capsys, "--directory", directory, "--format", "json"))
    assert answer["currency"] is None and answer["total"]["cost_with"] is None


def test_a_narrow_terminal_shows_less(directory: Path) -> None:
    with connect(
        URL.create("sqlite", database=str(directory / "usage.db"))
    ).connect() as connection:
        answer = usage_of(connection, Query(0, MONDAY + 9 * WEEK_S, ("org",)), Prices())
    for width, shown in ((200, True), (80, False)):
        console = Console(width=width, force_terminal=True, file=io.StringIO())
        print_usage(console, answer)
        printed = console.file.getvalue()
        assert ("prefill saved" in printed) is shown
        assert "header:b" in printed and "reads per write" in printed


def test_phases(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "--directory", directory, "--phases", "--by", "model")
    assert "Model toy" in shown and "4 in all" in shown


def test_a_database_by_its_address_into_files(
    postgres_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sqlalchemy import make_url

    from vllm_cachescope.usage.tables import METADATA

    books = Books(make_url(postgres_url))
    books.write(record())
    try:
        for format_ in ("csv", "json", "parquet"):
            out = tmp_path / f"usage.{format_}"
            said = run(
                capsys,
                *("--database", postgres_url, "--by", "org"),
                *("--format", format_, "--output", out),
            )
            assert said == ""
        assert "name:acme" in (tmp_path / "usage.csv").read_text()
        assert json.loads((tmp_path / "usage.json").read_text())["total"]["requests"] == 1
        (row,) = parquet.read_table(tmp_path / "usage.parquet").to_pylist()
        assert (row["org"], row["read_cpu"]) == ("name:acme", 100)
    finally:
        METADATA.drop_all(books.engine)
        books.close()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--directory", "nowhere"], 1, "there is no such file"),
        (["--directory", "{}", "--by", "tenant"], 1, "nothing to split by"),
        (["--directory", "{}", "--format", "parquet"], 2, "name a file"),
        (["--directory", "{}", "--phases", "--format", "csv"], 2, "--phases"),
        (["--prices", "x"], 2, "a server has its own"),
        (["--database", "postgresql+psycopg://u:sesame@h/x"], 2, "password may not stand"),
        (["--database", "postgresql://u@h/x", "--password", "sesame"], 2, "password may not stand"),
        (["--token", "sesame"], 2, "token may not stand"),
        (["--token-file", "nowhere"], 2, "--token-file: "),
        (["--database", "postgresql+nodriver://h"], 2, "value not shown"),
        (["--database", "sesame"], 2, "no address of SQLAlchemy's"),
        (["--url", "http://127.0.0.1:1"], 1, "127.0.0.1:1: "),
    ],
)
def test_what_goes_wrong(
    directory: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    says: str,
) -> None:
    arguments = [one.format(directory) for one in arguments]
    try:
        found = main(["usage", *arguments])
    except SystemExit as exit_:
        found = exit_.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert found == status, said
    assert says in said and "sesame" not in said

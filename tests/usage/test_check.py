import json
from pathlib import Path

import pytest

from vllm_cachescope.config import ConfigError, LedgerSettings, load
from vllm_cachescope.connectors.vllm import config_check, ledger_check
from vllm_cachescope.connectors.vllm.findings import Status
from vllm_cachescope.usage.database import address


def test_a_database_that_answers(postgres_url: str) -> None:
    found = ledger_check.check(LedgerSettings(url=postgres_url))
    assert found.status is Status.OK, found


def test_one_that_does_not_is_a_warning_without_its_password() -> None:
    url = "postgresql+psycopg://u:sesame@127.0.0.1:1/x?options=sesame"
    found = ledger_check.check(LedgerSettings(url=url))
    assert found.status is Status.WARNING
    assert "u:***@127.0.0.1:1/x cannot be reached" in str(found) and "sesame" not in str(found)


def test_sqlite_leaves_nothing_behind(tmp_path: Path) -> None:
    found = ledger_check.check(LedgerSettings(directory=tmp_path / "ledger"))
    assert found.status is Status.OK and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"ledger": {"directory": "{}"}}, r"is open to others \(mode 755\); allowed: 700"),
        ({"ledger": {"directory": "{}/file/ledger"}}, "cannot be made"),
        ({"ledger": {"directory": "/x", "password_file": "{}/none"}}, "none cannot be read"),
        ({"prices": "{}/none.yaml"}, "prices: .*none.yaml cannot be read"),
        ({"prices": "{}/file"}, "prices.models: Input should be"),
        ({"ledger": {"url": "sesame"}}, r"ledger.url: .*\(value not shown\)"),
        ({"ledger": {"url": "nodialect://u:sesame@h"}}, r"ledger.url: .*\(value not shown\)"),
        ({"ledger": "postgresql://u:sesame@h"}, r"ledger: .*\(value not shown\)"),
        ({"ledger": {"url": ["sesame"]}}, r"ledger.url: .*\(value not shown\)"),
    ],
)
def test_mistakes_stop_the_start_and_show_no_secret(
    tmp_path: Path, own: dict[str, object], says: str
) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "file").write_text("models: 3")
    path = tmp_path / "c.json"
    path.write_text(json.dumps(own).replace("{}", str(tmp_path)))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=says) as raised:
        config_check.load_checked({"config_file": str(path)})
    assert "sesame" not in str(raised.value)


def test_an_address_with_a_password_may_not_stand_where_logs_show_it() -> None:
    own = {"ledger": {"url": "postgresql://u:sesame@h"}}
    with pytest.raises(ConfigError, match="may not stand") as raised:
        config_check.load_checked(own)
    assert "sesame" not in str(raised.value) and "CACHESCOPE_LEDGER_PASSWORD" in str(raised.value)
    load(own)  # in a private file it may


def test_the_password_comes_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("sesame\n")
    settings = LedgerSettings(url="postgresql+psycopg://u:old@h/x", password_file=file)
    assert address(settings).password == "sesame"
    assert "sesame" not in repr(address(settings)) + repr(settings)

"""Purges and health over HTTP and from the command line, of a real server."""

import httpx
import pytest

from tests.engine.bodies import EPHEMERAL, agent_body, session
from tests.engine.server import NAMED_KEY, OPERATOR_TOKEN, Api, breaks
from vllm_cachescope.cli.main import main

pytestmark = pytest.mark.engine


def created(api: Api, key: str, name: str, session_id: str) -> int:
    """Send a request; return how many of its tokens were not read."""
    answer = api.post("/v1/messages", agent_body(name), key, **session(session_id)).json()
    return answer["usage"]["cache_creation_input_tokens"]


def purge(api: Api, what: object, key: str | None = OPERATOR_TOKEN) -> httpx.Response:
    return api.post("/cachescope/purge", what, key)


def test_an_organisation_is_forgotten_on_every_tier_and_others_are_not(api: Api) -> None:
    keys = [NAMED_KEY, "key of the purged's neighbour"]
    assert all(created(api, key, "purged", "s") for key in keys)
    answer = purge(api, {"org": "named"})
    assert answer.status_code == 200, answer.text
    counts = answer.json()["purged"]
    assert counts["device"] == counts["cpu"] > 0
    assert answer.json()["fingerprints"] > 0
    api.empty_device()
    assert created(api, keys[0], "purged", "s") > 0
    assert created(api, keys[1], "purged", "s") == 0


def test_a_client_may_have_its_own_session_forgotten(api: Api) -> None:
    key = "key of the forgetful"
    scoped, changed = agent_body("forgetful"), agent_body("forgetful", "Weighs anything.")
    for asked in (scoped, changed):
        asked["messages"][0]["content"][0]["cache_control"] = EPHEMERAL | {"scope": "session"}
    for name in ("one", "other"):
        for asked in (scoped, changed):
            api.post("/v1/messages", asked, key, **session(name)).raise_for_status()
    assert {seen["session"] for seen in breaks(api, key)} == {"one", "other"}
    answer = purge(api, {"session": "one"}, key).json()
    assert answer["purged"]["device"] > 0 and answer["fingerprints"] == 2
    assert purge(api, {"session": "one"}, key).json()["purged"] == {"device": 0, "cpu": 0}
    assert {seen["session"] for seen in breaks(api, key)} == {"other"}
    for name, read in (("one", False), ("other", True)):
        usage = api.post("/v1/messages", scoped, key, **session(name)).json()["usage"]
        assert (usage["cache_creation_input_tokens"] == 0) == read


def test_a_client_may_say_that_its_session_is_over(api: Api) -> None:
    key, scoped = "key of the finished", agent_body("finished")
    scoped["messages"][0]["content"][0]["cache_control"] = EPHEMERAL | {"scope": "session"}
    api.post("/v1/messages", scoped, key, **session("its session")).raise_for_status()
    url, headers = f"{api.url}/cachescope/sessions/its%20session", {"x-api-key": key}
    answer = httpx.delete(url, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["blocks"] > 0
    assert httpx.delete(url, headers={"x-api-key": "key of the curious"}).json()["blocks"] == 0
    # Nothing was purged.
    usage = api.post("/v1/messages", scoped, key, **session("its session")).json()["usage"]
    assert usage["cache_creation_input_tokens"] == 0


def test_nobody_else_may(api: Api) -> None:
    assert purge(api, {"all": True}, None).status_code == 401
    assert purge(api, {"all": True}, "key of the curious").status_code == 401
    assert purge(api, {"org": "named"}, "key of the curious").status_code == 401
    assert purge(api, {"session": "s"}, None).status_code == 401


def test_health(api: Api) -> None:
    created(api, NAMED_KEY, "healthy", "s")
    answer = httpx.get(f"{api.url}/cachescope/health", timeout=60).json()
    assert answer["status"] == "ok"
    assert [tier["name"] for tier in answer["tiers"]] == ["device", "cpu"]
    for tier in answer["tiers"]:
        assert tier["up"] and 0 < tier["used_bytes"] <= tier["capacity_bytes"]
        assert tier.keys().isdisjoint({"address", "reason", "orgs"})
    token = {"authorization": f"Bearer {OPERATOR_TOKEN}"}
    answer = httpx.get(f"{api.url}/cachescope/health", headers=token, timeout=60).json()
    for tier in answer["tiers"]:
        assert tier["address"] and tier["orgs"]["name:named"] > 0


def test_the_command(api: Api, capsys, monkeypatch, tmp_path) -> None:
    token = tmp_path / "token"
    token.write_text(OPERATOR_TOKEN + "\n")
    monkeypatch.delenv("CACHESCOPE_OPERATOR_TOKEN", raising=False)
    created(api, NAMED_KEY, "commanded", "s")
    here = ["--url", api.url]
    assert main(["purge", "--org", "named", *here]) == 1
    assert "present operator_token" in capsys.readouterr().err
    assert main(["purge", "--org", "named", *here, "--token-file", str(token)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{api.url}: entries forgotten: device ") and ", cpu " in said
    monkeypatch.setenv("CACHESCOPE_OPERATOR_TOKEN", OPERATOR_TOKEN)
    assert main(["purge", "--org", "named", *here]) == 0
    assert capsys.readouterr().out == f"{api.url}: entries forgotten: device 0, cpu 0\n"
    # One server that is not there does not keep the others from being purged.
    created(api, NAMED_KEY, "commanded", "s")
    assert main(["purge", "--all", "--url", "http://127.0.0.1:1", *here]) == 1
    printed = capsys.readouterr()
    assert "http://127.0.0.1:1: " in printed.err and "device 0" not in printed.out
    with pytest.raises(SystemExit):
        main(["purge", *here])
    with pytest.raises(SystemExit):
        main(["purge", "--all", "--session", "s", *here])

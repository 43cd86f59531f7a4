import pytest

from vllm_cachescope.connectors.vllm import front_ends
from vllm_cachescope.connectors.vllm.engine.idle_sweep import IdleSweep
from vllm_cachescope.connectors.vllm.findings import Status
from vllm_cachescope.connectors.vllm.front_ends import of_launch, of_stack

SERVE = ("vllm.entrypoints.cli.serve", "cmd")


@pytest.mark.parametrize(
    ("stack", "rust", "expected"),
    [
        ([SERVE, ("vllm.entrypoints.launchers.api_server.entry", "run_server")], "0", "PYTHON"),
        ([("vllm.entrypoints.openai.api_server", "<module>")], "0", "PYTHON"),
        ([SERVE, ("vllm.entrypoints.cli.serve", "run_multi_api_server")], "1", "RUST"),
        ([SERVE, ("vllm.entrypoints.cli.serve", "run_headless")], "1", "ELSEWHERE"),
        ([SERVE, ("vllm.entrypoints.launchers.grpc_server", "serve_grpc")], "1", "GRPC"),
        ([("vllm.entrypoints.launchers.grpc_server", "<module>")], "0", "GRPC"),
        ([("dynamo.vllm.worker_factory", "setup")], "0", "DYNAMO"),
        ([("vllm.v1.engine.llm_engine", "from_engine_args")], "1", "OFFLINE"),
        ([("somebody.server", "main"), ("vllm.v1.engine.async_llm", "from_e")], "0", "UNKNOWN"),
        ([], "", "UNKNOWN"),
    ],
)
def test_who_makes_the_engine_is_its_front_end(monkeypatch, stack, rust, expected):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", rust)
    assert of_stack(stack) is getattr(front_ends, expected)


def test_a_launch_says_what_will_be_missing(monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    assert of_launch(grpc=False, headless=False).finding.status is Status.OK
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    for front_end in (of_launch(grpc=False, headless=False), of_launch(grpc=True, headless=False)):
        assert front_end.finding.status is Status.WARNING
        assert "reads no marks" in front_end.finding.found


def test_one_is_recognised_by_whom_it_was_called(monkeypatch):
    """The names are those of modules, also of one that runs as a program."""
    code = "def go(of_caller):\n    return of_caller()\n"
    for names in ({"__name__": "dynamo.vllm.main"}, {"__name__": "__main__"}):
        space = {**names, "__spec__": None}
        if names["__name__"] == "__main__":
            space["__spec__"] = type("Spec", (), {"name": "vllm.entrypoints.grpc_server"})
        exec(code, space)
        expected = front_ends.DYNAMO if "dynamo" in space["__name__"] else front_ends.GRPC
        assert space["go"](front_ends.of_caller) is expected


def test_an_engine_sweeps_by_itself_once_nobody_asks_it_to():
    now = [0.0]
    sweep = IdleSweep(4.0, lambda: now[0])
    now[0] = 100.0
    assert not sweep.is_due, "an engine without a loop of its own is never woken"
    sweep.begin()
    for at, due in ((104.0, False), (107.0, True)):
        now[0] = at
        assert sweep.is_due is due
    sweep.note()
    assert not sweep.is_due


def test_an_engine_sweeps_at_once_if_there_is_a_reason():
    wanted, woken = [False], []
    sweep = IdleSweep(4.0, lambda: 0.0, lambda: wanted[0])
    wanted[0] = True
    assert not sweep.is_due, "it has no loop yet"
    sweep.begin(lambda: woken.append(1))
    assert sweep.is_due
    wanted[0] = False
    assert not sweep.is_due
    sweep.wake()
    assert woken == [1]

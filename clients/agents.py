"""The coding agents: how each is pointed at a server, told to call a tool, and resumed."""

import json

from clients.desk import FILE, QUESTION, Desk
from clients.order import order


def claude_code(desk: Desk) -> None:
    """Run Claude Code, over Messages."""
    settings = {
        "ANTHROPIC_BASE_URL": desk.url,
        "ANTHROPIC_API_KEY": desk.key,
        "ANTHROPIC_MODEL": "toy",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "toy",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
    claude = desk.program("claude")
    desk.run(claude, "-p", order("Read", file_path=desk.file), **settings)
    desk.run(claude, "-c", "-p", QUESTION, **settings)


_CODEX = """\
model = "toy"
model_provider = "cachescope"
approval_policy = "never"
sandbox_mode = "danger-full-access"
web_search = "disabled"
check_for_update_on_startup = false
analytics.enabled = false

[model_providers.cachescope]
name = "CacheScope"
base_url = "{url}/v1"
env_key = "CACHESCOPE_KEY"
wire_api = "responses"
"""


def codex(desk: Desk) -> None:
    """Run Codex, over Responses."""
    config = desk.home / ".codex" / "config.toml"
    config.parent.mkdir()
    config.write_text(_CODEX.format(url=desk.url))
    command = (desk.program("codex"), "exec", "--skip-git-repo-check")
    desk.run(*command, order("exec_command", cmd=f"cat {FILE}"), CACHESCOPE_KEY=desk.key)
    desk.run(*command, "resume", "--last", QUESTION, CACHESCOPE_KEY=desk.key)


def opencode(desk: Desk) -> None:
    """Run opencode, over Chat Completions."""
    config = {
        "model": "cachescope/claude-toy",
        "small_model": "cachescope/claude-toy",
        "autoupdate": False,
        "share": "disabled",
        "permission": "allow",
        "provider": {
            "cachescope": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "CacheScope",
                "options": {"baseURL": f"{desk.url}/v1", "apiKey": desk.key},
                # It marks a prompt only for models with "claude" in their name.
                "models": {"claude-toy": {"limit": {"context": 131_072, "output": 4096}}},
            }
        },
    }
    (desk.project / "opencode.json").write_text(json.dumps(config))
    settings = {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}
    command = (desk.program("opencode"), "run")
    desk.run(*command, order("read", filePath=desk.file), **settings)
    desk.run(*command, "-c", QUESTION, **settings)


def cline(desk: Desk) -> None:
    """Run Cline's command line, over Chat Completions; two sessions, of which none is resumed."""
    command = desk.program("cline")
    desk.run(
        *(command, "auth", "--provider", "openai-compatible"),
        *("--apikey", desk.key, "--modelid", "toy", "--baseurl", f"{desk.url}/v1"),
    )
    try:
        desk.run(command, order("run_commands", commands=f"[cat {FILE}]"))
        # It resumes a session in a terminal only: this is another one.
        desk.run(command, QUESTION)
    finally:
        # It leaves a daemon behind.
        desk.run(command, "hub", "stop")

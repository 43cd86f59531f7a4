"""The packages that do the job of `cachescope explain`: what each reads, says, and means by it.

They are installed beside this project, in an environment of their own (see `explain.py`). Each is
given the recordings in its own form, without what it would stumble over, and judged by its own
words.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from benchmarks.broken_sessions import Session

Records = list[dict[str, Any]]

RIGHT, PARTLY, WRONG = "right", "partly", "wrong"


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that explains recordings.

    Attributes:
        name: its name.
        command: its command line for a file, from the folder of its program.
        write: makes the lines of a recording in its form.
        judge: says of what it printed whether it names the session's cause, a part of it, or
            another or none.
        compares: whether it compares prompts at all.
    """

    name: str
    command: Callable[[Path, Path], list[str]]
    write: Callable[[Records], Iterable[dict[str, Any]]]
    judge: Callable[[Session, str], str]
    compares: bool = True


def unmarked(value: Any) -> Any:
    """Return a JSON value without cache markers."""
    if isinstance(value, dict):
        return {key: unmarked(one) for key, one in value.items() if key != "cache_control"}
    return [unmarked(one) for one in value] if isinstance(value, list) else value


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(block.get("text") or json.dumps(block) for block in content)


def _chat(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body of Messages as one of Chat, its blocks as text."""
    body = unmarked(body)
    messages = [{"role": "system", "content": _text(body["system"])}]
    messages += [{"role": m["role"], "content": _text(m["content"])} for m in body["messages"]]
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool["name"],
                "description": tool["description"],
                "parameters": tool["input_schema"],
            },
        }
        for tool in body["tools"]
    ]
    return {"model": body["model"], "messages": messages, "tools": tools}


def _in_ours(records: Records) -> Iterable[dict[str, Any]]:
    return records


def _judge_ours(session: Session, printed: str) -> str:
    found = [one["rule"] for one in json.loads(printed)["findings"]]
    if not session.rule:
        return WRONG if found else RIGHT
    if not found or session.rule not in found:
        return WRONG
    return RIGHT if found[0] == session.rule else PARTLY


def _bodies(records: Records) -> Iterable[dict[str, Any]]:
    return (unmarked(record["body"]) for record in records)


def _judge_cachelint(session: Session, printed: str) -> str:
    found = re.search(r"First divergence: (\w+)\S* \((\w+)", printed)
    place, kind = (found[1], found[2]) if found else ("", "")
    if not session.rule:
        return WRONG if place else RIGHT
    if session.rule == "param_changed":
        return RIGHT if "Context differences: tool_choice" in printed else WRONG
    says = {"_added": "inserted", "_removed": "removed", "_changed": "changed"}
    ending = next((words for end, words in says.items() if session.rule.endswith(end)), None)
    plain = session.rule in ("tool_changed", "system_changed", "messages_changed")
    if place != session.area:
        return WRONG
    return RIGHT if ending and ending in kind and (plain or ending != "changed") else PARTLY


def _for_promptcachelint(records: Records) -> Iterable[dict[str, Any]]:
    for record in records:
        told = record.get("usage")
        usage = told and {
            "input_tokens": told["input_tokens"],
            "cache_read": told["cache_read_input_tokens"],
            "cache_write": told["cache_creation_input_tokens"],
        }
        yield {
            "provider": "anthropic",
            "body": record["body"],
            "model": record["body"]["model"],
            "at": record["timestamp"],
            "session_id": record["session_id"],
            "session_explicit": True,
            "usage": usage,
        }


def _judge_promptcachelint(session: Session, printed: str) -> str:
    data = json.loads(printed)
    found = [
        (finding["code"], finding["path"] or "", finding["message"])
        for one in data["sessions"]
        for request in one["requests"]
        for finding in request["findings"]
    ]
    codes = {code for code, *_ in found}
    if not session.rule:
        return WRONG if codes - {"CL011"} else RIGHT
    exact = {
        "model_changed": "CL003",
        "param_changed": "CL003",
        "tool_changed": "CL002",
        "system_changed": "CL001",
        "messages_changed": "CL001",
        "marker_removed": "CL004",
        "expired": "CL006",
        "not_read": "CL005",
    }
    if exact.get(session.rule) in codes:
        return RIGHT
    if session.rule in ("tools_added", "tools_removed") and "CL002" in codes:
        return RIGHT  # It says how many tools there were and are.
    if session.rule in ("system_value", "tool_value", "message_value") and "CL012" in codes:
        return RIGHT
    near = "CL002" in codes if session.area == "tools" else False
    return PARTLY if near or any(path.startswith(session.area) for _, path, _ in found) else WRONG


def _for_kvlint(records: Records) -> Iterable[dict[str, Any]]:
    return (_chat(record["body"]) for record in records)


def _judge_kvlint(session: Session, printed: str) -> str:
    # What it says of blocks, it says of any recording.
    found = set(re.findall(r"(?:high|medium|low)\s+│ (\w+)", printed))
    found -= {"block_straddle", "short_prefix"}
    if not session.rule:
        return WRONG if found else RIGHT
    exact = {
        "tool_keys_reordered": {"key_order"},
        "call_keys_reordered": {"key_order"},
        "system_value": {"dynamic_time", "dynamic_id"},
        "tools_reordered": {"tool_order"},
        "tool_spaces": {"whitespace"},
        "system_spaces": {"whitespace"},
        "message_spaces": {"whitespace"},
        "could_share": {"dynamic_time"},
    }
    if exact.get(session.rule, set()) & found:
        return RIGHT
    return PARTLY if found else WRONG


def _for_prefixcash(records: Records) -> Iterable[dict[str, Any]]:
    usual = {
        "input_tokens": 100,
        "cache_read_input_tokens": 1500,
        "cache_creation_input_tokens": 100,
        "output_tokens": 1,
    }
    for record in records:
        yield {
            **_chat(record["body"]),
            "session_id": record["session_id"],
            "timestamp": record["timestamp"],
            "usage": record.get("usage") or usual,
        }


def _judge_prefixcash(session: Session, printed: str) -> str:
    found = set(re.findall(r"• (\w+):", printed))
    missed = "cache_miss_despite_shared_prefix" in found
    found.discard("cache_miss_despite_shared_prefix")  # It says so of any recording.
    if not session.rule:
        return WRONG if found else RIGHT
    if session.rule == "not_read":
        return RIGHT if missed and not found else PARTLY if missed else WRONG
    dynamic = any(one.startswith("dynamic") for one in found)
    if session.rule in ("system_value", "message_value", "could_share") and dynamic:
        return RIGHT
    return PARTLY if found and session.area in ("system", "messages") else WRONG


def _for_doctor(records: Records) -> Iterable[dict[str, Any]]:
    for record, one in zip(records, _for_prefixcash(records), strict=True):
        body = record["body"]
        yield {"timestamp": record["timestamp"], "request": body, "model": body["model"],
               "usage": one["usage"]}  # fmt: skip


def _judge_doctor(session: Session, printed: str) -> str:
    # It counts what the responses say was read, and compares no prompts.
    if not session.rule:
        return RIGHT
    hit = re.search(r"cache hit ratio\s*:\s*([\d.]+)", printed)
    return PARTLY if session.rule == "not_read" and hit and float(hit[1]) == 0 else WRONG


def tools(folder: Path) -> list[Tool]:
    """Return our tool and its peers.

    Args:
        folder: where to put a tokenizer for the one that asks for one.
    """
    return [
        Tool(
            "cachescope explain",
            lambda programs, file: [str(programs), "explain", str(file), "--json"],
            _in_ours,
            _judge_ours,
        ),
        Tool(
            "cachelint",
            lambda programs, file: [
                *(str(programs / "cachelint"), "analyze", "--provider", "anthropic", str(file))
            ],
            _bodies,
            _judge_cachelint,
        ),
        Tool(
            "promptcachelint",
            lambda programs, file: [
                str(programs / "promptcachelint"),
                "report",
                str(file),
                "--json",
            ],
            _for_promptcachelint,
            _judge_promptcachelint,
        ),
        Tool(
            "kvlint",
            lambda programs, file: [
                *(str(programs / "kvlint"), "lint", str(file), "--model", str(_tokenizer(folder)))
            ],
            _for_kvlint,
            _judge_kvlint,
        ),
        Tool(
            "prefixcash",
            lambda programs, file: [str(programs / "prefixcash"), "diagnose", "--file", str(file)],
            _for_prefixcash,
            _judge_prefixcash,
        ),
        Tool(
            "prompt-cache-doctor",
            lambda programs, file: [str(programs / "pcd"), "analyze", str(file)],
            _for_doctor,
            _judge_doctor,
            compares=False,
        ),
    ]


def _tokenizer(folder: Path) -> Path:
    """Return a folder with this package's tokenizer, as the Hugging Face library reads it."""
    made = folder / "tokenizer"
    if not made.exists():
        made.mkdir()
        packed = (resources.files("vllm_cachescope.cli") / "tokenizer.json.gz").read_bytes()
        (made / "tokenizer.json").write_bytes(gzip.decompress(packed))
        template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
        (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made

"""What the Python programs share: one agent with one tool, whose conversation is kept in a file.

A program runs in the environment of the library that it shows, so that this imports nothing else.
Its working directory holds the handbook and, once there was a turn, the conversation.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

BASE_URL = os.environ["BASE_URL"]
API_KEY = os.environ["API_KEY"]
MODEL = os.environ["MODEL"]
SESSION = os.environ["SESSION"]
PROMPT = sys.argv[-1]
HANDBOOK = Path("handbook.txt").read_text()
CONVERSATION = Path("conversation.json")

DESCRIPTION = "Returns the text of a file."
PARAMETERS = {
    "type": "object",
    "properties": {"path": {"type": "string", "description": "The file."}},
    "required": ["path"],
}


def read_file(path: str) -> str:
    """Returns the text of a file."""
    return Path(path).read_text()


def recall() -> list[Any]:
    """Return the conversation so far, as JSON; empty for a new one."""
    return json.loads(CONVERSATION.read_text()) if CONVERSATION.exists() else []


def remember(messages: list[Any]) -> None:
    """Keep the conversation for the next run."""
    CONVERSATION.write_text(json.dumps(messages))

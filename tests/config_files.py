"""Files that hold the configurations of tests: a secret may not stand on a command line."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_DIRECTORY = Path(__file__).parents[1] / ".cache" / "configs"


def in_file(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``kv_connector_extra_config`` that names a private file with ``config``."""
    text = json.dumps(config)
    path = _DIRECTORY / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    _DIRECTORY.mkdir(parents=True, exist_ok=True)
    # Engines of one configuration start at once: none may find the file empty.
    with tempfile.NamedTemporaryFile("w", dir=_DIRECTORY, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
    return {"config_file": str(path)}

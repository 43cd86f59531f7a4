"""The file of what an order of eviction has learned, which outlives the process."""

import json
import os
from pathlib import Path
from typing import Any

from vllm_cachescope.cache.return_counts import Counted
from vllm_cachescope.logs import logger_of

_MAX_BYTES = 2**26

logger = logger_of(__name__)


def read_learned(path: Path) -> Any:
    """Return what the file holds, for `LearnedOrder.restore`; None if there is no such file or it
    cannot be read, which is logged: what was learned is learned anew then."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("eviction.state_file: %s cannot be used: %s", path, error)
        return None


def write_learned(path: Path, counted: Counted) -> None:
    """Replace the file. What goes wrong is logged, and costs the file only."""
    # Engines of one server may share a configuration: the last one to write wins, and none of them
    # ever finds half a file.
    written = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        written.write_text(json.dumps(counted.state()))
        written.replace(path)
    except OSError as error:
        written.unlink(missing_ok=True)
        logger.warning("eviction.state_file: %s cannot be written: %s", path, error)

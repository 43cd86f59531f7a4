"""The LoRA adapters of an engine: what each of them is, by a digest of its files.

vLLM's block hashes know an adapter by its name and path. Either may stand for other weights
tomorrow, and on another machine stands for other weights today.
"""

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from vllm_cachescope.connectors.vllm import engine_rpc
from vllm_cachescope.connectors.vllm.engine.kv_identity import WEIGHT_SUFFIXES
from vllm_cachescope.logs import logger_of

_CONFIG = "adapter_config.json"
_UNKNOWN = "unknown-"

_Stamps = tuple[tuple[str, int, int, int], ...]

logger = logger_of(__name__)


@dataclass(slots=True)
class _Adapter:
    """An adapter as the workers have it in memory.

    Attributes:
        path: the path that requests give.
        directory: where its files are.
        stamps: name, size, time of change and inode of each file, by which a change is seen.
        identity: the digest of its files; None if they changed while they were read.
        is_loaded: whether vLLM has loaded just these files. It loads an adapter that it was not
            told to load with the first request.
        others: stamps of files that were found to be other ones than those in memory.
    """

    path: str
    directory: Path
    stamps: _Stamps
    identity: str | None
    is_loaded: bool = False
    others: _Stamps | None = None


class Adapters:
    """The adapters that an engine has been asked for, by vLLM's number of each.

    Files are read when an adapter is loaded, and once more when they have changed since. Whether
    the workers still have what was loaded cannot be told then: vLLM drops adapters from memory
    and loads them again as it likes. Such an adapter is unknown until it is loaded anew.
    """

    def __init__(self) -> None:
        self._adapters: dict[int, _Adapter] = {}

    def identity(self, lora: LoRARequest | None) -> str | None:
        """Return what a request's adapter is, or an identity that no other request has if that is
        unknown; None for a request without an adapter.

        To be called once a request, on the thread that takes requests in: it looks at files.
        """
        if lora is None:
            return None
        adapter = self._adapters.get(lora.lora_int_id)
        if adapter is None:
            adapter = self._adapters[lora.lora_int_id] = _read(lora)
        return self._current(adapter, lora) or _UNKNOWN + secrets.token_hex(16)

    def admit(self, lora: LoRARequest, identity: str) -> bool:
        """Settle with which weights a request runs. To be called on the scheduler's thread.

        A request may ask for its adapter to be loaded in place. vLLM does so in each of its steps;
        what it has loaded already need not be loaded again.

        Args:
            lora: the request's adapter.
            identity: what `identity` returned for the request.

        Returns:
            Whether the adapter is what it was to the requests that run with it.
        """
        adapter = self._adapters.get(lora.lora_int_id)
        if is_unknown(identity):
            return not lora.load_inplace
        if adapter is None or adapter.identity != identity:
            return False
        if adapter.is_loaded:
            lora.load_inplace = False
        return True

    def load(self, lora: LoRARequest, load: Callable[[], bool]) -> bool:
        """Have vLLM load an adapter, and note what it loaded.

        Args:
            lora: the adapter.
            load: vLLM's own function.

        Returns:
            What ``load`` returns.
        """
        before = _read(lora).stamps
        loaded = load()
        adapter = _read(lora)
        adapter.is_loaded = True
        if adapter.stamps != before:
            adapter.identity = None
        self._adapters[lora.lora_int_id] = adapter
        return loaded

    def _current(self, adapter: _Adapter, lora: LoRARequest) -> str | None:
        if adapter.path != lora.lora_path or adapter.identity is None:
            return None
        stamps = _stamps(adapter.directory)
        if stamps == adapter.stamps:
            return adapter.identity
        if stamps != adapter.others and _digest(adapter.directory) == adapter.identity:
            # A copy of the same files.
            adapter.stamps, adapter.others = stamps, None
            return adapter.identity
        if adapter.others is None:
            logger.warning(
                "The files of LoRA adapter %r at %s are not those that were loaded: until it is "
                "loaded again, its prompts share nothing",
                lora.lora_name,
                adapter.directory,
            )
        adapter.others = stamps
        return None


def is_unknown(identity: str | None) -> bool:
    """Whether `Adapters.identity` stands for an adapter that is not known."""
    return identity is not None and identity.startswith(_UNKNOWN)


def install() -> None:
    """Have the connector know of each adapter that vLLM's `EngineCore` loads. Installing twice is
    harmless. To be called in the engine's process."""
    from vllm.v1.engine.core import EngineCore

    original: Any = EngineCore.add_lora
    if hasattr(original, "is_noted"):
        return

    @wraps(original)
    def add_lora(core: Any, lora_request: LoRARequest) -> bool:
        connector = engine_rpc.connector_of(core, "load_adapter")
        is_new = lora_request.load_inplace or lora_request.lora_int_id not in core.list_loras()
        load: Callable[[], bool] = partial(original, core, lora_request)
        if connector is None or not is_new:
            return load()
        loaded: bool = connector.load_adapter(lora_request, load)
        return loaded

    add_lora.is_noted = True  # type: ignore[attr-defined]
    setattr(EngineCore, original.__name__, add_lora)


def _read(lora: LoRARequest) -> _Adapter:
    directory = Path(get_adapter_absolute_path(lora.lora_path))
    before = _stamps(directory)
    identity = _digest(directory)
    if _stamps(directory) != before:
        identity = None
    return _Adapter(lora.lora_path, directory, before, identity)


def _files(directory: Path) -> list[Path]:
    try:
        return sorted(
            path
            for path in directory.iterdir()
            if path.name == _CONFIG or path.suffix in WEIGHT_SUFFIXES
        )
    except OSError:
        return []


def _stamps(directory: Path) -> _Stamps:
    stamps = []
    for path in _files(directory):
        try:
            stat = path.stat()
        except OSError:
            continue
        stamps.append((path.name, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return tuple(stamps)


def _digest(directory: Path) -> str | None:
    """Return a digest of an adapter's files; None if there are none, or they cannot be read."""
    digest = hashlib.sha256()
    files = _files(directory)
    try:
        for path in files:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256")
            digest.update(f"{path.name}\n{content.hexdigest()}\n".encode())
    except OSError:
        return None
    return digest.hexdigest() if files else None

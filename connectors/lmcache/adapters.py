"""LMCache's L2 adapters: their configuration, the keys of our objects, what they list."""

import contextlib
import importlib
import logging
import os
from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple

from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters import (
    L2AdapterConfigBase,
    L2AdapterInterface,
    create_l2_adapter,
)
from lmcache.v1.distributed.l2_adapters.config import (
    get_l2_adapter_config_class,
    get_registered_l2_adapter_types,
    get_type_name_for_config,
)

from vllm_cachescope.config import ConfigError
from vllm_cachescope.tiers.keyspace import FORMAT

__all__ = ["Entry", "Kind", "create_l2_adapter", "listed", "name", "parse", "shown"]

MODEL = f"cachescope-{FORMAT}"
"""Stands for the model's name in all keys of ours. The model itself is in the namespace, which
stands for the salt; so one listing finds the entries of all models."""

_PLACE = ("base_path", "host", "port", "startup_nodes", "s3_endpoint", "device_path")
"""Keys of adapters' configurations that say where something is, and are no secret."""

_PAGE = 500

# This logger warns of a mistake whenever an object is deleted that another process had stored.
logging.getLogger("lmcache.v1.distributed.l2_adapters.base").setLevel(logging.ERROR)


class Entry(NamedTuple):
    """A block in the store.

    Attributes:
        namespace: of its model; see `Keyspace`.
        key: as the tier knows it.
    """

    namespace: str
    key: bytes


class Kind:
    """The last byte of an object's key: what the object is."""

    VALUE = b"v"
    EXPIRY = b"e"
    SECRET = b"m"
    CANARY = b"c"


def name(entry: Entry, kind: bytes) -> ObjectKey:
    """Return the key of an object in LMCache."""
    return ObjectKey(entry.key + kind, MODEL, kv_rank=0, cache_salt=entry.namespace)


def parse(adapter: Mapping[str, Any]) -> L2AdapterConfigBase:
    """Return LMCache's own form of an adapter's configuration.

    Raises:
        ConfigError: if there is no such adapter, or it does not take that configuration.
    """
    kind = str(adapter["type"])
    # LMCache itself imports one adapter after the other until the name turns up, and with them
    # every cloud's client library.
    with contextlib.suppress(ImportError):
        importlib.import_module(
            f"lmcache.v1.distributed.l2_adapters.{kind.replace('-', '_')}_l2_adapter"
        )
    try:
        config_class = get_l2_adapter_config_class(kind)
    except (ValueError, ImportError):
        allowed = ", ".join(get_registered_l2_adapter_types())
        raise ConfigError(
            f"adapter.type: LMCache has no such adapter here (value {kind!r}); allowed: {allowed}"
        ) from None
    read = _ReadKeys(adapter)
    try:
        config = config_class.from_dict(read)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"adapter: {error} (value {_without_secrets(adapter)})") from None
    # LMCache takes no notice of keys it does not know.
    for key in adapter:
        if key not in read.keys_read and key != "type":
            allowed = ", ".join(sorted(read.keys_read | {"type"}))
            raise ConfigError(
                f"adapter.{key}: there is no such key for type {kind}; allowed: {allowed}"
            )
    return config


def shown(adapter: Mapping[str, Any]) -> str:
    """Return an adapter's place in a few words, without secrets."""
    place = " ".join(f"{key}={adapter[key]}" for key in _PLACE if key in adapter)
    return f"LMCache {adapter['type']} {place}".rstrip()


def listed(
    config: L2AdapterConfigBase, adapter: L2AdapterInterface
) -> Generator[tuple[Entry, bytes]]:
    """Yield the entries that the store holds, of all namespaces, with the kind of the object.

    Raises:
        NotImplementedError: if this adapter has no way to tell.
    """
    cursor = None
    try:
        while True:
            page = adapter.list_l2_keys(MODEL, _PAGE, cursor)
            for found in page.entries:
                yield from _entry(found.key.chunk_hash_hex, found.key.cache_salt)
            cursor = page.next_page_token
            if cursor is None:
                return
    except NotImplementedError:
        # The file system's adapters cannot list, but name each file after its key.
        if get_type_name_for_config(config) not in ("fs", "fs_native"):
            raise
    with os.scandir(config.base_path) as files:
        for file in files:
            model, *fields = file.name.removesuffix(".data").split("@")
            if model == MODEL and len(fields) == 4 and file.name.endswith(".data"):
                yield from _entry(fields[2], fields[3])


def _entry(key_hex: str, namespace: str) -> Iterator[tuple[Entry, bytes]]:
    try:
        key = bytes.fromhex(key_hex)
    except ValueError:
        return
    if key[-1:] in (Kind.VALUE, Kind.EXPIRY):
        yield Entry(namespace, key[:-1]), key[-1:]


def _without_secrets(adapter: Mapping[str, Any]) -> str:
    harmless = {key for key, value in adapter.items() if not isinstance(value, str)}
    harmless.update(_PLACE, ("type",))
    return ", ".join(f"{k}: {v!r}" if k in harmless else f"{k}: …" for k, v in adapter.items())


class _ReadKeys(dict[str, Any]):
    """A mapping that knows which of its keys were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.keys_read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.keys_read.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self.keys_read.update(super().__iter__())
        return super().__iter__()

    def items(self) -> Any:
        self.keys_read.update(super().__iter__())
        return super().items()

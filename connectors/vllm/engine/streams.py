"""Streams: prompts that pass through the CPU tier in parts, since it cannot hold all of one.

vLLM asks a connector once for a prompt, and takes what it gets in one load. A prompt of which one
part has arrived on the device is therefore made to start anew, as vLLM itself does with a prompt
whose load has failed: what it has read is in the prefix cache, is found there, and the connector is
asked for what comes behind.
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request, RequestStatus


class Streams:
    """The requests between two parts.

    vLLM keeps as many blocks of the device free for each load under way as its request still
    needs. Between two parts a request has none, and would have the whole prompt kept free even of
    itself: on a device that does not hold it twice nothing would be loaded any more.

    Args:
        kv_cache: vLLM's manager of the device's blocks.
    """

    def __init__(self, kv_cache: KVCacheManager) -> None:
        self._kv_cache = kv_cache
        self._between: set[str] = set()
        kv_cache.allocate_slots = self._admitting(kv_cache.allocate_slots)  # type: ignore[method-assign]
        coordinator: Any = kv_cache.coordinator
        coordinator.get_num_blocks_to_allocate = self._unreserved(
            coordinator.get_num_blocks_to_allocate
        )

    def restart(self, request: Request, note: Callable[[], None]) -> bool:
        """Have vLLM look up a request anew whose load has just ended. Its blocks stay in the prefix
        cache; like those of any other request that is over they may be evicted.

        Args:
            request: the request.
            note: is called once its blocks can be found, and before they are free.

        Returns:
            Whether it starts anew; it does not if it is over.
        """
        if request.status is not RequestStatus.WAITING_FOR_REMOTE_KVS:
            return False
        self._kv_cache.cache_blocks(request, request.num_computed_tokens)
        note()
        self._kv_cache.free(request)
        request.num_computed_tokens = 0
        self._between.add(request.request_id)
        return True

    def end(self, request_id: str) -> None:
        """A request is over."""
        self._between.discard(request_id)

    def _admitting(self, allocate: Callable[..., Any]) -> Callable[..., Any]:
        def allocate_and_admit(request: Request, *args: Any, **kwargs: Any) -> Any:
            was_between = request.request_id in self._between
            self._between.discard(request.request_id)
            blocks = allocate(request, *args, **kwargs)
            if was_between and blocks is None:
                self._between.add(request.request_id)
            return blocks

        return allocate_and_admit

    def _unreserved(self, count: Callable[..., int]) -> Callable[..., int]:
        def count_unreserved(request_id: str, *args: Any, **kwargs: Any) -> int:
            return 0 if request_id in self._between else count(request_id, *args, **kwargs)

        return count_unreserved

"""The prefixes that recorded calls have left for each other, whichever conversation they are of."""

import math
import secrets
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

from cachetools import LRUCache

from vllm_cachescope.cli.traffic import Call
from vllm_cachescope.config import Config
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.token_estimate import estimate_tokens
from vllm_cachescope.prompt.request import PromptRequest, Region
from vllm_cachescope.prompt.segments import RegionDefault, Segment, segments
from vllm_cachescope.tenancy.scope import Scope

_PREFIXES = 2**20
"""How many prefixes are kept, some 200 MB; each part of a prompt ends one."""

_DIGEST_BYTES = 8


class SharedPrefixes:
    """The prefixes in the cache, by a chain of hashes over their parts, as an engine's blocks are.

    All calls are taken to be of one organisation, and the scopes to be those that the calls mark,
    or else the defaults.

    Args:
        ttl_s: TTL in seconds of everything, counted from the last use; None for what each
            breakpoint asks for, or the default.
        count: counts the tokens of a part; see `Fingerprinter`.

    Attributes:
        secret: key of the fingerprints that can be compared here.
        count: what they have to count their tokens by.
    """

    def __init__(
        self, ttl_s: float | None, count: Callable[[Any, bytes], int] = estimate_tokens
    ) -> None:
        self.count = count
        self.secret = secrets.token_bytes(32)
        self._ttl_s = ttl_s
        regions = Config().regions
        self._defaults: dict[Region, RegionDefault] = {
            region: regions.of(region) for region in Region
        }
        # By hash of the prefix, when it was last used and how long it lives from then on.
        self._used: LRUCache[bytes, tuple[float, float]] = LRUCache(_PREFIXES)

    def use(self, call: Call, fingerprint: Fingerprint, at: float) -> Mapping[Scope, int]:
        """Record a call. Return how many leading tokens of its prompt earlier calls have left,
        by their scope.

        Args:
            call: the call.
            fingerprint: its prompt's, made under `secret`.
            at: when it was made, in seconds.
        """
        found: dict[Scope, int] = {}
        reading, start = True, 0
        asked = sorted(fingerprint.params.items())
        digest = repr((fingerprint.protocol, fingerprint.model, asked)).encode()
        cut = segments(call.request, self._defaults)
        by_path = _segments_by_path(call.request, cut)
        of_scope: dict[Scope, bytes] = {}
        for i, path in enumerate(fingerprint.paths.split("\n") if len(fingerprint) else ()):
            segment = by_path.get(path, cut[-1])
            sharers = of_scope.get(segment.scope)
            if sharers is None:
                own = call.session if segment.scope is Scope.SESSION else None
                sharers = of_scope[segment.scope] = repr((segment.scope, own)).encode()
            chained = digest + fingerprint.hash(i) + sharers
            digest = blake2b(chained, digest_size=_DIGEST_BYTES).digest()
            used_at, ttl_s = self._used.get(digest, (-math.inf, 0.0))
            reading = reading and at - used_at <= ttl_s
            end = fingerprint.ends[i]
            if reading:
                found[segment.scope] = found.get(segment.scope, 0) + end - start
            start = end
            if reading or segment.covered:
                own_ttl_s = segment.ttl_s if self._ttl_s is None else self._ttl_s
                self._used[digest] = at, max(ttl_s, own_ttl_s)
        return found


def _segments_by_path(request: PromptRequest, cut: tuple[Segment, ...]) -> dict[str, Segment]:
    """Return the segment of each part of a request, by the part's path."""
    left = iter(cut)
    segment = next(left)
    by_path: dict[str, Segment] = {}
    for part in request.parts:
        by_path[part.path] = segment
        if part is segment.after:
            segment = next(left)
    return by_path

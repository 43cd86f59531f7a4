"""The ends of conversations: whose blocks are not used again, and leave the local tiers first."""

from collections.abc import Iterable

from vllm_cachescope.cache.ledger import Ledger
from vllm_cachescope.cache.session_prompts import SessionPrompts
from vllm_cachescope.connectors.vllm.engine.counts import Counts
from vllm_cachescope.connectors.vllm.engine.local_tiers import LocalTiers
from vllm_cachescope.connectors.vllm.engine.prompts import Prompt


class Ends:
    """Has the local tiers evict first what the API side says is over: a session, or a conversation
    of one, such as a subagent that has answered.

    That moves only blocks that no other session has used, and no other conversation of this one. It
    changes what is evicted next, never what can be read: a use makes a block like any other.

    Args:
        local: the local tiers.
        ledger: knows who has used a block.
        counts: counts what goes first.
        max_keys: how many keys of prompts are kept for this.
    """

    def __init__(self, local: LocalTiers, ledger: Ledger, counts: Counts, max_keys: int) -> None:
        self._counts = counts
        self._local = local
        self._ledger = ledger
        self._prompts = SessionPrompts(max_keys)
        # Told when the policy had not heard of the last requests yet, with when that was.
        self._early: list[tuple[list[bytes], float]] = []

    @property
    def prompts(self) -> SessionPrompts:
        """The latest prompts of sessions."""
        return self._prompts

    def on_finished(self, prompt: Prompt, own: int) -> None:
        """A request is over, and ``prompt.used`` are its blocks, of which so many are not
        generated."""
        plan = prompt.plan
        self._prompts.add(plan.owner, plan.nonce, prompt.used, own)

    def end_prompt(self, nonce: str, is_early: bool) -> None:
        """Nothing goes on from a prompt.

        Args:
            nonce: the prompt's nonce.
            is_early: whether the CPU tier's policy has not heard yet of all requests that are over.
        """
        self._retire(*self._prompts.end(nonce), is_early)

    def end_session(self, owner: bytes, is_early: bool) -> int:
        """A session is over; return how many of its blocks go first now, on both tiers together."""
        self._local.drop_expired()
        keys = dict.fromkeys((*self._prompts.end_session(owner), *self._ledger.owned(owner)))
        return self._retire(owner, keys, is_early)

    def purge(self, prefix: bytes) -> None:
        """Forget the sessions whose owner begins with ``prefix``."""
        self._prompts.purge(prefix)

    def on_schedule_end(self) -> None:
        """The policy has heard of all requests that were over before this step."""
        for keys, at in self._early:
            # What was used since goes on.
            unused = [k for k in keys if (e := self._ledger.get(k)) is not None and e.used_at <= at]
            self._local.retire(unused, at)
        self._early.clear()

    def _retire(self, owner: bytes, keys: Iterable[bytes], is_early: bool) -> int:
        own = [key for key in keys if self._is_own(key, owner)]
        if not own:
            return 0
        now = self._local.now()
        if is_early:
            self._early.append((own, now))
        retired = self._local.retire(own, now)
        self._counts.retired.update(retired)
        return sum(retired.values())

    def _is_own(self, key: bytes, owner: bytes) -> bool:
        entry = self._ledger.get(key)
        return entry is not None and owner in (entry.user, entry.owner)

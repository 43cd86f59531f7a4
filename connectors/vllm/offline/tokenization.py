"""The tokenisation of texts as vLLM's completions have it, which remembers what repeats."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from cachetools import LRUCache

REMEMBERED_TOKENS = 4_000_000
"""How many tokens of prompts and of their beginnings are kept, some 32 MB."""


class Tokenization:
    """Tokenises texts.

    Args:
        renderer: vLLM's renderer.
    """

    def __init__(self, renderer: Any) -> None:
        self._renderer = renderer
        self._known: LRUCache[tuple[str, str], list[int]] = LRUCache(REMEMBERED_TOKENS, len)

    def tokens(self, texts: Iterable[str], org: str) -> dict[str, list[int]]:
        """Return the tokens of each of ``texts``.

        Args:
            texts: the texts.
            org: the organisation that they are for. What is kept is kept for it alone: the time
                tells others of no text.

        Raises:
            ValueError: vLLM's, if a text is too long for the model.
        """
        params = self._renderer.default_cmpl_tok_params
        found: dict[str, list[int]] = {}
        for text in texts:
            if (tokens := self._known.get((org, text))) is None:
                (prompt,) = self._renderer.tokenize_prompts([{"prompt": text}], params)
                tokens = self._remember((org, text), prompt)
            found[text] = tokens
        return found

    async def tokens_async(self, texts: Iterable[str], org: str) -> dict[str, list[int]]:
        """Do what `tokens` does, on vLLM's own thread for it."""
        params = self._renderer.default_cmpl_tok_params

        async def one(text: str) -> list[int]:
            if (tokens := self._known.get((org, text))) is not None:
                return tokens
            (prompt,) = await self._renderer.tokenize_prompts_async([{"prompt": text}], params)
            return self._remember((org, text), prompt)

        ordered = list(texts)
        return dict(zip(ordered, await asyncio.gather(*map(one, ordered)), strict=True))

    def _remember(self, key: tuple[str, str], prompt: Any) -> list[int]:
        tokens = list(prompt["prompt_token_ids"])
        with suppress(ValueError):  # Longer than all that may be kept.
            self._known[key] = tokens
        return tokens

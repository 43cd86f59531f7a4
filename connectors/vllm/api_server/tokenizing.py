"""The tokenising of prompts by vLLM's own tokenizer, of which what is known is not done again."""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

from vllm_cachescope.api.request_context import current_request
from vllm_cachescope.logs import logger_of
from vllm_cachescope.prompt.boundaries import SpecialTokens
from vllm_cachescope.prompt.known_tokens import Cuts, KnownTokens
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tenancy.shares import AccountOf, own_account

logger = logger_of(__name__)

FIRST_CHECKS = 8
"""So many of the first prompts whose beginning is known are tokenised as a whole all the same, to
see that both ways agree."""

CHECK_EVERY = 1024
"""And one of so many later on."""

SHORTEST = 2_000
"""Characters from which on a prompt is looked up: a shorter one is tokenised as quickly."""


LARGE = 2**18
"""Characters from which on a prompt is looked through on a thread of its own, so that streams of
others go on: it may be nothing but special tokens."""


class Tokenizing:
    """Tokenises prompts, each from where its beginning is known.

    Args:
        renderer: vLLM's renderer, with its tokenizer.
        token_bytes: memory for the tokens of recent prompts, in bytes; 0 to keep none.
        account_of: returns who answers for an organisation, by its id.
    """

    def __init__(
        self, renderer: Any, token_bytes: int, account_of: AccountOf = own_account
    ) -> None:
        self._tokenize = renderer.tokenize_prompts_async
        self._known = known_tokens_of(renderer, token_bytes, account_of)
        self._found = itertools.count()

    def purge(self, org: str | None = None, session: str | None = None) -> None:
        """Drop the tokens that are kept of ``org``, or of one session of ``org``; with None, of
        everyone."""
        if self._known is not None:
            self._known.purge(org, session)

    async def __call__(self, prompts: Sequence[Any], params: Any, readers: Caller | None) -> Any:
        """Do what the renderer's `tokenize_prompts_async` does.

        Args:
            prompts, params: as it takes them.
            readers: who may find what is kept of the prompt: nobody else can tell by the time that
                this takes whether such a prompt was here before. None to keep nothing.
        """
        cuts, tokens = None, None
        if self._known is not None and readers is not None and _is_plain(prompts, params):
            text = prompts[0]["prompt"]
            try:
                cuts = await _cuts(self._known, text)
                tokens = await self._go_on(self._known, readers, text, cuts, params)
            except Exception:
                logger.exception("What is known of a prompt's tokens could not be used")
        if tokens is not None:
            return await self._tokenize([{**prompts[0], "prompt_token_ids": tokens}], params)
        tokenized = await self._tokenize(prompts, params)
        _count(tokenized)
        if self._known is not None and readers is not None and cuts is not None:
            self._known.keep(readers, cuts, tokenized[0]["prompt_token_ids"])
        return tokenized

    async def _go_on(
        self, known: KnownTokens, readers: Caller, text: str, cuts: Cuts, params: Any
    ) -> list[int] | None:
        """Return the tokens of a text whose beginning is known; None if it is not, or if vLLM is
        to refuse the text for its length."""
        if (beginning := known.find(readers, cuts)) is None:
            return None
        rest = [{"prompt": text[cuts.starts[beginning.cut] :]}]
        try:
            (tail,) = await self._tokenize(rest, params)
        except Exception:
            return None  # Too long by itself, say: vLLM will say so of the whole.
        ids = tail["prompt_token_ids"]
        tokens = [*beginning.tokens, *ids]
        if params.max_input_tokens is not None and len(tokens) > params.max_input_tokens:
            return None
        if self._is_to_be_checked() and not await self._agrees(text, tokens, params):
            return None
        known.keep(readers, cuts, ids, beginning)
        _count([tail], known=len(beginning.tokens))
        return tokens

    def _is_to_be_checked(self) -> bool:
        number = next(self._found)
        return number < FIRST_CHECKS or number % CHECK_EVERY == 0

    async def _agrees(self, text: str, tokens: list[int], params: Any) -> bool:
        """Whether a text as a whole has these tokens. If not, nothing is remembered from here
        on."""
        (whole,) = await self._tokenize([{"prompt": text}], params)
        if list(whole["prompt_token_ids"]) == tokens:
            return True
        logger.warning(
            "The model's tokenizer gives a prompt other tokens than its parts: each prompt is "
            "tokenised as a whole"
        )
        self._known = None
        return False


def known_tokens_of(
    renderer: Any, token_bytes: int, account_of: AccountOf = own_account
) -> KnownTokens | None:
    """Return what remembers a tokenizer's tokens; None if nothing is to be kept, or the tokenizer
    may not cut its special tokens out of a text before all else.

    Args:
        renderer: vLLM's renderer.
        token_bytes: memory for the tokens, in bytes.
        account_of: returns who answers for an organisation, by its id.
    """
    tokenizer = renderer.tokenizer
    if not token_bytes or not getattr(tokenizer, "is_fast", False):
        return None
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    found = {number: token for number, token in added if not token.normalized}
    odd = {number for number, token in found.items() if token.lstrip or token.single_word}
    if len(odd) == len(found):
        return None
    special = SpecialTokens({token.content: number for number, token in found.items()})
    return KnownTokens(special, odd, limit=token_bytes, account_of=account_of)


async def _cuts(known: KnownTokens, text: str) -> Cuts:
    if len(text) < LARGE:
        return known.cuts(text)
    return await asyncio.to_thread(known.cuts, text)


def _count(tokenized: Sequence[Any], known: int = 0) -> None:
    """Have the request's context count what was tokenised for it, and what was known."""
    context = current_request.get()
    if context is not None:
        context.known_tokens += known
        context.new_tokens += sum(
            len(prompt["prompt_token_ids"])
            for prompt in tokenized
            if isinstance(prompt, dict) and "prompt" in prompt and "prompt_token_ids" in prompt
        )


def _is_plain(prompts: Sequence[Any], params: Any) -> bool:
    """Whether there is one text, to be tokenised as it is."""
    if len(prompts) != 1 or not isinstance(prompts[0], dict):
        return False
    (prompt,) = prompts
    text = prompt.get("prompt")
    return (
        isinstance(text, str)
        and len(text) >= SHORTEST
        and not {"prompt_token_ids", "prompt_embeds", "multi_modal_data"} & prompt.keys()
        and not params.add_special_tokens
        and not params.do_lower_case
        and params.pad_prompt_tokens is None
        and params.truncate_prompt_tokens is None
        and not params.return_token_offsets
    )

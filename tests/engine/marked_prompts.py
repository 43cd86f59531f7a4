"""Marked prompts, put to an `LLM` with `PromptCache`; what is told of each as plain data."""

from collections.abc import Callable, Sequence
from typing import Any

from tests.engine.clock import Clock
from vllm_cachescope import Breakpoint, Cached, CachedOutput, Conversation, Prompt, PromptCache

HANDBOOK = list(range(300, 1200))
CUTS = (Breakpoint(640, "global", "1h"), Breakpoint(896, "org", "5m"))
TEXT = "Everyone reads the same handbook, page by page. " * 60

Told = tuple[dict[str, int], dict[int, int], int]
"""Tokens read by tier, created by lifetime, and neither."""


def told(outputs: Sequence[CachedOutput[Any]]) -> list[Told]:
    """Return what the engine reports on each prompt."""
    for output in outputs:
        assert output.cache.engine is not None
        assert output.cache.prompt_tokens == len(output.output.prompt_token_ids)
        assert output.cache.read_tokens == output.output.num_cached_tokens
    caches = [output.cache for output in outputs]
    return [(it.read_by_tier, it.created_by_ttl, it.uncached_tokens) for it in caches]


def generate(llm: Any, clock: Clock) -> dict[str, Any]:
    """Generate for prompts of several callers."""
    from vllm import SamplingParams

    cache, greedy = PromptCache(llm), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm.reset_prefix_cache(reset_connector=True)
    found: dict[str, Any] = {}

    def run(*prompts: Prompt, params: SamplingParams = greedy) -> list[CachedOutput[Any]]:
        return cache.generate(prompts, params, use_tqdm=False)

    both = [Prompt(HANDBOOK, CUTS, org=org) for org in ("acme", "globex")]
    cold, hot = run(*both), run(*both)
    found["cold"], found["hot"] = told(cold), told(hot)
    found["same tokens"] = all(
        one.output.outputs[0].token_ids == other.output.outputs[0].token_ids
        for one, other in zip(cold, hot, strict=True)
    )
    clock.advance(301)
    found["expired"] = told(run(both[0]))
    llm.reset_prefix_cache()
    found["from the CPU tier"] = told(run(both[0]))

    pieces = [Cached(HANDBOOK[:512], "session"), HANDBOOK[512:]]
    sessions = [Prompt.of(*pieces, org="acme", session=name) for name in ("one", "two", "one")]
    found["sessions"] = [told(run(prompt))[0] for prompt in sessions]

    direct = {"prompt_token_ids": [*reversed(HANDBOOK)]}
    (output,) = llm.generate([direct], greedy, use_tqdm=False)
    assert output.kv_transfer_params is None
    found["unmarked"] = told(run(Prompt(direct["prompt_token_ids"])))
    found["unmarked, of another"] = told(run(Prompt(direct["prompt_token_ids"], org="acme")))

    samples = SamplingParams(n=2, max_tokens=2, seed=1)
    (several,) = run(both[0], params=samples)
    found["samples"] = len(several.output.outputs), told([several])
    stop = hot[0].output.outputs[0].text[:1]
    (stopped,) = run(both[0], params=SamplingParams(temperature=0, max_tokens=8, stop=[stop]))
    found["stopped"] = stopped.output.outputs[0].finish_reason, told([stopped])
    each = [SamplingParams(max_tokens=count) for count in (3, 1)]
    outputs = cache.generate(both, each, use_tqdm=False)
    found["each its own"] = [len(it.output.outputs[0].token_ids) for it in outputs]

    found["text"] = told(
        run(*(Prompt.of(Cached(TEXT, "global"), f" I am {o}.", org=o) for o in ("acme", "globex")))
    )
    found["text tokens"] = len(llm.get_tokenizer()(TEXT)["input_ids"])
    found["chat"] = _chat(cache, greedy)
    found["mistakes"] = [
        _mistake(lambda: run(both[0], Prompt(HANDBOOK, [Breakpoint(9, ttl="1y")]))),
        _mistake(lambda: cache.chat(Conversation([_system("1y")]), greedy)),
        _mistake(lambda: cache.generate(both, [greedy])),
    ]
    llm.enqueue([direct], greedy, use_tqdm=False)
    found["mistakes"].append(_mistake(lambda: run(both[0])))
    llm.wait_for_completion(use_tqdm=False)
    return found


def embed(llm: Any) -> dict[str, Any]:
    """Embed one prompt of two organisations, twice."""
    cache = PromptCache(llm)
    llm.reset_prefix_cache(reset_connector=True)
    both = [Prompt(HANDBOOK, CUTS, org=org) for org in ("acme", "globex")]
    encode = {"pooling_task": "embed", "use_tqdm": False}
    return {
        "cold": told(cache.embed(both, use_tqdm=False)),
        "hot": told(cache.encode(both, **encode)),
    }


def _chat(cache: PromptCache, params: Any) -> list[tuple[Told, int]]:
    """Put a conversation of each of two organisations; return what is told of it, and how long
    its prompt is."""
    conversations = [
        Conversation([_system("1h"), {"role": "user", "content": f"I am {org}."}], org=org)
        for org in ("acme", "globex")
    ]
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    outputs = cache.chat(conversations, params, tools=tools, use_tqdm=False)
    return list(zip(told(outputs), (it.cache.prompt_tokens for it in outputs), strict=True))


def _system(ttl: str) -> dict[str, Any]:
    marker = {"type": "ephemeral", "scope": "global", "ttl": ttl}
    return {
        "role": "system",
        "content": [{"type": "text", "text": TEXT, "cache_control": marker}],
    }


def _mistake(run: Callable[[], object]) -> str:
    try:
        run()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""

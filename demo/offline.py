"""``python -m demo.offline MODEL``: an `LLM` with scopes and lifetimes, and without a server."""

import sys
from typing import Any

from vllm import LLM, SamplingParams

from vllm_cachescope import Cached, Prompt, PromptCache

HANDBOOK = "\n".join(f"{n}. Rule {n} of the handbook holds for everyone." for n in range(80))
NOTES = {
    org: "\n".join(f"Note {n} is for {org} only." for n in range(60)) for org in ("acme", "globex")
}


def main(model: str, **options: Any) -> None:
    """Put one question to ``model`` for each of two organisations, twice."""
    transfer = {
        "kv_connector": "CacheScopeConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes": "256MiB"},
    }
    llm = LLM(model, kv_transfer_config=transfer, **options)
    cache = PromptCache(llm)
    prompts = [
        Prompt.of(
            Cached(HANDBOOK, scope="global", ttl="1h"),  # Shared by all organisations.
            Cached(notes, scope="org", ttl="5m"),  # Shared inside this one.
            "\nWhat holds for me?",  # Not cached.
            org=org,
        )
        for org, notes in NOTES.items()
    ]
    for _ in range(2):
        for output in cache.generate(prompts, SamplingParams(max_tokens=8), use_tqdm=False):
            report = output.cache
            print(
                f"{report.prompt_tokens} tokens: read {report.read_by_tier}, "
                f"created {report.created_by_ttl}, uncached {report.uncached_tokens}"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])

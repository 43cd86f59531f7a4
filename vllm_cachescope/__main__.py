"""``python -m vllm_cachescope`` is the command ``cachescope``."""

import sys

from vllm_cachescope.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

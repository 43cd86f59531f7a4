"""Trains the tokenizer that comes with `cachescope report`, on this repository's own text.

    .venv/bin/python scripts/train_tokenizer.py              # write the tokenizer
    .venv/bin/python scripts/train_tokenizer.py --compare … --text …

With ``--compare`` nothing is written: the shipped tokenizer is compared with real ones
(``tokenizer.json`` files; Mistral's Tekken, which comes with vLLM, always; OpenAI's if the package
`bpe-openai` is installed), on conversations of the demo's agent, on files of Python's standard
library, and on the files named by ``--text``. It prints the scale that fits best and the mean error
of a text under it.
"""

import argparse
import gzip
import json
import statistics
import subprocess
import sysconfig
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from demo.session import agent_session
from vllm_cachescope.cli.token_counter import SCALE, SPLIT, shipped_tokenizer

ROOT = Path(__file__).parents[1]
DATA = ROOT / "vllm_cachescope" / "cli" / "tokenizer.json.gz"
VOCABULARY = 8192
_CUT = 50_000  # characters of a text that are compared


def train() -> Tokenizer:
    """Return a byte-level BPE of `VOCABULARY` entries, trained on the files of this repository."""
    names = subprocess.check_output(
        ["git", "ls-files", "*.py", "*.md", "*.yaml", "*.toml"], cwd=ROOT, text=True
    )
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in sorted(names.split())]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        max_token_length=24,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def references(files: list[Path]) -> dict[str, Callable[[str], int]]:
    """Return the real tokenizers to compare with, each as a function that counts, by name."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    data = resources.files("mistral_common") / "data" / "tekken_240911.json"
    with resources.as_file(data) as path:
        tekken = Tekkenizer.from_file(str(path))
    found: dict[str, Callable[[str], int]] = {
        "tekken": lambda text: len(tekken.encode(text, bos=False, eos=False))
    }
    try:
        import bpe_openai
    except ImportError:
        pass
    else:
        for name in ("cl100k_base", "o200k_base"):
            encoding = bpe_openai.get_encoding(name)
            found[name] = lambda text, encoding=encoding: len(
                encoding.encode(text, disallowed_special=())
            )
    for file in files:
        real = Tokenizer.from_file(str(file))
        found[str(file)] = lambda text, real=real: len(real.encode(text, add_special_tokens=False))
    return found


def texts(files: list[Path]) -> list[str]:
    """Return the texts on which tokenizers are compared."""
    found = [json.dumps(agent_session(seed, 8, 12).body(7)) for seed in range(4)]
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [*sorted(library.glob("[a-e]*.py"))[:20], *files]
    found += [path.read_text(encoding="utf-8", errors="replace")[:_CUT] for path in sources]
    return [text for text in found if len(text) >= 500]


def compare(tokenizers: list[Path], files: list[Path], console: Console) -> None:
    """Print how far the shipped tokenizer's counts are from those of real ones."""
    shipped, real, compared = shipped_tokenizer(), references(tokenizers), texts(files)
    counts = {name: [count(text) for text in compared] for name, count in real.items()}
    means = [statistics.mean(values) for values in zip(*counts.values(), strict=True)]
    own = [len(shipped.encode(text)) for text in compared]
    quarter = [len(text.encode()) / 4 for text in compared]
    fits = statistics.geometric_mean(a / b for a, b in zip(means, own, strict=True))
    table = Table(title=f"Mean error of {len(compared)} texts", title_justify="left")
    columns = "against", f"shipped × {SCALE}", f"shipped × {fits:.3f}, fits best", "bytes / 4"
    for column in columns:
        table.add_column(column)

    def error(mine: list[float], theirs: list[int]) -> str:
        return f"{statistics.mean(abs(a / b - 1) for a, b in zip(mine, theirs, strict=True)):.1%}"

    for name, values in counts.items():
        scaled = [[scale * n for n in own] for scale in (SCALE, fits)]
        table.add_row(name, *(error(mine, values) for mine in (*scaled, quarter)))
    console.print(table)


def main() -> None:
    """Train, or compare, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compare", nargs="*", type=Path, metavar="TOKENIZER_JSON")
    parser.add_argument("--text", nargs="*", type=Path, default=[], metavar="FILE")
    options = parser.parse_args()
    if options.compare is None:
        packed = gzip.compress(train().to_str().encode(), 9, mtime=0)
        DATA.write_bytes(packed)
        print(f"{DATA.relative_to(ROOT)}: {len(packed):,} bytes")
    else:
        compare(options.compare, options.text, Console())


if __name__ == "__main__":
    main()

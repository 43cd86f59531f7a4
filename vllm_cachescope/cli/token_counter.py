"""Counts the tokens of a request's parts, with a real tokenizer."""

import gzip
import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vllm_cachescope.diagnosis.token_estimate import estimate_tokens, is_media

DEFAULT = "cachescope"
"""Names the tokenizer that comes with this package."""

SPLIT = (
    r"'(?:[sdmt]|ll|ve|re)\b|(?:[^\w\r\n]|_)?[^\W\d_]{1,64}|\d{1,3}"
    r"| ?(?:[^\w\s]|_){1,64}[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Cuts text into the words of the shipped tokenizer."""

SCALE = 0.726
"""Tokens of a large model's tokenizer for each of the shipped one, whose vocabulary is small.

Fitted to five tokenizers; `docs/report.md` has the errors that remain."""

_DATA = "tokenizer.json.gz"
_MAX_WORDS = 2**17

TextCount = Callable[[str], float]
"""Returns how many tokens a text has."""


class TokenizerError(ValueError):
    """A tokenizer that cannot be found or read."""


class TokenCounter:
    """Counts the tokens of parts, as `Fingerprinter` asks for them.

    Only the texts count that a template renders: what it puts around them does not.

    Args:
        count: returns the tokens of a text.
        name: what the counts are by, for readers of a report.
    """

    def __init__(self, count: TextCount, name: str) -> None:
        self._count = count
        self.name = name

    def __call__(self, content: Any, data: bytes) -> int:
        """Return how many tokens a part has; an image counts as `estimate_tokens` has it.

        Args:
            content: the part's content.
            data: its canonical bytes.
        """
        text = _text(content)
        if text is None:
            if _has_media(content):
                return estimate_tokens(content, data)
            text = data.decode("utf-8", "replace")
        return round(self._count(text)) or int(text != "")


def load_counter(name: str = DEFAULT) -> TokenCounter:
    """Return the counter of a tokenizer.

    Args:
        name: `DEFAULT`, a ``tokenizer.json``, a folder that has one, such as a model's, or a
            model's name on the Hugging Face hub.

    Raises:
        TokenizerError: if there is none, or it cannot be read.
    """
    if name == DEFAULT:
        return TokenCounter(_shipped(), "the tokenizer that comes with cachescope")
    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.exists():
            tokenizer = Tokenizer.from_file(str(path))
        elif name.startswith((".", "/", "~")) or path.suffix == ".json":
            raise TokenizerError(f"{path}: there is no such file")
        else:
            tokenizer = Tokenizer.from_pretrained(name)
    except TokenizerError:
        raise
    except Exception as error:  # the library's own errors are bare `Exception`s
        raise TokenizerError(f"{name}: not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TokenCounter(
        lambda text: len(tokenizer.encode(_sound(text), add_special_tokens=False)), name
    )


def shipped_tokenizer() -> Tokenizer:
    """Return the tokenizer that comes with this package; its counts are to be scaled by `SCALE`."""
    packed = (resources.files("vllm_cachescope.cli") / _DATA).read_bytes()
    return Tokenizer.from_str(gzip.decompress(packed).decode())


def _shipped() -> TextCount:
    """Return a counter that remembers the tokens of words: three times as fast as the library."""
    tokenizer = shipped_tokenizer()
    words = re.compile(SPLIT).findall
    known: dict[str, int] = {}

    def count(text: str) -> float:
        tokens = 0
        for word in words(text):
            length = known.get(word)
            if length is None:
                if len(known) >= _MAX_WORDS:
                    known.clear()
                length = known[word] = len(tokenizer.encode(_sound(word)))
            tokens += length
        return tokens * SCALE

    return count


def _sound(text: str) -> str:
    """Return ``text`` without halves of surrogate pairs, which have no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _text(content: Any) -> str | None:
    """Return what is rendered of a part that is little but text; None for any other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Mapping):
        return None
    for key in ("text", "content", "output"):
        inner = content.get(key)
        if isinstance(inner, str):
            return inner
        if isinstance(inner, list) and inner and all(_is_text(block) for block in inner):
            return "\n".join(block["text"] for block in inner)
    return None


def _is_text(block: Any) -> bool:
    return isinstance(block, Mapping) and isinstance(block.get("text"), str)


def _has_media(content: Any) -> bool:
    if not isinstance(content, Mapping):
        return False
    inner = content.get("content")
    blocks = inner if isinstance(inner, list) else []
    return any(isinstance(one, Mapping) and is_media(one) for one in (content, *blocks))

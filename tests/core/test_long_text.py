"""Long texts come out of their slices as if they had been worked on at once."""

import random
import threading
import time
from collections.abc import Callable

import pytest

from vllm_cachescope.diagnosis.canonical import canonical_content, loosened
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.diagnosis.long_text import SLICE, evened, is_even, utf8
from vllm_cachescope.prompt.request import Part, PromptRequest, Protocol, Region

PIECES = ["word", "w" * 50, " ", "  ", "\n", "\u2003", "ä", "\U0001f600", "\ud83d", " x "]


def text_around(at: int, rng: random.Random) -> str:
    """A text with anything around the character at which its slices meet."""
    around = "".join(rng.choices(PIECES, k=40))
    return ("ab " * at)[: at - rng.randrange(len(around))] + around + " end" * 10


@pytest.mark.parametrize("seed", range(40))
def test_slices_make_no_difference(seed: int) -> None:
    rng = random.Random(seed)
    text = text_around(SLICE * rng.randint(1, 3), rng)
    assert utf8(text) == text.encode("utf-8", "surrogatepass")
    words = " ".join(text.split())
    assert evened(text) == words
    assert is_even(words) and is_even(text) == (text == words)


@pytest.mark.parametrize(
    "text", ["", " ", "\n" * (2 * SLICE), "a" * (2 * SLICE), " a", "a ", "a\nb"]
)
def test_texts_of_one_kind(text: str) -> None:
    words = " ".join(text.split())
    assert evened(text) == words and is_even(text) == (text == words)


def test_long_texts_have_the_fingerprints_of_what_they_say() -> None:
    text = "some words " * SLICE
    block = {"type": "text", "text": text}
    assert canonical_content(block) == canonical_content(text)
    spaced = text + "\n"
    assert loosened(text, text) == loosened(spaced, spaced) is not None
    made = [
        Fingerprinter(b"secret")(
            PromptRequest(
                Protocol.MESSAGES, "m", (Part(Region.MESSAGES, "messages[0]", content, "user"),)
            )
        ).hashes
        for content in (text, block, text + "x")
    ]
    assert made[0] == made[1] != made[2]


def longest_wait_ms(work: Callable[[], object]) -> float:
    """How long this thread waits at most for its turn while another one works."""
    working = threading.Thread(target=work)
    working.start()
    longest, before = 0.0, time.perf_counter()
    while working.is_alive():
        time.sleep(0.0005)
        longest, before = max(longest, time.perf_counter() - before), time.perf_counter()
    return 1000 * longest


def test_the_fingerprint_of_a_long_text_leaves_other_threads_their_turns() -> None:
    text = "some words\n" * 1_400_000
    parts = (Part(Region.MESSAGES, "messages[0]", text, "user"),)
    request = PromptRequest(Protocol.MESSAGES, "m", parts)
    at_once = min(longest_wait_ms(lambda: " ".join(text.split())) for _ in range(2))
    waited = min(longest_wait_ms(lambda: Fingerprinter(b"secret")(request)) for _ in range(3))
    assert waited < at_once / 4, f"{waited:.0f} ms, where all at once takes {at_once:.0f}"

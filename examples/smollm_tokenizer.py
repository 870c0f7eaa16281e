"""The tokenizer of SmolLM2: byte pair encoding as in GPT-2, with each digit as a token of its own.

`smollm.py` and `serve.py` use this file; it prints nothing.

Source: Radford et al., Language models are unsupervised multitask learners, 2019,
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
"""

from __future__ import annotations

import codecs
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator

# A contraction, a word, or a run of signs, the last two with the space before them; what is left are spaces.
PIECES = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[^\W\d_]+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+")


def readable_bytes() -> dict[int, str]:
    """The letter that stands for each byte in the vocabulary: itself if it can be seen, else one of those from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = itertools.count(256)
    return {byte: chr(byte if byte in seen else next(others)) for byte in range(256)}


class Tokenizer:
    """Text to numbers and back.

    Args:
      words: the vocabulary, in order.
      merges: pairs of words that are merged, the most frequent first: ``"a b"``.
      special: words that are never merged from others, such as ``"<|im_start|>"``.
    """

    def __init__(self, words: list[str], merges: list[str], special: Iterable[str] = ()) -> None:
        self.words = words
        self.numbers = {word: number for number, word in enumerate(words)}
        self.ranks = {tuple(pair.split(" ")): rank for rank, pair in enumerate(merges)}
        self.special = frozenset(special)
        self.letters = readable_bytes()
        self.bytes = {letter: byte for byte, letter in self.letters.items()}
        self.merge = functools.lru_cache(maxsize=100_000)(self._merge)

    def encode(self, text: str) -> list[int]:
        """The numbers of a text."""
        whole = re.split("(" + "|".join(map(re.escape, self.special)) + ")", text) if self.special else [text]
        numbers: list[int] = []
        for part in whole:
            if part in self.special:
                numbers.append(self.numbers[part])
            else:
                for piece in pieces_of(part):
                    numbers += self.merge("".join(self.letters[byte] for byte in piece.encode()))
        return numbers

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of some numbers."""
        return "".join(self.stream(numbers))

    def stream(self, numbers: Iterable[int]) -> Iterator[str]:
        """The text of some numbers, piece by piece as they come; a letter may take several of them."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for number in numbers:
            word = self.words[number]
            yield word if word in self.special else decoder.decode(bytes(self.bytes[letter] for letter in word))
        yield decoder.decode(b"", final=True)

    def _merge(self, piece: str) -> list[int]:
        parts = list(piece)
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in itertools.pairwise(parts)]
            best = min(ranks)
            if best == len(self.ranks):
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.numbers[part] for part in parts]


def pieces_of(text: str) -> Iterator[str]:
    """What is merged each for itself."""
    runs = itertools.groupby(text, lambda letter: unicodedata.category(letter).startswith("N"))
    for is_number, letters in runs:
        run = "".join(letters)
        yield from run if is_number else PIECES.findall(run)

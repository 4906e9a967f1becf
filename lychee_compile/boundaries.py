"""Boundary strengths: how strongly each token of a vocabulary ends a piece of meaning.

LycheeCluster (arXiv 2603.08453) cuts the sequence at its natural boundaries, paragraph before line
before sentence before clause. A model sees token ids alone. So the text is read once per
vocabulary, not per token generated: `boundary_table` returns a table from token id to the strength
of the cut *after* that token.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Boundary(IntEnum):
    """Strength of the cut after a token; a larger number is a stronger cut."""

    NONE = 0
    CLAUSE = 1
    SENTENCE = 2
    LINE = 3
    PARAGRAPH = 4


SENTENCE_MARKS = ".!?…‥‼‽⁇⁈⁉。！？．｡︒﹒﹖﹗।॥؟۔։።፧፨།༎။។៕\u037e"
CLAUSE_MARKS = ",;:—，、；：､﹐﹑﹔﹕،؛٬·՝၊፣፤፥፦"
OPENERS = "{[(\"'`“‘„«‹（［｛「『【《〈〔〖"
CLOSERS = "}])\"'`”’»›）］｝」』】》〉〕〗"
BRACKETS = "}])）］｝」』】》〉〕〗"

_LINE_BREAK = re.compile("\r\n|[\n\r\x0b\x85\u2028]")
_PAGE_BREAK = re.compile("[\x0c\u2029]")
_SENTENCE = re.compile(f"[{SENTENCE_MARKS}][{re.escape(CLOSERS)}]*\\Z")
# In code and JSON a statement, a call with its block, or an object ends: `);` `})` `},`.
_STATEMENT = re.compile(r"""(?:[)\]}]["'`]?;|(?<!\{)\}[)\]}]*,|(?<!\{)\}[)\]}]+)\Z""")
_CLAUSE = re.compile(f"(?:(?<!:):|[{CLAUSE_MARKS.replace(':', '')}{re.escape(BRACKETS)}])\\Z")


def token_boundary(text: str) -> Boundary:
    """Return the strength of the cut after a token that stands for `text`."""
    stem = text.rstrip()
    tail = text[len(stem) :]
    breaks = len(_LINE_BREAK.findall(tail)) + 2 * len(_PAGE_BREAK.findall(tail))
    if breaks:
        return Boundary.PARAGRAPH if breaks > 1 else Boundary.LINE
    if not stem or stem[-1].isalnum():
        return Boundary.NONE
    if _SENTENCE.search(stem):
        return Boundary.SENTENCE
    # `},{"` and `: "` end something and open the next thing in one token.
    ended = stem.rstrip(OPENERS + " ")
    if _STATEMENT.search(ended):
        return Boundary.SENTENCE
    return Boundary.CLAUSE if _CLAUSE.search(ended) else Boundary.NONE


class BoundaryTable:
    """Boundary strength of every token of a vocabulary; immutable, equal if the contents are.

    `strengths` is uint8 [vocab]; larger values are stronger, 0 is no boundary. Raises TypeError for
    another dtype, ValueError for another shape or an empty vocabulary.
    """

    __slots__ = ("__weakref__", "_copies", "_digest", "strengths")

    def __init__(self, strengths: Tensor) -> None:
        if strengths.dtype != torch.uint8:
            raise TypeError(f"boundary strengths must be uint8, got {strengths.dtype}")
        if strengths.dim() != 1 or not len(strengths):
            shape = list(strengths.shape)
            raise ValueError(f"boundary strengths must have shape [vocab], got {shape}")
        self.strengths = strengths.detach().cpu().clone()
        self._digest = hashlib.blake2b(self.strengths.numpy().tobytes(), digest_size=16).digest()
        self._copies: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.strengths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BoundaryTable) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundaryTable:
        return self

    def __reduce__(self) -> tuple[type[BoundaryTable], tuple[Tensor]]:
        return BoundaryTable, (self.strengths,)

    def __repr__(self) -> str:
        counts = torch.bincount(self.strengths, minlength=len(Boundary)).tolist()
        named = ", ".join(f"{level.name.lower()}={counts[level]}" for level in Boundary)
        return f"BoundaryTable(vocab={len(self)}, {named})"

    def on(self, device: torch.device) -> Tensor:
        """Return the strengths, uint8 [vocab], on `device`; they are copied there once."""
        if device == self.strengths.device:
            return self.strengths
        if device not in self._copies:
            with torch.inference_mode(mode=False):
                self._copies[device] = self.strengths.to(device)
        return self._copies[device]

    def lookup(self, token_ids: Tensor) -> Tensor:
        """Look up the strength of the cut after each token: integer ids -> uint8, same shape.

        Ids outside the vocabulary, negative ones too, have strength 0: models pad their embeddings,
        and batches pad with -1 or -100. The host does not wait for the device.
        """
        table = self.on(token_ids.device)
        inside = (token_ids >= 0) & (token_ids < len(table))
        return table[token_ids.clamp(0, len(table) - 1).long()] * inside


def boundary_table(tokenizer: object) -> BoundaryTable:
    """Return the boundary strengths of a tokenizer's vocabulary.

    Takes a transformers tokenizer, fast or slow, a `tokenizers.Tokenizer`, or anything else with
    `get_vocab()` (token -> id) or `convert_ids_to_tokens(ids)` and a length. Byte-level, byte
    fallback, sentencepiece and plain spellings are understood. Special tokens (turn ends, BOS, EOS)
    count as paragraphs. Raises TypeError for anything else, ValueError for an empty vocabulary.
    """
    vocabulary = _vocabulary(tokenizer)
    if not vocabulary:
        raise ValueError(f"the tokenizer's vocabulary is empty: {type(tokenizer).__name__}")
    spell = _speller([token for token, _ in vocabulary])
    strengths = bytearray(1 + max(token_id for _, token_id in vocabulary))
    for token, token_id in vocabulary:
        # Most tokens end like this in any spelling; what is skipped here is half of the time.
        if not (token[-1:].isascii() and token[-1:].isalnum()):
            strengths[token_id] = token_boundary(spell(token))
    for token_id in _special_ids(tokenizer):
        if token_id < len(strengths):
            strengths[token_id] = Boundary.PARAGRAPH
    return BoundaryTable(torch.frombuffer(strengths, dtype=torch.uint8))


def is_tokenizer(candidate: object) -> bool:
    """True if `boundary_table` can read the vocabulary of `candidate`."""
    return callable(getattr(candidate, "get_vocab", None)) or callable(
        getattr(candidate, "convert_ids_to_tokens", None)
    )


def _vocabulary(tokenizer: Any) -> list[tuple[str, int]]:
    """Return the tokens as the vocabulary spells them, with their ids."""
    if not is_tokenizer(tokenizer):
        raise TypeError(
            "a tokenizer needs get_vocab() or convert_ids_to_tokens(), "
            f"and {type(tokenizer).__name__} has neither"
        )
    if callable(getattr(tokenizer, "get_vocab", None)):
        return [(_as_text(token), token_id) for token, token_id in tokenizer.get_vocab().items()]
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [(_as_text(token), token_id) for token_id, token in enumerate(tokens) if token]


def _as_text(token: str | bytes) -> str:
    """Return a token as text: the vocabularies of tiktoken hold bytes."""
    return token.decode("utf-8", "replace") if isinstance(token, bytes) else token


def _special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of special tokens, except one for unknown words, which may be mid-sentence."""
    added: Mapping[int, Any] = {}
    if hasattr(tokenizer, "added_tokens_decoder"):
        added = tokenizer.added_tokens_decoder
    elif hasattr(tokenizer, "get_added_tokens_decoder"):
        added = tokenizer.get_added_tokens_decoder()
    special = {token_id for token_id, token in added.items() if token.special}
    special.update(getattr(tokenizer, "all_special_ids", ()))
    structural = {getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "sep")}
    unknown = getattr(tokenizer, "unk_token_id", None)
    return special if unknown in structural else special - {unknown}


def _byte_alphabet() -> dict[str, str]:
    """Return GPT-2's alphabet: printable stand-in of a byte -> character of that code point."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(256 + rank): chr(byte) for rank, byte in enumerate(hidden)}
    return stand_ins | {chr(byte): chr(byte) for byte in printable}


_BYTE_ALPHABET = _byte_alphabet()
_BYTE_OF = str.maketrans(_BYTE_ALPHABET)
_BYTE_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")


def _speller(tokens: Collection[str]) -> Callable[[str], str]:
    """Return the function from the spelling of a token in the vocabulary to its text."""
    return _spell_byte_level if _is_byte_level(tokens) else _spell_sentencepiece


def _is_byte_level(tokens: Collection[str]) -> bool:
    """True for GPT-2's spelling: leading spaces are Ġ, and the 256 stand-ins spell most tokens.

    Ġ alone proves nothing: it is a Maltese letter, which a large sentencepiece vocabulary has too.
    """

    def share(words: Iterable[bool]) -> float:
        return sum(words) / len(tokens)

    spaces = share(token.startswith("Ġ") for token in tokens)
    if not spaces > share(token.startswith("▁") for token in tokens):
        return False
    return share(_BYTE_ALPHABET.keys() >= set(token) for token in tokens) > 0.9


def _spell_byte_level(token: str) -> str:
    try:
        raw = token.removesuffix("</w>").translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:  # added tokens are spelled as they are
        return token
    return raw.decode("utf-8", "replace")


def _spell_sentencepiece(token: str) -> str:
    """Return the text of a token in sentencepiece's spelling, or in a plain one.

    A plain spelling has no ▁ and no byte fallback.
    """
    fallback = _BYTE_FALLBACK.fullmatch(token)
    if fallback:
        return bytes.fromhex(fallback[1]).decode("utf-8", "replace")
    return token.removesuffix("</w>").replace("▁", " ")

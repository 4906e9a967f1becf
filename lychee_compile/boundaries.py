"""How strongly each token of a vocabulary ends a piece of meaning: where chunks may be cut.

LycheeCluster (arXiv 2603.08453) cuts the sequence at its natural boundaries, paragraph before line
before sentence before clause. A model sees token ids alone, so the text is read once per
vocabulary, not per token generated: `boundary_table` makes a table id -> strength of the cut
*after* that token.
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
    """Strength of the cut after a token; the stronger, the larger."""

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
    """Strength of the cut after a token that stands for `text`."""
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
    """Boundary strength of every token of a vocabulary; immutable, equal where the contents are.

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
        """The strengths, uint8 [vocab], on `device`; copied there once."""
        if device == self.strengths.device:
            return self.strengths
        if device not in self._copies:
            with torch.inference_mode(mode=False):
                self._copies[device] = self.strengths.to(device)
        return self._copies[device]

    def lookup(self, token_ids: Tensor) -> Tensor:
        """Strength of the cut after each token: integer ids of any shape -> uint8, same shape.

        Ids outside the vocabulary, negative ones too, have none: models pad their embeddings, and
        batches pad with -1 or -100. Takes no host sync.
        """
        table = self.on(token_ids.device)
        inside = (token_ids >= 0) & (token_ids < len(table))
        return table[token_ids.clamp(0, len(table) - 1).long()] * inside


def boundary_table(tokenizer: object) -> BoundaryTable:
    """The boundary strengths of a tokenizer's vocabulary.

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
    """Whether `boundary_table` can read the vocabulary of `candidate`."""
    return callable(getattr(candidate, "get_vocab", None)) or callable(
        getattr(candidate, "convert_ids_to_tokens", None)
    )


def _vocabulary(tokenizer: Any) -> list[tuple[str, int]]:
    """Tokens as the vocabulary spells them, with their ids."""
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
    """Vocabularies in tiktoken's manner hold bytes."""
    return token.decode("utf-8", "replace") if isinstance(token, bytes) else token


def _special_ids(tokenizer: Any) -> set[int]:
    """Ids of special tokens, but for an unknown-word token: it can stand in mid-sentence."""
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
    """GPT-2's printable stand-in of each byte -> the character with that code point."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(256 + rank): chr(byte) for rank, byte in enumerate(hidden)}
    return stand_ins | {chr(byte): chr(byte) for byte in printable}


_BYTE_ALPHABET = _byte_alphabet()
_BYTE_OF = str.maketrans(_BYTE_ALPHABET)
_BYTE_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")


def _speller(tokens: Collection[str]) -> Callable[[str], str]:
    """The function from a vocabulary's spelling of a token to the token's text."""
    return _spell_byte_level if _is_byte_level(tokens) else _spell_sentencepiece


def _is_byte_level(tokens: Collection[str]) -> bool:
    """GPT-2's spelling: leading spaces are Ġ, and nearly all tokens keep to the 256 characters.

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
    """Also right for plain spellings, which have no ▁ and no byte fallback."""
    fallback = _BYTE_FALLBACK.fullmatch(token)
    if fallback:
        return bytes.fromhex(fallback[1]).decode("utf-8", "replace")
    return token.removesuffix("</w>").replace("▁", " ")

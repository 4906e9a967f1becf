"""Boundary strengths: of texts, and of the vocabularies that spell them in their own ways."""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lychee_compile.boundaries import Boundary, BoundaryTable, boundary_table, token_boundary

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

NONE, CLAUSE, SENTENCE, LINE, PARAGRAPH = Boundary

TEXTS = {
    NONE: [
        *["", " ", "\t", "    ", "word", " word", "7", "é", "朋友", "नमस्ते", "\n\nThe", "\nx"],
        *["(", "[", "{", ' "', "'", "::", "std::", "->", "=>", "==", "!=", "_", "@", "\ufffd"],
        *["!(", "${", "/", "<0x0A>x"],
    ],
    CLAUSE: [
        *[",", ";", ":", " ,", "but,", ", ", "—", ")", "]", "}", "),", "],", '":', '",'],
        *[
            ',"',
            ': "',
            ":{",
            "()",
            "{}",
            "[]",
            "){",
            "，",
            "、",
            "；",
            "：",
            "،",
            "؛",
            "」",
            "·"[:0] + ",",
        ],
    ],
    SENTENCE: [
        *[".", "!", "?", "...", "…", "end.", '."', ".'", ".)", '!"', ".”", "?»", ". ", "。", "！"],
        *["？", "。」", "।", "॥", "؟", "۔", "።", "},", "};", "})", "});", ");", "];", '");', "},{"],
        *['},{"', "}]", "}}", "?!", ".]", "말."],
    ],
    LINE: ["\n", " \n", "\r\n", ".\n", ",\n", "{\n", "\n    ", "end.\n", ");\n", "\u2028", "\r"],
    PARAGRAPH: ["\n\n", ".\n\n", "\n\n\n", "\r\n\r\n", "\n \n", "\n\n    ", "\x0c", "\u2029"],
}

PROSE = """He said: "We leave at dawn." Then, slowly, he left; nobody spoke!

你好。再见，朋友！真的吗？ यह एक वाक्य है। दूसरा वाक्य है। هل هذا صحيح؟ نعم، صحيح.
[{"id": 1, "name": "x"}, {"id": 2, "tags": ["a", "b"]}];
"""


def corpus():
    """Return code, prose and data in several scripts, line ends included."""
    sources = [Path(module.__file__).read_text() for module in (argparse, textwrap, json)]
    return [*sources, *[PROSE] * 40]


@pytest.fixture(scope="session")
def byte_level():
    """A GPT-2 spelt tokenizer, Ġ and Ċ, with an end-of-turn token."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(corpus(), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")


@pytest.fixture(scope="session")
def sentencepiece():
    """A tokenizer spelt as sentencepiece does, ▁ and byte fallback, with Maltese letters in it."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    raw = tokenizers.Tokenizer(tokenizers.models.Unigram())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace(prepend_scheme="never")]
    )
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=1500,
        special_tokens=["<unk>", "<eos>", *fallback],
        initial_alphabet=["Ġ", "Ċ"],
        unk_token="<unk>",
        show_progress=False,
    )
    # Whole lines would make pieces of many words.
    lines = [piece for text in corpus() for piece in text.splitlines(keepends=True)]
    raw.train_from_iterator(lines, trainer)
    trained = json.loads(raw.to_str())
    trained["model"]["byte_fallback"] = True
    trained["added_tokens"] = [
        each for each in trained["added_tokens"] if each["content"] in ("<unk>", "<eos>")
    ]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(trained)),
        eos_token="<eos>",
        unk_token="<unk>",
    )


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


class Vocabulary:
    """The least that a tokenizer can be."""

    def __init__(self, tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: token_id for token_id, token in enumerate(self.tokens)}


class IdsOnly:
    """A tokenizer that does not hand out its vocabulary; ids 1 and 2 are spelt alike."""

    tokens = ("x", ".", ".", None, "▁\n\n")

    def __len__(self):
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[each] for each in ids]


@pytest.mark.parametrize(
    ("text", "level"), [(text, level) for level, texts in TEXTS.items() for text in texts]
)
def test_strength_of_a_text(text, level):
    assert token_boundary(text) is level


def test_levels_are_ordered():
    assert NONE < CLAUSE < SENTENCE < LINE < PARAGRAPH
    assert NONE == 0


@given(st.text(), st.sampled_from(["word", "é", "7"]))
def test_a_text_that_ends_in_a_word_is_no_boundary(start, end):
    assert token_boundary(start + end) is NONE


@given(st.text(), st.text(" \t", max_size=3))
def test_a_line_end_outranks_what_it_follows(start, indent):
    assert token_boundary(start + "\n" + indent) >= LINE
    assert token_boundary(start + "\n\n" + indent) is PARAGRAPH


def test_the_table_agrees_with_the_decoded_text(tokenizer):
    """Each id's strength is that of the text its own decoder gives: the spelling is understood."""
    table = boundary_table(tokenizer)
    special = set(tokenizer.all_special_ids)
    texts = {
        token_id: tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        for token_id in range(len(tokenizer))
        if token_id not in special
    }
    wrong = {
        token_id: (text, int(table.strengths[token_id]))
        for token_id, text in texts.items()
        if table.strengths[token_id] != token_boundary(text)
    }
    assert wrong == {}
    found = {token_boundary(text) for text in texts.values()}
    assert found >= {NONE, CLAUSE, SENTENCE, LINE}, "the vocabulary exercises too little"


def test_a_document_is_strongest_at_its_paragraph(tokenizer):
    first, second = PROSE.split("\n\n")
    blank_line, after = boundary_strengths_at(tokenizer, first + "\n\n", second)
    assert blank_line[-1] >= LINE
    assert max(blank_line[:-2]) < LINE
    assert max(after[:3]) < LINE


def boundary_strengths_at(tokenizer, *pieces):
    """Return strengths after each token of the pieces, each encoded by itself."""
    table = boundary_table(tokenizer)
    return [table.lookup(torch.tensor(tokenizer(each)["input_ids"])).tolist() for each in pieces]


def test_special_tokens_end_paragraphs(byte_level, sentencepiece):
    end = byte_level.eos_token_id
    assert boundary_table(byte_level).strengths[end] == PARAGRAPH
    table = boundary_table(sentencepiece)
    assert table.strengths[sentencepiece.eos_token_id] == PARAGRAPH
    assert table.strengths[sentencepiece.unk_token_id] == NONE


def test_added_special_tokens_end_paragraphs(byte_level):
    """Turn ends are often added tokens that no attribute of the tokenizer names."""
    tokenizer = copy.deepcopy(byte_level)
    added = [
        tokenizers.AddedToken("<turn>", special=True),
        tokenizers.AddedToken("<word>", special=False),
    ]
    tokenizer.add_tokens(added)
    turn, word = tokenizer.convert_tokens_to_ids(["<turn>", "<word>"])
    assert turn not in tokenizer.all_special_ids
    for each in (tokenizer, tokenizer.backend_tokenizer):
        assert boundary_table(each).strengths[[turn, word]].tolist() == [PARAGRAPH, NONE]


def test_maltese_is_not_byte_level():
    table = boundary_table(Vocabulary(["Ġ", "Ċ", "▁Ġ", "▁x", "。", "<0x0A>", "<0xE3>", "▁"]))
    assert table.strengths.tolist() == [0, 0, 0, 0, SENTENCE, LINE, 0, 0]


def test_plain_spellings():
    table = boundary_table(Vocabulary(["##.", "word", ".</w>", "##ing", "Ġ", "मैं", "।", "中"]))
    assert table.strengths.tolist() == [SENTENCE, 0, SENTENCE, 0, 0, 0, SENTENCE, 0]


def test_other_kinds_of_vocabulary():
    assert boundary_table(IdsOnly()).strengths.tolist() == [0, SENTENCE, SENTENCE, 0, PARAGRAPH]
    in_bytes = Vocabulary([b"x", b".", "。".encode(), "。".encode()[:2]])
    assert boundary_table(in_bytes).strengths.tolist() == [0, SENTENCE, SENTENCE, 0]


@pytest.mark.parametrize("wrong", [None, "gpt2", {"a": 1}])
def test_what_is_no_tokenizer_is_refused(wrong):
    with pytest.raises(TypeError, match=type(wrong).__name__):
        boundary_table(wrong)


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(ValueError, match="empty"):
        boundary_table(Vocabulary([]))


def test_a_vocabulary_of_gemmas_size_takes_seconds():
    """262,144 tokens take half a second on an idle core; ten times that is no accident."""
    endings = ["", ".", ",", "。", "é", "朋", "\n", '."', "})", "▁"]
    tokens = [f"▁{number:x}{endings[number % len(endings)]}" for number in range(2**18)]
    start = time.process_time()
    table = boundary_table(Vocabulary(tokens))
    assert time.process_time() - start < 5
    assert len(table) == 2**18


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=20),
    st.lists(st.integers(-200, 200), min_size=1, max_size=24),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_lookup_is_safe_for_any_id(strengths, ids, dtype):
    table = BoundaryTable(torch.tensor(strengths, dtype=torch.uint8))
    expected = [strengths[each] if 0 <= each < len(strengths) else 0 for each in ids]
    found = table.lookup(torch.tensor(ids, dtype=dtype).view(1, -1, 1))
    assert found.dtype == torch.uint8
    assert found.shape == (1, len(ids), 1)
    assert found.flatten().tolist() == expected


def test_lookup_of_nothing():
    table = BoundaryTable(torch.ones(3, dtype=torch.uint8))
    assert table.lookup(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0)


def test_tables_are_values():
    strengths = torch.tensor([0, 4, 1], dtype=torch.uint8)
    table = BoundaryTable(strengths)
    same = BoundaryTable(strengths.clone())
    strengths[0] = 3
    assert table == same
    assert hash(table) == hash(same)
    assert table != BoundaryTable(strengths)
    assert table != BoundaryTable(torch.tensor([0, 4, 1, 0], dtype=torch.uint8))
    assert table != "a table"
    assert copy.deepcopy({"tokenizer": table})["tokenizer"] is table
    assert pickle.loads(pickle.dumps(table)) == table
    assert repr(table) == (
        "BoundaryTable(vocab=3, none=1, clause=1, sentence=0, line=0, paragraph=1)"
    )


def test_a_device_gets_one_copy():
    table = BoundaryTable(torch.zeros(3, dtype=torch.uint8))
    elsewhere = torch.device("meta")
    assert table.on(elsewhere) is table.on(elsewhere)
    assert table.on(torch.device("cpu")) is table.strengths


@pytest.mark.parametrize(
    ("strengths", "error", "words"),
    [
        (torch.zeros(3), TypeError, "uint8.*float32"),
        (torch.zeros(2, 3, dtype=torch.uint8), ValueError, r"\[vocab\].*\[2, 3\]"),
        (torch.zeros(0, dtype=torch.uint8), ValueError, r"\[vocab\].*\[0\]"),
    ],
)
def test_malformed_strengths_are_refused(strengths, error, words):
    with pytest.raises(error, match=words):
        BoundaryTable(strengths)

"""The tokenizer against those of `transformers`, and invalid vocabularies."""

# ruff: noqa: RUF001 (odd characters are what is tested here)

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repshift_cli.data.builtin import moving_shapes
from repshift_cli.data.video.tokenizer import TextBatch, Tokenizer
from repshift_cli.errors import DataError

WORDS = """[PAD] [UNK] [CLS] [SEP] [MASK] a an the man is are play ##ing ##s ##er guitar cafe uber na ##ive ! ? . , ' -
$ % & ( ) / : ; @ # * + = < > ^ ` { | } ~ " \\ 1 2 ##0 ##2 中 文 don t ##t i ß ss ος σ ##ς x y z un ##believ ##able ☃ b
c ##b ##c d ##d – — “ ” … e o u""".split()  # noqa: SIM905

TEXTS = [
    "a man is playing the guitar",
    "A MAN IS PLAYING THE GUITAR",
    "Café naïve ÜBER",
    "cafe\u0301",
    "don't",
    "what is the man playing?",
    "the man -- playing... (guitar)!",
    "unbelievable unbelievables zebra",
    "   tabs\tand\nlines \r\n a  ",
    "中文 a中文b",
    "a\u200bb \u00a0 a\u3000b a\u00adb",
    "\x00a\x01b \ufffd \x7f",
    "☃ 😀 a☃b",
    "ς ΟΣ Σ",
    "ß ẞ SS",
    "İ ı I",
    "20 12 102 120",
    "$1 50% a@b.c #x",
    "“a” – the — man…",
    "x" * 100,
    "x" * 101,
    "ab" * 60,
    "",
    "    ",
    "̀a e\u0301\u0302",
    "ﬁ ① ｆｕｌｌ",
    "\ud7ff\ue000 a",
    "हिन्दी a ไทย",
]

NOT_AS_IN_PYTHON = ("ς ΟΣ Σ", "\ud7ff\ue000 a")
"""Where the tokenizers of transformers differ: the older one knows the small sigma at the end of a word, and leaves out
characters for private use."""


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("vocabulary") / "vocab.txt", WORDS)


def write(path: Path, words: list[str], end: str = "\n") -> Path:
    path.write_bytes(end.join([*words, ""]).encode())
    return path


def official(path: Path, kind: str = "fast") -> Any:
    """BERT's tokenizer in transformers: the one in Rust, or the older one in Python."""
    transformers = pytest.importorskip("transformers")
    if kind == "fast":
        return transformers.BertTokenizerFast(vocab=str(path))
    legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    return legacy.BertTokenizerLegacy(vocab_file=str(path))


def rows(batch: TextBatch) -> list[list[int]]:
    """The token ids of each text without padding."""
    return [ids[: sum(mask)] for ids, mask in zip(batch.ids.tolist(), batch.mask.tolist(), strict=True)]


class TestAgainstTransformers:
    @pytest.mark.parametrize("text", TEXTS)
    def test_odd_texts(self, text: str, vocabulary: Path) -> None:
        expected = official(vocabulary)(text, add_special_tokens=False)["input_ids"]
        (found,) = rows(Tokenizer(vocabulary).texts([text], 1000))
        assert found == [2, *expected]

    @pytest.mark.parametrize("text", [text for text in TEXTS if text not in NOT_AS_IN_PYTHON])
    def test_as_the_tokenizer_of_the_authors(self, text: str, vocabulary: Path) -> None:
        expected = official(vocabulary, "legacy")(text, add_special_tokens=False)["input_ids"]
        (found,) = rows(Tokenizer(vocabulary).texts([text], 1000))
        assert found == [2, *expected]

    @given(
        st.lists(st.text(alphabet=st.one_of(st.sampled_from("amn pligu'?.-é中ßΣ \t"), st.characters()), max_size=30))
    )
    def test_any_text(self, texts: list[str]) -> None:
        texts = [text.encode("utf-8", "ignore").decode() for text in texts]
        texts = [text for text in texts if not any(word in text for word in WORDS[:5])]
        expected = [[2, *self.fast(text, add_special_tokens=False)["input_ids"]][:32] for text in texts]
        assert rows(self.ours.texts(texts, 32)) == expected

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _both(cls, vocabulary: Path) -> None:
        cls.fast, cls.ours = official(vocabulary), Tokenizer(vocabulary)

    fast: Any
    ours: Tokenizer

    def test_texts_of_the_builtin_scenes(self) -> None:
        texts = [moving_shapes.caption(scene) for scene in moving_shapes.scenes(40, 0)]
        with moving_shapes.vocabulary_file() as path:
            fast, ours = official(path), Tokenizer(path)
            expected = [[ours.start, *fast(text, add_special_tokens=False)["input_ids"]] for text in texts]
            assert rows(ours.texts(texts, 32)) == expected
        assert not any(1 in row for row in expected)  # [UNK]


class TestBatches:
    def test_texts_have_a_start_token_and_no_end_token(self, vocabulary: Path) -> None:
        batch = Tokenizer(vocabulary).texts(["a man", "the", "a man is playing"], 32)
        words = [WORDS.index(word) for word in ("[CLS]", "a", "man", "is", "play", "##ing")]
        the = WORDS.index("the")
        assert batch.ids.tolist() == [[*words[:3], 0, 0, 0], [2, the, 0, 0, 0, 0], words]
        assert batch.mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6]
        assert batch.ids.dtype == batch.mask.dtype == torch.int64
        assert batch.ids.is_contiguous()

    @pytest.mark.parametrize("longest", [1, 2, 5, 32])
    def test_texts_are_truncated(self, longest: int, vocabulary: Path) -> None:
        batch = Tokenizer(vocabulary).texts(["a " * 50, "the man"], longest)
        assert rows(batch) == [([2] + [5] * 50)[:longest], [2, 7, 8][:longest]]
        assert batch.ids.shape == (2, longest)

    def test_answers_have_an_end_token_unless_truncated(self, vocabulary: Path) -> None:
        batch = Tokenizer(vocabulary).answers(["guitar", "a man", "a man is", "a man is the", "a a a a a a", ""], 5)
        assert rows(batch) == [
            [2, 15, 3],
            [2, 5, 8, 3],
            [2, 5, 8, 9, 3],
            [2, 5, 8, 9, 7],
            [2, 5, 5, 5, 5],
            [2, 3],
        ]
        assert batch.ids[0].tolist() == [2, 15, 3, 0, 0]

    def test_answers_are_encoded_as_by_the_authors(self, vocabulary: Path) -> None:
        """`answer + " [SEP]"`, in which their tokenizer parses `[SEP]` as a special token."""
        fast, ours = official(vocabulary), Tokenizer(vocabulary)
        answers = ["guitar", "the man's guitar", "a man is playing the guitar", "don't"]
        expected = [
            [2, *fast(f"{answer} [SEP]", add_special_tokens=False, truncation=True, max_length=4)["input_ids"]]
            for answer in answers
        ]
        assert rows(ours.answers(answers, 5)) == expected

    def test_unknown_words(self, vocabulary: Path) -> None:
        assert rows(Tokenizer(vocabulary).texts(["zebra the zebra"], 32)) == [[2, 1, 7, 1]]

    def test_no_text_at_all(self, vocabulary: Path) -> None:
        batch = Tokenizer(vocabulary).texts([], 32)
        assert batch.ids.shape == batch.mask.shape == (0, 1)
        assert batch.ids.dtype == batch.mask.dtype == torch.int64

    def test_special_tokens_can_stand_anywhere(self, tmp_path: Path) -> None:
        tokenizer = Tokenizer(write(tmp_path / "vocab.txt", ["a", "[SEP]", "b", "[CLS]", "[UNK]", "c", "[PAD]"]))
        assert (tokenizer.padding, tokenizer.start, tokenizer.end, tokenizer.size) == (6, 3, 1, 7)
        batch = tokenizer.answers(["a b", "c", "d c"], 5)
        assert batch.ids.tolist() == [[3, 0, 2, 1], [3, 5, 1, 6], [3, 4, 5, 1]]
        assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]


class TestVocabulary:
    def test_a_folder_that_holds_it(self, vocabulary: Path) -> None:
        assert Tokenizer(vocabulary.parent).path == vocabulary

    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_ends_of_lines(self, end: str, tmp_path: Path) -> None:
        tokenizer = Tokenizer(write(tmp_path / "vocab.txt", WORDS, end))
        assert tokenizer.size == len(WORDS)
        assert rows(tokenizer.texts(["a man"], 9)) == [[2, 5, 8]]

    def test_without_a_last_end(self, tmp_path: Path) -> None:
        (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
        assert Tokenizer(tmp_path).size == len(WORDS)

    @pytest.mark.parametrize("separator", ["\u2028", "\x85"])
    def test_a_token_with_a_unicode_line_separator(self, separator: str, tmp_path: Path) -> None:
        """Only line feeds end a line: the tokens behind it keep their numbers, as in transformers."""
        path = write(tmp_path / "vocab.txt", [*WORDS[:10], f"a{separator}b", *WORDS[10:]])
        tokenizer = Tokenizer(path)
        assert tokenizer.size == len(WORDS) + 1 == len(official(path))
        expected = official(path)("guitar", add_special_tokens=False)["input_ids"]
        assert rows(tokenizer.texts(["guitar"], 9)) == [[2, *expected]]

    def test_the_size_of_the_model(self, vocabulary: Path) -> None:
        tokenizer = Tokenizer(vocabulary)
        tokenizer.check_fits(len(WORDS), "model.pth")
        with pytest.raises(DataError) as caught:
            tokenizer.check_fits(30522, "model.pth")
        assert caught.value.message == f"{vocabulary} has {len(WORDS)} tokens, but model.pth was trained with 30522"
        assert "--vocab" in caught.value.hint

    @pytest.mark.parametrize("name", ["none.txt", "no/such/folder/vocab.txt", "a" * 300])
    def test_missing(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot read the vocabulary") as caught:
            Tokenizer(tmp_path / name)
        assert "vocab.txt of a BERT model" in caught.value.hint

    def test_a_folder_without_one(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"cannot read the vocabulary .*vocab\.txt"):
            Tokenizer(tmp_path)

    @pytest.mark.parametrize("content", [b"\xff\xfe\x00a", b"[PAD]\n\x80\n", "[PAD]\nä".encode("latin-1")])
    def test_not_text(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "vocab.txt").write_bytes(content)
        with pytest.raises(DataError, match="is not text"):
            Tokenizer(tmp_path)

    @pytest.mark.parametrize("missing", ["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    def test_without_a_special_token(self, missing: str, tmp_path: Path) -> None:
        path = write(tmp_path / "vocab.txt", [word for word in WORDS if word != missing])
        with pytest.raises(DataError) as caught:
            Tokenizer(path)
        assert caught.value.message == f"{path} is not a vocabulary of BERT: it has no {missing}"

    @pytest.mark.parametrize("content", ["", "\n", '{"model": {"vocab": {}}}', "cased words\n"])
    def test_another_file(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "vocab.txt").write_text(content)
        with pytest.raises(DataError, match=r"it has no \[PAD\], \[UNK\], \[CLS\], \[SEP\]"):
            Tokenizer(tmp_path)

    @pytest.mark.parametrize("twice", [["a"], ["a", "the", "[CLS]"], ["a "]])
    def test_repeated_tokens(self, twice: list[str], tmp_path: Path) -> None:
        path = write(tmp_path / "vocab.txt", [*WORDS, *twice])
        with pytest.raises(DataError, match=f"{len(twice)} tokens are repeated"):
            Tokenizer(path)

    def test_a_fifo(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "vocab.txt")
        with pytest.raises(DataError, match="is not a regular file"):
            Tokenizer(tmp_path)

    def test_too_large(self, tmp_path: Path) -> None:
        with (tmp_path / "vocab.txt").open("wb") as file:
            file.truncate((1 << 24) + 1)
        with pytest.raises(DataError, match="more than the maximum"):
            Tokenizer(tmp_path)

import importlib.metadata
import json
import pathlib

import pytest

from decoquant_compile.quality import text
from tests.quality import tiny


def test_windows_are_spread_over_the_text_and_begin_with_its_characters():
    content = "".join(chr(97 + i // 100) for i in range(1000))
    ids = text.windows(text.Text("t", content), tiny.tokenizer(), 5, 10)
    assert ids.shape == (5, 10)
    assert "".join(tiny.tokenizer().convert_ids_to_tokens(ids[:, 0].tolist())) == "acegi"


@pytest.mark.parametrize(("count", "length"), [(1, 101), (5, 21), (101, 1)])
def test_a_text_that_is_too_short_is_refused(count, length):
    with pytest.raises(ValueError, match="too short"):
        text.windows(text.Text("t", "x" * 100), tiny.tokenizer(), count, length)


def test_windows_may_use_up_the_text():
    assert text.windows(text.Text("t", "x" * 100), tiny.tokenizer(), 5, 20).shape == (5, 20)


def test_the_technical_text_is_long_enough_for_the_defaults():
    assert len(text.technical().content) > 8 * 2048 * 8


def test_the_literary_text_is_optional(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert text.literary() is None

    class Distribution:
        def locate_file(self, path):
            return tmp_path / path

    data = tmp_path / "bible" / "data"
    data.mkdir(parents=True)
    verses = [{"text": "In the beginning"}, {"text": "And the earth"}]
    (data / "kjv.jsonl").write_text("\n".join(map(json.dumps, verses)), encoding="utf-8")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Distribution())
    assert text.literary() == text.Text("literary", "In the beginning\nAnd the earth")


def test_a_file_is_read_as_utf_8_or_refused(tmp_path):
    path = pathlib.Path(tmp_path / "novel.txt")
    path.write_text("caf\u00e9", encoding="utf-8")
    assert text.read(path).content == "caf\u00e9"
    path.write_text("caf\u00e9", encoding="latin-1")
    with pytest.raises(ValueError, match="UTF-8"):
        text.read(path)

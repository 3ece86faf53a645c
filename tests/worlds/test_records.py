"""Reading a user's records, and making them into tokens."""

import json
import traceback

import numpy as np
import pytest

from opd_jax.config import ConfigError
from opd_jax.worlds import records
from opd_jax.worlds.records import Record, join, read_records


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines_of_json(tmp_path):
    lines = [
        {"prompt": "q", "continuation": " a\n"},
        {"prompt": "", "continuation": "b", "code": 3, "other": [1]},
        {"text": "c\u2028d"},
        {"text": "e", "code": "5 stars"},
        {"text": "f", "code": 0},
        {"text": "f", "code": 0},
    ]
    content = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    assert read_records(written(tmp_path / "r.jsonl", "\ufeff" + content)) == [
        Record("q", " a\n"),
        Record("", "b", kind="3"),
        Record("", "c\u2028d"),
        Record("5 stars\n\n", "e", kind="5 stars"),
        Record("0\n\n", "f", kind="0"),
        Record("0\n\n", "f", kind="0"),  # nothing is dropped: that would look at two records
    ]


def test_blocks_of_a_text(tmp_path):
    path = written(tmp_path / "r.txt", "\n\nfirst\n  line two \n \t\nsecond\n\n\n{}\n")
    assert [record.continuation for record in read_records(path)] == ["first\n  line two ", "second", "{}"]
    assert {record.prompt for record in read_records(path)} == {""}
    assert read_records(str(written(tmp_path / "one.txt", "only"))) == [Record("", "only")]
    assert read_records(written(tmp_path / "dos.txt", "a\r\nb\r\n\r\nc"))[0] == Record("", "a\nb")


SECRET = "Rosebud"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{SECRET}", "not JSON; write one object in a line"),
        (f'{{"text": "{SECRET}', "not JSON"),
        (f'{{"text": "{SECRET}\\q"}}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        (f'["{SECRET}"]', "a list; write an object"),
        (f'"{SECRET}"', "a string; write an object"),
        ("17", "a number; write an object"),
        ("null", "null; write an object"),
        (f'{{"{SECRET}": "{SECRET}"}}', 'neither "text" nor "continuation"; give one of the two'),
        (f'{{"prompt": "{SECRET}"}}', 'neither "text" nor "continuation"'),
        (f'{{"text": "{SECRET}", "continuation": "a"}}', 'both "text" and "continuation"; give one'),
        (f'{{"continuation": "{SECRET}"}}', '"continuation" without "prompt"; give one, ""'),
        (f'{{"prompt": ["{SECRET}"], "continuation": "a"}}', '"prompt" is a list; give a string'),
        (f'{{"prompt": "{SECRET}", "continuation": 19.5}}', '"continuation" is a number; give a string'),
        (f'{{"prompt": "{SECRET}", "continuation": " \\n"}}', '"continuation" is empty; give a text, or take'),
        ('{"text": ""}', '"text" is empty'),
        ('{"text": {}}', '"text" is an object'),
        (f'{{"text": "{SECRET}", "code": true}}', '"code" is true or false; give a string'),
        (f'{{"text": "{SECRET}", "code": null}}', '"code" is null'),
        (f'{{"text": "{SECRET} \\ud83d"}}', '"text" has half of a surrogate pair'),
        (SECRET.encode() + b" \xff\n", "not UTF-8; convert"),
    ],
)
def test_a_line_that_is_no_record_is_told_without_its_text(tmp_path, line, says):
    start = b'{"text": "fine"}\n\n'
    path = written(tmp_path / "r.jsonl", start + (line if isinstance(line, bytes) else line.encode()) + b"\n{}\n")
    with pytest.raises(ConfigError) as caught:
        read_records(path)
    message = str(caught.value)
    assert f"{path} line 3: " in message and says in message and "\n" not in message
    assert SECRET not in "".join(traceback.format_exception(caught.value)) and "19.5" not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("r.json", "[]", "ending '.json'; give a .jsonl or a .txt file"),
        ("missing.txt", None, "No such file.*; give a .jsonl"),
        ("r.jsonl", "\n \n", "holds no records"),
        ("r.txt", "", "holds no records"),
        ("r.txt", f"{SECRET}\n{SECRET}\n", "2 lines make one record; put a blank line"),
        ("r.txt", b"a\n\n\xe4\n", "line 3: bytes that are not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_told(tmp_path, name, content, says):
    if content is not None:
        written(tmp_path / name, content)
    with pytest.raises(ConfigError, match=says) as caught:
        read_records(tmp_path / name)
    assert SECRET not in str(caught.value)


def test_join_by_hand():
    def check(made, tokens, prompt):
        assert made[0].tolist() == tokens and made[0].dtype == np.int32 and made[1] == prompt

    check(join([5, 6], [7, 8], 1, 10), [5, 6, 7, 8, 1], 2)
    check(join([5, 6], [7, 8], 1, 5), [5, 6, 7, 8, 1], 2)
    check(join([5, 6], [7, 8], 1, 4), [5, 6, 7, 8], 2)
    check(join([4, 5, 6], [7, 8], 1, 4), [5, 6, 7, 8], 2)  # the end of a long prompt
    check(join([], [7, 8], 1, 4), [1, 7, 8, 1], 1)
    check(join([4, 5], [7, 8], 1, 2), [5, 7], 1)
    check(join([4], [], 1, 4), [4, 1], 1)
    with pytest.raises(ValueError, match="limit=1"):
        join([4], [5], 1, 1)


class Words:
    """A tokenizer that starts every text with id 9, like Llama's."""

    eos_token_id = 1

    def __call__(self, text, add_special_tokens=True, split_special_tokens=False):
        assert split_special_tokens
        return {"input_ids": [9] * add_special_tokens + [len(word) + 10 for word in text.split()]}


def test_what_starts_every_text_is_written_once():
    assert records.encode(Record("a bb", "ccc"), Words(), 10)[0].tolist() == [9, 11, 12, 13, 1]
    tokens, prompt = records.encode(Record("", "ccc"), Words(), 10)
    assert tokens.tolist() == [9, 13, 1] and prompt == 1


def test_by_code():
    record = records.by_code(Record("def f():", "\n    pass", "m", "method"))
    assert record == Record("method\n\n", "def f():\n    pass", "m", "method")

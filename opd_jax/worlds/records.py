"""Private records: one text each, as a prompt and its continuation; read from a user's file and made into tokens.

A record is the unit of privacy, so everything here looks at one record at a time: nothing is counted, sorted, filtered
or learnt over several of them, and no message quotes one. Whose privacy is to be kept decides what a record has to be:
somebody with two records has twice the epsilon.
"""

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from opd_jax.config import ConfigError


class Record(NamedTuple):
    """What is given, and what follows it."""

    prompt: str  # may be empty
    continuation: str
    module: str = ""  # where it comes from; splits are made by it
    kind: str = ""  # its control code, the class that it belongs to


def by_code(record: Record) -> Record:
    """The same text with its control code for a prompt: all that it says is continuation (arXiv 2403.00932)."""
    return record._replace(prompt=f"{record.kind}\n\n", continuation=record.prompt + record.continuation)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def encode(
    record: Record, tokenizer: "transformers.PreTrainedTokenizerBase", limit: int
) -> tuple[Int[np.ndarray, "S"], int]:
    """Token ids of a record, int32, and how many of them are prompt; see `join`.

    Prompt and continuation are made into tokens apart. What is written in a text like a special token is text.
    """
    ids = lambda text, **how: tokenizer(text, split_special_tokens=True, **how)["input_ids"]
    prompt = [*ids(""), *ids(record.prompt, add_special_tokens=False)]  # "" has the tokens that start every text
    return join(prompt, ids(record.continuation, add_special_tokens=False), tokenizer.eos_token_id, limit)


def join(prompt: list[int], continuation: list[int], eos: int, limit: int) -> tuple[Int[np.ndarray, "S"], int]:
    """A prompt, its continuation and `eos`, of which the first `limit` are kept.

    Args:
        prompt: ids; of more than half of `limit` the last are kept, so that there is a continuation. An empty one
            becomes `eos`, so that the continuation's first token follows on something.
        continuation: ids; where they are cut no `eos` follows.
        eos: id that ends a text.
        limit: most tokens of a record, 2 or more.

    Returns:
        Ids `[S]`, int32, and the prompt's length: at least 1, at most `limit // 2`, and less than `S`.

    Raises:
        ValueError: a limit under 2.
    """
    if limit < 2:
        raise ValueError(f"limit={limit}: a record has at least two tokens, a prompt's and a continuation's")
    prompt = prompt[-(limit // 2) :] or [eos]
    return np.array([*prompt, *continuation, eos][:limit], np.int32), len(prompt)


# ---- files -----------------------------------------------------------------------------------------------------------


def read_records(path: str | os.PathLike) -> list[Record]:
    """The records of a file in UTF-8, in its order; nothing is dropped, not even what is there twice.

    | file | a record is | prompt |
    | --- | --- | --- |
    | `.jsonl` | a line `{"prompt": ..., "continuation": ...}` | as given, may be empty |
    | `.jsonl` | a line `{"text": ..., "code": ...}` | the control code and a blank line; empty without a code |
    | `.txt` | a block of lines; blank lines divide blocks | empty |

    A control code is a string or a whole number, is optional in both kinds of line, and becomes the record's `kind`.
    Other keys are ignored, and so are blank lines between lines of JSON.

    Raises:
        ConfigError: a file that cannot be read, or the first line that is no record: where it is, what kind of value
            is there, and the remedy. The message quotes nothing out of the file, and no other error is chained to it.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".txt"):
        raise ConfigError(f"cannot read the records {path}: ending {path.suffix!r}; give a .jsonl or a .txt file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the records {path}: {error.strerror}; give a .jsonl or a .txt file") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} line {line}: bytes that are not UTF-8; convert the file to UTF-8") from None
    lines = text.replace("\r\n", "\n").split("\n")  # not splitlines(), which ends lines at other characters too
    if path.suffix == ".jsonl":
        records = [_from_json(line, f"{path} line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    else:
        records = _from_blocks(lines, path)
    if not records:
        raise ConfigError(f"{path}: holds no records; give at least one")
    return records


def _from_blocks(lines: list[str], path: Path) -> list[Record]:
    blocks = [list(block) for is_text, block in itertools.groupby(lines, lambda line: bool(line.strip())) if is_text]
    if len(blocks) == 1 and len(blocks[0]) > 1:
        raise ConfigError(f"{path}: {len(blocks[0])} lines make one record; put a blank line between two records")
    return [Record("", "\n".join(block)) for block in blocks]


def _from_json(line: str, where: str) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ConfigError(f"{where}: not JSON; write one object in a line") from None
    if not isinstance(value, dict):
        raise ConfigError(f'{where}: {_nature(value)}; write an object with "prompt" and "continuation", or "text"')
    if ("text" in value) == ("continuation" in value):
        found = 'both "text" and' if "text" in value else 'neither "text" nor'
        raise ConfigError(f'{where}: an object with {found} "continuation"; give one of the two')
    code = value.get("code", "")
    code = str(code) if type(code) is int else _string(code, "code", where)
    if "text" in value:
        prompt, continuation = f"{code}\n\n" if code else "", _filled(value["text"], "text", where)
    elif "prompt" in value:
        prompt = _string(value["prompt"], "prompt", where)
        continuation = _filled(value["continuation"], "continuation", where)
    else:
        raise ConfigError(f'{where}: "continuation" without "prompt"; give one, "" where there is none')
    return Record(prompt, continuation, kind=code)


def _filled(value: Any, key: str, where: str) -> str:
    if not _string(value, key, where).strip():
        raise ConfigError(f'{where}: "{key}" is empty; give a text, or take the line out')
    return value


def _string(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f'{where}: "{key}" is {_nature(value)}; give a string')
    if re.search("[\ud800-\udfff]", value):
        raise ConfigError(f'{where}: "{key}" has half of a surrogate pair; write the whole character')
    return value


def _nature(value: Any) -> str:
    """What a value is, without the value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

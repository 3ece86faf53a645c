"""Python functions as records: those of the standard library count as private, those of numerical libraries as public.

    def fail(self, msg=None):                                           prompt: the signature
        \"\"\"Fail immediately, with the given message.\"\"\"               continuation: docstring and body
        raise self.failureException(msg)

Both corpora are on every machine that runs this library and nothing is downloaded: a record is read from the source of
an installed module (`functions_source`). Patch releases of Python and other releases of the libraries give slightly
other records; `corpus_fingerprint` says which they were. Splits are made by module.

The private records are pretended to be so, for experiments with differentially private training. Each is made of its
own function alone, and the tokenizer is learnt from public records. A function that is there twice is one record, as
are two of one name and docstring; the data set is what is left, and its neighbours have a record more or less. The
module knows nothing of training.
"""

import contextlib
import functools
import gc
import importlib.util
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from opd_jax.config import ConfigError, fingerprint
from opd_jax.worlds import records
from opd_jax.worlds.functions_source import KINDS, records_in
from opd_jax.worlds.records import Record, by_code

__all__ = [
    "EOS", "HELD_OUT", "KINDS", "PAD", "PRIVATE", "PUBLIC", "PUBLIC_HELD_OUT", "TOKENS", "VOCABULARY", "Record",
    "by_code", "corpus_fingerprint", "decode", "encode", "make_tokenizer", "private_records", "public_records",
    "save_tokenizer", "train_tokenizer",
]  # fmt: skip

SPLITS = ("train", "held_out")

# Modules written in Python that 3.11 and later have and distributors leave in: no tests, no tkinter, no encodings.
HELD_OUT = (
    "calendar", "colorsys", "configparser", "csv", "difflib", "fractions", "gettext", "graphlib", "heapq", "html",
    "ipaddress", "json", "optparse", "pprint", "random", "shelve", "statistics", "string", "tarfile", "textwrap",
    "tomllib", "uuid", "wave", "zoneinfo",
)  # fmt: skip
PRIVATE = (
    *HELD_OUT, "_collections_abc", "_compression", "_markupbase", "_py_abc", "_pydatetime", "_pydecimal", "_pyio",
    "_strptime", "_threading_local", "_weakrefset", "abc", "argparse", "ast", "asyncio", "base64", "bdb", "bisect",
    "bz2", "cProfile", "cmd", "code", "codecs", "codeop", "collections", "compileall", "concurrent", "contextlib",
    "copy", "copyreg", "ctypes", "curses", "dataclasses", "datetime", "dbm", "dis", "doctest", "email",
    "enum", "filecmp", "fileinput", "fnmatch", "ftplib", "functools", "genericpath", "getopt", "getpass", "glob",
    "gzip", "hashlib", "hmac", "http", "imaplib", "importlib", "inspect", "linecache", "locale", "logging",
    "lzma", "mailbox", "mimetypes", "modulefinder", "multiprocessing", "netrc", "ntpath", "nturl2path", "numbers",
    "opcode", "operator", "os", "pathlib", "pdb", "pickle", "pickletools", "pkgutil", "platform", "plistlib", "poplib",
    "posixpath", "profile", "pstats", "pty", "py_compile", "pyclbr", "pydoc", "queue", "quopri", "re", "reprlib",
    "rlcompleter", "runpy", "sched", "secrets", "selectors", "shlex", "shutil", "signal", "site", "smtplib", "socket",
    "socketserver", "sqlite3", "ssl", "stat", "stringprep", "subprocess", "symtable", "sysconfig", "tabnanny",
    "tempfile", "threading", "timeit", "tokenize", "trace", "traceback", "tracemalloc", "tty", "types",
    "typing", "unittest", "urllib", "venv", "warnings", "weakref", "webbrowser", "wsgiref", "xml", "xmlrpc", "zipapp",
    "zipfile", "zipimport",
)  # fmt: skip

PUBLIC = ("numpy", "scipy", "jax", "flax")  # required by setup.py
PUBLIC_HELD_OUT = ("numpy.polynomial", "scipy.signal", "scipy.ndimage", "jax.random", "flax.core")
# Tests; what is generated, differs from machine to machine or comes with some releases; what is copied from elsewhere,
# such as the standard library's `inspect` in numpy.
LEFT_OUT = re.compile(
    r"/tests?/|/conftest\.py$|/internal_test_util/|_generated\.py$|/__config__\.py$|/distutils/"
    r"|/experimental/|/pallas/|/_lib/|/_external/|/third_party/|/numpy/_utils/_inspect\.py$"
)

PAD, EOS = 0, 1
VOCABULARY = 1024
TOKENS = 128  # of a record, as in the experiments on GPT-2 that DP-OPD is compared with
TOKENIZER = Path(__file__).parent / "weights" / "functions_tokenizer.json"
TOKENIZER_CORPUS = "76339d34d4ccb361"  # how corpus_fingerprint("public") begins for what TOKENIZER is learnt from


# ---- corpora ---------------------------------------------------------------------------------------------------------


def private_records(split: str = "train") -> list[Record]:
    """Functions of Python's standard library, in the order of modules, files and lines.

    Three seconds the first time in a process.

    Args:
        split: "train", or "held_out" for the modules HELD_OUT.

    Raises:
        ConfigError: this Python has no source of its library.
        ValueError: no such split.
    """
    return _split(_private(), split)


def public_records(split: str = "train") -> list[Record]:
    """Functions of PUBLIC, as `private_records`. None of them is a private one: the tests hold all texts together.

    Seven seconds the first time in a process. A module is a package and what is under it: "scipy.signal".

    Args:
        split: "train", or "held_out" for the modules PUBLIC_HELD_OUT.

    Raises:
        ConfigError: a package of PUBLIC is not installed.
        ValueError: no such split.
    """
    return _split(_public(), split)


def corpus_fingerprint(corpus: str | None = None) -> str:
    """64 hexadecimal digits that change with any record of "private" or "public", or of either if none is named.

    It may be printed because these corpora are private by pretence: of private data, it would tell who is in there.
    """
    of = {"private": [_private], "public": [_public], None: [_private, _public]}[corpus]
    return fingerprint([read() for read in of])


def _split(found: dict[str, tuple[Record, ...]], split: str) -> list[Record]:
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: give one of {SPLITS}")
    return list(found[split])


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Syntax trees are very many objects and no cycles; the search for cycles would take a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
@_no_collection()
def _private() -> dict[str, tuple[Record, ...]]:
    root = Path(sysconfig.get_path("stdlib"))
    found = [record for name in sorted(PRIVATE) for path in _files(root, name) for record in _read(path, name)]
    if not found:
        raise ConfigError(f"no source of Python's standard library under {root}; use a Python that comes with it")
    return _distinct(found, HELD_OUT)


@functools.cache
@_no_collection()
def _public() -> dict[str, tuple[Record, ...]]:
    found = []
    for name in sorted(PUBLIC):
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ConfigError(f"the public corpus needs {name}, which is not installed; run pip install {name}")
        root = Path(spec.origin).parents[1]
        for path in _files(root, name):
            parts = [part for part in path.relative_to(root).with_suffix("").parts if part != "_src"]
            found += _read(path, ".".join(parts[:2]))
    return _distinct(found, PUBLIC_HELD_OUT)


def _files(root: Path, name: str) -> list[Path]:
    """Files of a module or package, in one order on every machine; none where there is no such module."""
    if (root / f"{name}.py").is_file():
        return [root / f"{name}.py"]
    found = sorted((root / name).rglob("*.py"), key=Path.as_posix)
    return [path for path in found if not LEFT_OUT.search(f"/{path.relative_to(root).as_posix()}")]


def _read(path: Path, module: str) -> list[Record]:
    return list(records_in(path.read_text("utf-8"), module))


def _distinct(found: list[Record], held_out: Sequence[str]) -> dict[str, tuple[Record, ...]]:
    """The splits, without records that repeat an earlier one; those of the train split come first."""
    splits, seen = {split: [] for split in SPLITS}, set()
    for record in sorted(found, key=lambda record: record.module in held_out):
        keys = _keys(record)
        if seen.isdisjoint(keys):
            splits[SPLITS[record.module in held_out]].append(record)
        seen |= keys
    return {split: tuple(some) for split, some in splits.items()}


def _keys(record: Record) -> set[str]:
    """What no two records share: the continuation, and name and docstring; whatever the case and white space."""
    keys = {normalised(record.continuation)}
    line = record.continuation.split("\n", 2)[1]
    return keys | {normalised(record.prompt.split("(")[0] + line)} if line.startswith('    """') else keys


def normalised(text: str) -> str:
    """A text by which equal ones are told: words and signs in lower case, one blank between two."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text.lower()))


# ---- tokens ----------------------------------------------------------------------------------------------------------


def encode(record: Record, limit: int = TOKENS) -> tuple[Int[np.ndarray, "S"], int]:
    """Token ids of a record, its prompt first, int32, and how many are prompt; at most `limit`, see `records.join`.

    What `records.encode` gives with `make_tokenizer()`, without transformers.
    """
    prompt, continuation = (_tokenizer().encode(text).ids for text in (record.prompt, record.continuation))
    return records.join(prompt, continuation, EOS, limit)


def decode(tokens: Int[np.ndarray, "S"]) -> str:
    """The text of token ids without special tokens; bytes that are no UTF-8, as half a character is, become U+FFFD."""
    return _tokenizer().decode(np.asarray(tokens).tolist())


@functools.cache
def _tokenizer() -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.encode_special_tokens = True  # "<eos>" in a text is five characters of it
    return tokenizer


def make_tokenizer() -> "transformers.PreTrainedTokenizerFast":
    """The tokenizer for transformers: nothing is added to a text, and decoding gives it back."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(TOKENIZER)),
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        model_max_length=TOKENS,
    )


def save_tokenizer(directory: str | os.PathLike) -> Path:
    """Writes the tokenizer where `transformers.AutoTokenizer.from_pretrained` finds it; returns the folder."""
    make_tokenizer().save_pretrained(directory)
    return Path(directory)


def train_tokenizer(texts: Iterable[str]) -> "tokenizers.Tokenizer":
    """Byte-level byte-pair encoding of VOCABULARY tokens, learnt from texts: always the same from the same.

    Private texts must not be among them: a merge tells of a word that is in there. TOKENIZER was made by

        public = functions.public_records("train")
        functions.train_tokenizer(record.prompt + record.continuation for record in public).save(str(TOKENIZER))
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer

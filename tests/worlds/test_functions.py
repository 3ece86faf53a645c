"""Functions as records: what is in a record, which records there are, and that nothing private is learnt from."""

import ast
import collections
import itertools
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from opd_jax.worlds import functions, functions_source, records
from opd_jax.worlds.records import Record


@pytest.fixture(scope="module")
def private():
    return {split: functions.private_records(split) for split in functions.SPLITS}


@pytest.fixture(scope="module")
def public():
    return {split: functions.public_records(split) for split in functions.SPLITS}


def texts(found):
    return {functions.normalised(record.continuation) for record in found}


# ---- records ---------------------------------------------------------------------------------------------------------

SOURCE = '''
import os

def first(a, b="ä"):
    """Adds a
    and b.

    At length.
    """
    # a comment before the body is not kept
    total = a + b  # one within is

    return total, "some more, so that it is long enough"

class Thing:
    @property
    def size(self): return self._size_that_is_long_enough_to_count

    @staticmethod
    async def wait(
        self, seconds,
        *, loudly=False,
    ):
        """Ends in a \\\\ backslash."""
        def inner(x):
            return """
text
            """
        return inner(seconds)

    def nothing(self):
        """Only a docstring, which is long enough by itself."""

    def short(self):
        return self.a

    def remarked(self, x,  # this
                 y):
        return "long enough to count, but for the comment"

try:
    import missing
except ImportError:
    if os.name == "nt":
        @decorated
        class Other:
            @decorated
            @classmethod
            def made(cls):
                @decorated
                def inner(): pass
                return cls("long enough to count")
'''


def test_records_of_a_file_by_hand():
    found = list(functions_source.records_in(SOURCE, "here"))
    assert [record.kind for record in found] == ["function", "property", "staticmethod", "classmethod"]
    assert {record.module for record in found} == {"here"}
    first, size, wait, made = found
    assert first.prompt == 'def first(a, b="ä"):'
    assert first.continuation == (
        '\n    """Adds a and b."""\n    total = a + b  # one within is\n\n'
        '    return total, "some more, so that it is long enough"'
    )
    assert (size.prompt, size.continuation) == (
        "def size(self):",
        "\n    return self._size_that_is_long_enough_to_count",
    )
    assert wait.prompt == "async def wait(self, seconds, *, loudly=False):"
    assert wait.continuation == (
        '\n    def inner(x):\n        return """\n    text\n        """\n    return inner(seconds)'
    )
    assert made.continuation.startswith("\n    @decorated\n    def inner(): pass\n    return cls(")


def test_every_record_is_a_function_of_python(private, public):
    for record in itertools.chain(*private.values(), public["train"][::4], public["held_out"]):
        (node,) = ast.parse(record.prompt + record.continuation).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and record.kind in functions.KINDS
        assert re.fullmatch(r"(async )?def .*:", record.prompt) and len(record.prompt) <= functions_source.SIGNATURE
        assert len(record.continuation) >= functions_source.SHORTEST and record.continuation[0] == "\n"


def test_a_record_is_the_function_that_it_is_read_from(private):
    found = {(record.prompt, record.continuation): record for record in private["held_out"]}
    record = found[next(key for key in found if key[0] == "def dedent(text):")]
    (node,) = ast.parse(record.prompt + record.continuation).body
    assert record.module == "textwrap" and record.kind == "function"
    assert ast.get_docstring(node) == textwrap.dedent.__doc__.split("\n\n")[0]
    scope = vars(textwrap).copy()
    exec(record.prompt + record.continuation, scope)
    assert scope["dedent"]("  a\n   b") == "a\n b"


# ---- corpora ---------------------------------------------------------------------------------------------------------


def test_there_are_thousands_of_records(private, public):
    assert len(private["train"]) > 7000 and len(private["held_out"]) > 800
    assert len(public["train"]) > 9000 and len(public["held_out"]) > 800
    kinds = collections.Counter(record.kind for record in private["train"])
    assert set(kinds) == set(functions.KINDS) and min(kinds.values()) > 30
    shares = collections.Counter(record.module for record in private["train"])
    assert max(shares.values()) < 0.15 * len(private["train"])  # no module is most of it


def test_splits_share_no_module_and_no_text(private, public):
    for corpus, held_out in ((private, functions.HELD_OUT), (public, functions.PUBLIC_HELD_OUT)):
        modules = [{record.module for record in corpus[split]} for split in functions.SPLITS]
        assert not modules[0] & modules[1] and modules[1] <= set(held_out)
        assert not texts(corpus["train"]) & texts(corpus["held_out"])
    with pytest.raises(ValueError, match="no split 'test'"):
        functions.private_records("test")


def test_no_private_record_is_public(private, public):
    assert not texts(itertools.chain(*private.values())) & texts(itertools.chain(*public.values()))


def test_records_of_one_text_or_of_one_name_and_docstring_are_there_once(private):
    every = [*private["train"], *private["held_out"]]
    assert len(texts(every)) == len(every)
    named = [
        (record.prompt.split("(")[0], *record.continuation.lower().split("\n")[1].split())
        for record in every
        if record.continuation.startswith('\n    """')
    ]
    assert len(set(named)) == len(named) > 3000


def runs(record):
    """All runs of five words and signs among the first hundred of a continuation."""
    words = functions.normalised(record.continuation[:500]).split()[:100]
    return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))}


def test_hardly_a_held_out_record_is_nearly_one_of_training(private):
    held_out, where = [runs(record) for record in private["held_out"]], collections.defaultdict(list)
    for i, run in ((i, run) for i, mine in enumerate(held_out) for run in mine):
        where[run].append(i)
    near = set()
    for mine in map(runs, private["train"]):
        shared = collections.Counter(itertools.chain(*(where.get(run, ()) for run in mine)))
        near |= {i for i, count in shared.items() if count > 0.7 * (len(mine) + len(held_out[i]) - count)}
    assert len(near) <= 10  # of 900, have more than 0.7 of all runs in common with one of training


def test_what_repeats_is_dropped_and_training_comes_first():
    record = lambda prompt, continuation, module: Record(prompt, continuation, module, "function")
    one = record("def f(x):", '\n    """Says one."""\n    return x + 1', "b")
    same_text = record("def g(y):", '\n    """Says  ONE."""\n\n    return x+1', "b")
    same_docstring = record("def f(x, y):", '\n    """Says one."""\n    return x + y', "a")
    other = record("def h(x):", '\n    """Says one."""\n    return x + 2', "a")
    splits = functions._distinct([other, same_docstring, one, same_text], ["a"])
    assert splits == {"train": (one,), "held_out": (other,)}


def test_files_are_in_one_order_and_without_tests(tmp_path):
    for name in ("m/b.py", "m/a/z.py", "m/a.py", "m/tests/test_a.py", "m/experimental/x.py", "single.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    names = lambda module: [path.relative_to(tmp_path).as_posix() for path in functions._files(tmp_path, module)]
    assert names("m") == ["m/a.py", "m/a/z.py", "m/b.py"]
    assert names("single") == ["single.py"] and names("missing") == []


PRINT = """
import hashlib
from opd_jax.worlds import functions
print(functions.corpus_fingerprint({corpus}))
if {corpus} != "private":
    public = functions.public_records()
    tokenizer = functions.train_tokenizer(record.prompt + record.continuation for record in public)
    print(hashlib.sha256(tokenizer.to_str().encode()).hexdigest())
"""


def in_another_process(corpus, seed):
    environment = dict(os.environ, PYTHONHASHSEED=seed, TOKENIZERS_PARALLELISM="true")
    command = [sys.executable, "-c", PRINT.format(corpus=repr(corpus))]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


def test_private_records_are_the_same_in_another_process():
    assert in_another_process("private", "7") == [functions.corpus_fingerprint("private")]


def test_the_fingerprint_tells_of_any_change(monkeypatch, private):
    before = functions.corpus_fingerprint("private")
    assert re.fullmatch("[0-9a-f]{64}", before)
    monkeypatch.setattr(functions, "_private", lambda: {split: tuple(private[split][:-1]) for split in private})
    assert functions.corpus_fingerprint("private") != before


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_of_a_record(private):
    record = next(record for record in private["held_out"] if record.prompt == "def dedent(text):")
    tokens, prompt = functions.encode(record, 10_000)
    assert tokens.dtype == np.int32 and tokens[-1] == functions.EOS
    assert functions.decode(tokens[:prompt]) == record.prompt
    assert functions.decode(tokens[prompt:]) == record.continuation
    whole = functions.encode(Record("", record.prompt + record.continuation), 10_000)[0]
    assert (whole[1:] == tokens).all()  # the place between prompt and continuation is one between tokens anyway
    cut, same = functions.encode(record, 20)
    assert same == prompt and (cut == tokens[:20]).all()


def test_any_text_comes_back(private, public):
    rng = np.random.default_rng(0)
    found = [*private["train"], *private["held_out"], *public["train"], *public["held_out"]]
    strange = [Record("é\t\r\n<eos>", "  \x00 <pad> <eos>漢字 🙂\u2028 "), Record("", " x")]
    for record in [*(found[i] for i in rng.choice(len(found), 300, replace=False)), *strange]:
        tokens, prompt = functions.encode(record, 100_000)
        assert functions.decode(tokens[:prompt]) == record.prompt
        assert functions.decode(tokens[prompt:]) == record.continuation
        ends = np.flatnonzero(tokens == functions.EOS)
        assert ends[-1] == len(tokens) - 1 and len(ends) == (1 if record.prompt else 2)  # an empty prompt is one


def test_lengths(private, public):
    for corpus, most in ((private, 110), (public, 130)):
        for found in corpus.values():
            some = found[:: len(found) // 200]
            long = [len(functions.encode(record, 100_000)[0]) for record in some]
            short = [functions.encode(record) for record in some]
            size = sum(len((record.prompt + record.continuation).encode()) for record in some)
            assert 60 < np.median(long) < most + 30 and 2.2 < size / sum(long) < 3.0
            assert max(len(tokens) for tokens, _ in short) == functions.TOKENS
            assert sum(prompt < functions.TOKENS // 2 for _, prompt in short) > 0.98 * len(short)


def test_transformers_sees_the_same_tokenizer(private, tmp_path):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(functions.save_tokenizer(tmp_path))
    assert len(loaded) == functions.VOCABULARY
    assert (loaded.pad_token_id, loaded.eos_token_id) == (functions.PAD, functions.EOS)
    for record in [*private["held_out"][:40], Record("", "a <eos> within"), Record("<pad>", "a\n\n")]:
        for tokenizer in (loaded, functions.make_tokenizer()):
            tokens, prompt = records.encode(record, tokenizer, 64)
            ours, length = functions.encode(record, 64)
            assert tokens.tolist() == ours.tolist() and prompt == length
        assert loaded.decode(ours, skip_special_tokens=True) == functions.decode(ours)


@pytest.mark.slow
def test_the_tokenizer_is_learnt_from_public_records_alone_and_is_the_one_shipped(monkeypatch, public):
    monkeypatch.setattr(functions, "_private", lambda: pytest.fail("reads private records"))
    made = functions.train_tokenizer(record.prompt + record.continuation for record in functions.public_records())
    shipped = functions._tokenizer()
    fingerprint = functions.corpus_fingerprint("public")
    if fingerprint.startswith(functions.TOKENIZER_CORPUS):
        assert made.to_str() == functions.TOKENIZER.read_text()
    else:  # other releases of the libraries: most of what is learnt is the same
        assert len(made.get_vocab().keys() & shipped.get_vocab().keys()) > 0.9 * functions.VOCABULARY
    assert in_another_process("public", "7")[0] == fingerprint

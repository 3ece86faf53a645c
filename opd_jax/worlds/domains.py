"""Five domains of problems that can be checked, for several teachers: mathematics, code, logic, charts, documents.

| domain | kinds | prompt | picture | a solution ends in | file |
| --- | --- | --- | --- | --- | --- |
| mathematics | arithmetic, equation | `solve: 3*x+4=19` | | `#### 5` | `domains_mathematics.py` |
| code | code | `write f: sort, take 3, sum` | | the program | `domains_code.py` |
| logic | order, circuit | `first: c<d, c>b` | | `#### b` | `domains_logic.py` |
| charts | chart | `<image>red + blue` | bars | `#### 7` | `domains_charts.py` |
| documents | document | `<image>look up b` | a form | `#### 4` | `domains_documents.py` |

A problem has a level from 1 to 4. A solution is one line per step, in one of two styles: in "steps" a line is what was
done and its result, in "states" it is all that is left of the problem or has to be kept in mind. So two teachers can be
right and still speak differently. The text of a record is `problem.prompt + solution(problem)`, then `<eos>`: a prompt
ends with the newline after which the solution starts. Where there is a picture, a prompt begins with `<image>`, one
token, in the place of which a model has what it sees.

A prompt has at most PROMPT_TOKENS tokens, and a solution, with `<eos>`, at most SOLUTION_TOKENS. The module knows
nothing of training.
"""

import base64
import io
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from opd_jax.worlds import domains_charts, domains_code, domains_documents, domains_logic, domains_mathematics
from opd_jax.worlds.domains_interpreter import passes
from opd_jax.worlds.domains_kinds import STYLES
from opd_jax.worlds.domains_tokens import EOS, PAD, UNK, Vocabulary
from opd_jax.worlds.reasoning import answer_of
from opd_jax.worlds.reasoning_programs import DIGITS, LETTERS, QUERIES

__all__ = [
    "DOMAINS", "EOS", "IMAGE", "IMAGE_SIZE", "LEVELS", "PAD", "PROMPT_TOKENS", "SOLUTION_TOKENS", "STYLES", "TABLE",
    "UNK", "WORDS", "Problem", "answer_of", "decode", "draw", "encode", "make_tokenizer", "parse", "save_tokenizer",
    "solution", "to_record", "verify",
]  # fmt: skip

TABLE = (
    domains_mathematics.KINDS
    | domains_code.KINDS
    | domains_logic.KINDS
    | domains_charts.KINDS
    | domains_documents.KINDS
)
DOMAINS = ("mathematics", "code", "logic", "charts", "documents")
LEVELS = (1, 2, 3, 4)
KINDS = {domain: tuple(name for name, kind in TABLE.items() if kind.domain == domain) for domain in DOMAINS}
IMAGE_SIZE = 32
PROMPT_TOKENS, SOLUTION_TOKENS = 40, 64  # solutions up to level 3 have at most 48

WORDS = tuple(dict.fromkeys((
    "<pad>", "<eos>", "<unk>", "<image>", "\n", ": ", ", ", "#### ", *DIGITS, *LETTERS, "x",
    "+", "-", "*", "/", "=", "<", ">", "(", ")", "[", "]", ":",
    "compute", "solve", "which hold", *QUERIES, "true", "false", "none", *domains_logic.GATES,
    "write f", " of ", *(f"{name} " if made.digits else name for name, made in domains_code.OPERATIONS.items()),
    "def f(x):", "    x = ", "    return ", "sorted(", "sum(", "max(", "min(", "len(", ".count(", "[::-1]",
    " for a in ", " if ", *domains_charts.COLORS, " + ", " - ", "?", "value of ", "which is ", "tallest", "shortest",
    "how many ", "sum of all", "look up ", "key of ", "rows with ", "follow ",
)))  # fmt: skip
IMAGE = WORDS.index("<image>")
_VOCABULARY = Vocabulary(WORDS)
encode, decode = _VOCABULARY.encode, _VOCABULARY.decode


class Problem(NamedTuple):
    """One problem: of a kind (a key of TABLE), with a content as the kind makes it. Hashable."""

    kind: str
    content: tuple

    @property
    def domain(self) -> str:
        return TABLE[self.kind].domain

    @property
    def level(self) -> int:
        return TABLE[self.kind].level(self.content)

    @property
    def prompt(self) -> str:
        image = WORDS[IMAGE] if TABLE[self.kind].render else ""
        return f"{image}{TABLE[self.kind].write(self.content)}\n"

    @property
    def answer(self) -> str:
        """What `answer_of` has to find; "" in code."""
        return TABLE[self.kind].solve(self.content, "steps")[1]

    @property
    def tests(self) -> str:
        """Assertions about `f`, one a line; "" but in code."""
        cases = TABLE[self.kind].cases
        return "\n".join(f"assert f({x}) == {y}" for x, y in cases(self.content)) if cases else ""

    @property
    def image(self) -> UInt8[np.ndarray, "32 32 3"] | None:
        """The picture, painted anew every time, or None."""
        render = TABLE[self.kind].render
        return render(self.content) if render else None

    @property
    def is_held_out(self) -> bool:
        """Whether it joins two things that no training problem of its kind joins."""
        return TABLE[self.kind].is_held_out(self.content)

    @property
    def is_test(self) -> bool:
        """Whether the problem belongs to the test split: one in six by a hash of its content, or held out.

        Of a picture the hash sees the values that are shown, of code the program: neither the question nor the looks
        nor the wording make a training problem of a test problem.
        """
        return self.is_held_out or zlib.crc32(TABLE[self.kind].identity(self.content).encode()) % 6 == 0


def draw(rng: np.random.Generator, domain: str, level: int, test: bool = False) -> Problem:
    """A random problem of a domain and level, of each of its kinds as often, from one split (by rejection).

    Some 10 to 180 microseconds, up to four times that for the test split.

    Args:
        rng: source of all randomness; a rejected draw takes from it too.
        domain: one of DOMAINS.
        level: one of LEVELS.
        test: which split.

    Raises:
        ValueError: no such domain or level.
    """
    if domain not in DOMAINS or level not in LEVELS:
        raise ValueError(f"no problems of {domain!r} at level {level!r}: give one of {DOMAINS} and of {LEVELS}")
    name = KINDS[domain][int(len(KINDS[domain]) * rng.random())]
    kind = TABLE[name]
    while True:
        problem = Problem(name, kind.draw(rng, level))
        if problem.is_test == test and (kind.accepts is None or kind.accepts(problem.content)):
            return problem


def solution(problem: Problem, style: str = "steps") -> str:
    """The worked solution, without a newline or `<eos>` at the end.

    Raises:
        ValueError: no such style.
    """
    if style not in STYLES:
        raise ValueError(f"no style {style!r}: give one of {STYLES}")
    lines, answer = TABLE[problem.kind].solve(problem.content, style)
    return "\n".join((*lines, f"#### {answer}") if answer else lines)


def verify(problem: Problem, completion: str) -> float:
    """1.0 where the final answer is right, or the program passes the tests, else 0.0.

    | completion | result |
    | --- | --- |
    | any steps, then the right answer in the last line that begins with `#### ` | 1.0 |
    | blank, or without such a line | 0.0 |
    | code: any program with the same results, by `domains_interpreter`, in half a millisecond | 1.0 |
    | code: no Python, or more than the interpreter allows | 0.0 |
    """
    cases = TABLE[problem.kind].cases
    if cases:
        return float(passes(completion, cases(problem.content)))
    return float(answer_of(completion) == problem.answer)


def parse(prompt: str) -> Problem:
    """Reads a prompt without a picture, whatever its white space.

    Raises:
        ValueError: quotes it and says what can be written.
    """
    head, _, value = " ".join(prompt.split()).partition(": ")
    examples = ", ".join(repr(kind.example) for kind in TABLE.values() if kind.read)
    cannot = f"cannot read the problem {prompt!r}"
    kind = next((name for name, kind in TABLE.items() if head in kind.heads), None)
    if kind is None:
        hint = "what is in a picture cannot be read from its question. " if WORDS[IMAGE] in prompt else ""
        raise ValueError(f"{cannot}: {hint}Write for instance {examples}")
    try:
        problem = Problem(kind, TABLE[kind].read(head, value))
    except ValueError as error:
        raise ValueError(f"{cannot}: {error}. Write for instance {examples}") from error
    if problem.level not in LEVELS:
        raise ValueError(f"{cannot}: it is of level {problem.level}; write a shorter one, of {LEVELS}")
    return problem


def to_record(problem: Problem) -> dict[str, Any]:
    """A record of a JSONL file: `prompt`, `answer` or `tests`, `domain`, and `images`, PNG files in base64."""
    record = {"prompt": problem.prompt, "domain": problem.domain, "images": []}
    record |= {"tests": problem.tests} if problem.tests else {"answer": problem.answer}
    if (image := problem.image) is not None:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        record["images"].append(base64.b64encode(file.getvalue()).decode())
    return record


def make_tokenizer() -> "transformers.PreTrainedTokenizerFast":
    """The tokenizer for transformers: one word of WORDS per token, nothing added, decoded without spaces."""
    return _VOCABULARY.tokenizer(PROMPT_TOKENS + SOLUTION_TOKENS)


def save_tokenizer(directory: str | os.PathLike) -> Path:
    """Writes the tokenizer where `transformers.AutoTokenizer.from_pretrained` finds it; returns the folder."""
    make_tokenizer().save_pretrained(directory)
    return Path(directory)

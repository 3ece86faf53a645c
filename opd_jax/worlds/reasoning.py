"""A small world of reasoning problems whose answers can be checked: arithmetic, lists, strings and a little logic.

    compute: 7*8-12+5        sort, take 3, sum: [5284]        first: c<d, c>b
    7*8=56                   sort: [2458]                     c<d: cd
    56-12=44                 take 3: [245]                    c>b: bcd
    44+5=49                  sum: 11                          first: b
    #### 49                  #### 11                          #### b

A problem has a level from 1 to 5, its number of operations (of clues, in logic), and sizes grow with it. A solution is
one line per step and a last line `#### ANSWER`, in one of two styles (see `reasoning_programs`), so that two teachers
can be right and still speak differently. `parse` and `Problem.prompt` are inverse. The text of a record is
`problem.prompt + solution(problem)`, then `<eos>`: a prompt ends with the newline after which the solution starts.

A token is one of WORDS and a text is its tokens written one after the other, so encoding loses nothing. A prompt has at
most PROMPT_TOKENS tokens and a solution, with `<eos>`, at most SOLUTION_TOKENS. The module knows nothing of training.
"""

import itertools
import os
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from opd_jax.worlds import reasoning_programs as programs
from opd_jax.worlds.reasoning_programs import DIGITS, LETTERS, TABLE

LEVELS = (1, 2, 3, 4, 5)
STYLES = ("steps", "states")
FAMILIES = tuple(TABLE)

WORDS = (
    "<pad>", "<eos>", "<unk>", "\n", ": ", ", ", "#### ", *DIGITS, *LETTERS, "+", "-", "*", "=", "<", ">", "[", "]",
    "compute", "sort", "reverse", "evens", "odds", "unique", "swap", "sum", "max", "min", "length",
    "take ", "drop ", "rotate ", "replace ", " by ", "remove ", "count ", *programs.QUERIES,
)  # fmt: skip
PAD, EOS, UNK = 0, 1, 2
PROMPT_TOKENS, SOLUTION_TOKENS = 48, 96


class Problem(NamedTuple):
    """What is done to what: see the table of `reasoning_programs`."""

    family: str
    program: tuple[str, ...]
    data: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return TABLE[self.family].write(self.program, self.data) + "\n"

    @property
    def level(self) -> int:
        return len(self.data if self.family == "logic" else self.program)

    @property
    def answer(self) -> str:
        return TABLE[self.family].solve(self.program, self.data, "steps")[1]

    @property
    def is_held_out(self) -> bool:
        """Whether the prompt joins the two operations that no training prompt of its family joins."""
        names = [operation.split()[0] for operation in self.program]
        if self.family == "logic":
            names += [clue[1] for clue in self.data]
        return TABLE[self.family].held_out in itertools.pairwise(names)

    @property
    def is_test(self) -> bool:
        """Whether the problem belongs to the test split: one in six by a hash of its prompt, or held out.

        In logic the hash leaves out what is asked, so that the clues of a test problem are new, not the question alone.
        Solutions of training problems may still pass through what is a test problem of a lower level.
        """
        content = self._replace(program=("",)) if self.family == "logic" else self
        return self.is_held_out or zlib.crc32(content.prompt.encode()) % 6 == 0


def draw(rng: np.random.Generator, family: str, level: int, test: bool = False) -> Problem:
    """A random problem of a family and level, from the train or the test split (by rejection).

    Some 20 to 60 microseconds, five times that for the test split.

    Args:
        rng: source of all randomness; a rejected draw takes from it too.
        family: one of FAMILIES.
        level: one of LEVELS.
        test: which split.

    Raises:
        ValueError: no such family or level.
    """
    if family not in TABLE or level not in LEVELS:
        raise ValueError(
            f"no problems of family {family!r} and level {level!r}: give one of {FAMILIES} and of {LEVELS}"
        )
    while True:
        problem = Problem(family, *TABLE[family].draw(rng, level))
        if problem.is_test == test:
            return problem


def solution(problem: Problem, style: str = "steps") -> str:
    """The worked solution: a line per step, then `#### ANSWER`, without a newline or `<eos>` at the end.

    Raises:
        ValueError: no such style.
    """
    if style not in STYLES:
        raise ValueError(f"no style {style!r}: give one of {STYLES}")
    lines, answer = TABLE[problem.family].solve(problem.program, problem.data, style)
    return "\n".join((*lines, f"#### {answer}"))


def parse(prompt: str) -> Problem:
    """Reads a prompt, whatever its white space. Raises: ValueError that quotes it and says what can be written."""
    head, _, value = " ".join(prompt.split()).partition(": ")
    if head == "compute":
        family = "arithmetic"
    elif head in programs.QUERIES:
        family = "logic"
    else:
        family = "lists" if value.startswith("[") else "strings"
    try:
        return Problem(family, *TABLE[family].read(head, value))
    except ValueError as error:
        examples = ", ".join(repr(kind.example) for kind in TABLE.values())
        raise ValueError(f"cannot read the problem {prompt!r}: {error}. Write for instance {examples}") from error


def answer_of(completion: str) -> str | None:
    """The final answer of a text without special tokens: what follows `#### ` on the last such line, or None."""
    found = re.findall(r"^#### (\S+)$", completion, re.MULTILINE)
    return found[-1] if found else None


def correct(problem: Problem, completion: str) -> bool:
    """Whether the final answer is right, whatever stands before it."""
    return answer_of(completion) == problem.answer


def steps_correct(problem: Problem, completion: str, style: str | None = None) -> float:
    """Share of lines that are right: the same line at the same place as in the solution of a style.

    Args:
        problem: what was asked.
        completion: what was written after the prompt, without special tokens.
        style: the style it is held against; None takes the style that agrees best.

    Returns:
        In [0, 1]. The divisor is the longer of the two, so missing and surplus lines both count as wrong.
    """
    if style is None:
        return max(steps_correct(problem, completion, style) for style in STYLES)
    lines, right = completion.split("\n"), solution(problem, style).split("\n")
    return sum(a == b for a, b in zip(lines, right)) / max(len(lines), len(right))


# ---- tokens ----------------------------------------------------------------------------------------------------------

_INDEX = {word: i for i, word in enumerate(WORDS)}
_TOKEN = "|".join(re.escape(word) for word in sorted(WORDS, key=len, reverse=True))  # the longest that fits
_PIECE = re.compile(rf"{_TOKEN}|(?:(?!{_TOKEN}).)+", re.DOTALL)  # a run of what is no token becomes one <unk>


def encode(text: str) -> Int[np.ndarray, "S"]:
    """Token ids, int32: what `make_tokenizer()(text)["input_ids"]` gives, about twenty times as fast."""
    return np.array([_INDEX.get(piece, UNK) for piece in _PIECE.findall(text)], np.int32)


def decode(tokens: Int[np.ndarray, "S"]) -> str:
    """The text of token ids without special tokens; inverse of `encode` for every prompt and solution."""
    return "".join(WORDS[i] for i in np.asarray(tokens).tolist() if i > UNK)


def make_tokenizer() -> "transformers.PreTrainedTokenizerFast":
    """The tokenizer for transformers: one word of WORDS per token, nothing added, decoded without spaces."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(_INDEX, unk_token=WORDS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=WORDS[PAD],
        eos_token=WORDS[EOS],
        unk_token=WORDS[UNK],
        clean_up_tokenization_spaces=False,
        model_max_length=PROMPT_TOKENS + SOLUTION_TOKENS,
    )


def save_tokenizer(directory: str | os.PathLike) -> Path:
    """Writes the tokenizer where `transformers.AutoTokenizer.from_pretrained` finds it; returns the folder."""
    make_tokenizer().save_pretrained(directory)
    return Path(directory)

r"""Short answers to questions about pictures: the letter of a choice, a number or a few words, a phrase in a document.

All three read the final answer of `maths.final_answer` (`\boxed{B}`, `#### B`, "the answer is B"), and where there is
none, what stands after the last "Answer:" or else on the last line.
"""

import re
from collections.abc import Sequence

from opd_jax.rewards.maths import LONGEST, final_answer
from opd_jax.rewards.verify import Unverified

_LABEL = re.compile(r"\banswer[ *]*:[ \t*]*(.*)", re.IGNORECASE)
_MARKUP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\b|[{}$*`\"]|\\[()\[\]]")
_LETTER = re.compile(
    r"(?:option|choice)?\s*[(\[]?([A-H])(?:[)\]]|[.,:](?!\w)|\s+(?:because|since|as)\b|$).*", re.IGNORECASE
)
_LAST = re.compile(r"(?:^|[\s(\[])([A-H])[)\]]?[.:]?$")  # a capital at the end, where no article stands
_NUMBER = re.compile(
    r"([-+]?)\s*[$€£¥]?\s*([-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:e[-+]?\d+)?)\s*(\\?%)?", re.IGNORECASE
)


def _said(completion: str) -> str:
    """A completion's answer without markup, on one line; "" where there is none."""
    answer = final_answer(completion)
    if answer is None:
        lines = [line for line in completion.splitlines() if line.strip(" \t.*")] or [""]
        labelled = _LABEL.findall(completion)
        answer = labelled[-1] if labelled else lines[-1]
    return " ".join(_MARKUP.sub("", answer[:LONGEST]).split())


def choice(completion: str, answer: str) -> float:
    r"""1.0 where a completion chooses the letter A to H of the reference, else 0.0.

    Read are `\boxed{B}`, "the answer is (B)", "Answer: B. two cats", "#### b", and without any of these a last line
    that is "B", "(b)", "B. two cats", or ends on a capital: "so it must be B." The article in "A cat" is no choice.

    Raises:
        Unverified: the reference is no letter, such as "B" or "(B)".
    """
    reference = _LETTER.fullmatch(_said(answer))
    if reference is None:
        raise Unverified("choice: a reference that is no letter")
    said = _said(completion)
    chosen = _LETTER.fullmatch(said) or _LAST.search(said)
    return float(chosen is not None and chosen[1].upper() == reference[1].upper())


def number(completion: str, answer: str, tolerance: float = 0.05) -> float:
    """ChartQA's relaxed accuracy (arXiv:2203.10244, after arXiv:1909.00997): numbers to 5 %, all else the same words.

    Numbers may have a currency sign, thousands separators and a per cent sign. Where only one of the two has that sign,
    50 % is 0.5 as well as 50; the original knows 0.5 alone. A year is a number, so 1990 passes for 2010: give tolerance
    0 where years are asked for. Words are compared without case and outer punctuation.

    Args:
        tolerance: relative; a reference of 0 is met by 0 alone.
    """
    said, wanted = _said(completion), _said(answer)
    ours, theirs = _value(said), _value(wanted)
    if ours is None or theirs is None:
        return float(_words(said) == _words(wanted) != "")
    (value, percent), (reference, of_hundred) = ours, theirs
    scales = (1.0,) if percent == of_hundred else (1.0, 0.01 if percent else 100.0)
    return float(any(abs(value * scale - reference) <= tolerance * abs(reference) for scale in scales))


def anls(completion: str, answer: str | Sequence[str]) -> float:
    """Likeness to the nearest of the references in [0, 1], DocVQA's ANLS of one question (arXiv:1907.00490, eq. 1).

    1 - edit distance / length of the longer, and 0 where that is below one half.
    """
    references = [answer] if isinstance(answer, str) else answer
    said = _words(_said(completion))
    likeness = [1 - _distance(said, words) / max(len(said), len(words), 1) for words in map(_words, references)]
    return max((value for value in likeness if value >= 0.5), default=0.0)


def _value(text: str) -> tuple[float, bool] | None:
    """A number and whether it is in per cent; None of other text."""
    found = _NUMBER.fullmatch(text.replace("−", "-").rstrip("."))
    if found is None or not re.search(r"\d", found[2].lower().split("e")[0]):
        return None
    try:
        return float(found[1] + found[2].replace(",", "")), bool(found[3])
    except ValueError:  # two signs
        return None


def _words(text: str) -> str:
    return " ".join(text.casefold().strip(" .,;:!?'()").split())


def _distance(word: str, other: str) -> int:
    """Insertions, deletions and substitutions from one to the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(word, 1):
        new = [i]
        for j, match in enumerate(other, 1):
            new.append(min(row[j - 1] + (letter != match), row[j] + 1, new[-1] + 1))
        row = new
    return row[-1]

"""Choices, numbers and phrases, as models write them."""

import pytest

from opd_jax.rewards import answers
from opd_jax.rewards.verify import Unverified


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{B}",
        r"\boxed{\text{B}}",
        r"\boxed{\textbf{(B) }12}",
        r"The answer is $\boxed{\mathrm{B}}$.",
        r"\boxed{A} no: \boxed{b}",
        "#### B",
        "#### (b)",
        "The answer is (B).",
        "The answer is B. A cat is no dog.",
        "The answer is: B, because A is a cat.",
        "The answer is B because A is a cat.",
        "The correct answer is option **B**",
        "The answer is:\nB",
        "Answer: B",
        "**Answer:** (B) two cats",
        "**Answer**: B. two cats",
        "Answer: A\nWait.\nAnswer: B",
        "B",
        "b",
        "(B)",
        "[B]",
        "B.",
        "B) two cats",
        "B: two cats",
        "A cat and a dog are seen.\nB. two cats",
        "so it must be B.",
        "I choose option (B)",
        "Not A. Not C.\n\nB\n",
    ],
)
@pytest.mark.parametrize("reference", ["B", "(B)", "b", " B. ", "B. two cats"])
def test_a_choice_is_read(text, reference):
    assert answers.choice(text, reference) == 1.0
    assert answers.choice(text, reference.replace("B", "C").replace("b", "c")) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "A cat sits there",
        "a cat",
        "The answer is a cat",
        "The answer is A big dog.",
        "There is a",
        "Both A and B are there",
        "Answer:",
        r"\boxed{A",  # cut off
        r"\boxed{}",
        r"\boxed{A cat}",
        "Apple",
        "A.5",
        "A-",
        "BA",
        "\ud800",
        "A" * 5000,
        "(" * 5000 + "A",
    ],
)
def test_an_article_is_no_choice(text):
    assert answers.choice(text, "A") == 0.0


@pytest.mark.parametrize("reference", ["cat", "1", "I", "AB"])
def test_a_reference_without_a_letter_is_unverified(reference):
    with pytest.raises(Unverified, match="choice"):
        answers.choice("A", reference)


@pytest.mark.parametrize(
    ("text", "reference", "reward"),
    [
        ("42", "42", 1),
        ("The answer is 40", "42", 1),  # within 5 %
        ("The answer is 39.8", "42", 0),
        ("44.0", "42", 1),
        ("44.2", "42", 0),
        ("-42", "42", 0),
        ("−42", "-42", 1),
        ("0", "0", 1),
        ("0.001", "0", 0),
        ("1,234,567", "1234567", 1),
        ("12,34", "1234", 0),
        ("$1,234.50", "1234.5", 1),
        ("-$5", "-5", 1),
        ("€ 5", "5", 1),
        ("1e3", "1000", 1),
        (".5", "0.5", 1),
        ("5.", "5", 1),
        ("50%", "0.5", 1),
        ("50 %", "50", 1),
        ("0.5", "50%", 1),
        ("50", "50%", 1),
        (r"\boxed{50\%}", "51%", 1),
        ("0.5%", "50%", 0),
        ("5%", "0.5", 0),
        (r"\boxed{\text{Yes}}", "yes", 1),
        ("The answer is New  York.", "new york", 1),
        ("Answer: **Paris**", "Paris", 1),
        ("It is in Paris", "Paris", 0),
        ("12 13", "1213", 0),
        ("1 2", "1  2", 1),
        ("--5", "5", 0),
        ("5e", "5", 0),
        ("e5", "5", 0),
        ("", "5", 0),
        (".", ".", 0),
        ("inf", "5", 0),
        ("nan", "5", 0),
        ("1" * 400, "5", 0),
        ("1e999", "5", 0),
        ("\ud800", "5", 0),
        (r"\boxed{5", "5", 0),  # cut off
    ],
)
def test_numbers_by_relaxed_accuracy(text, reference, reward):
    assert answers.number(text, reference) == reward


def test_numbers_without_tolerance():
    assert answers.number("2010", "1990") == 1.0
    assert answers.number("2010", "1990", tolerance=0.0) == 0.0
    assert answers.number("1990.0", "1990", tolerance=0.0) == 1.0


@pytest.mark.parametrize(
    ("text", "reference", "likeness"),
    [
        ("The answer is Hello World.", "hello world", 1),
        ("hello word", "hello world", 10 / 11),
        ("hell", "hello wo", 0.5),
        ("hel", "hello wo", 0),
        ("abc", ["x", "abd", "abcd"], 3 / 4),
        ("abcd", "abc", 3 / 4),
        ("", "a", 0),
        ("a", [], 0),
    ],
)
def test_likeness_of_phrases(text, reference, likeness):
    assert answers.anls(text, reference) == pytest.approx(likeness)

"""The reasoning world: every answer and every line is worked out a second time here, by other means."""

import collections
import itertools
import re

import numpy as np
import pytest

from opd_jax.worlds import reasoning
from opd_jax.worlds.reasoning import FAMILIES, LEVELS, STYLES, Problem

CASES = list(itertools.product(FAMILIES, LEVELS))


@pytest.fixture(scope="module")
def problems():
    """25 train and 25 test problems of every family and level."""
    rng = np.random.default_rng(0)
    return [reasoning.draw(rng, *case, test) for case in CASES for test in (False, True) for _ in range(25)]


def of(problems, family):
    return [problem for problem in problems if problem.family == family]


def lines_of(problem, style):
    *lines, last = reasoning.solution(problem, style).split("\n")
    assert last == f"#### {problem.answer}"
    return lines


# ---- solutions, verified -----------------------------------------------------------------------------------------


def test_problems_by_hand():
    problem = reasoning.parse("compute: 7+2*8-12")
    assert problem == Problem("arithmetic", ("+", "*", "-"), ("7", "2", "8", "12"))
    assert reasoning.solution(problem, "steps") == "2*8=16\n7+16=23\n23-12=11\n#### 11"
    assert reasoning.solution(problem, "states") == "7+16-12\n23-12\n11\n#### 11"
    problem = reasoning.parse("sort, take 3, sum: [5284]")
    assert reasoning.solution(problem, "steps") == "sort: [2458]\ntake 3: [245]\nsum: 11\n#### 11"
    assert reasoning.solution(problem, "states") == "take 3, sum: [2458]\nsum: [245]\n11\n#### 11"
    problem = reasoning.parse("rotate 2, replace a by b: badge")
    assert reasoning.solution(problem, "steps") == "rotate 2: dgeba\nreplace a by b: dgebb\n#### dgebb"
    problem = reasoning.parse("falling: b<d, c<a, c>d")
    assert reasoning.solution(problem, "steps") == "b<d: bd\nc>d: bdc\nc<a: bdca\nfalling: acdb\n#### acdb"
    assert (
        reasoning.solution(problem, "states")
        == "falling: bd, c<a, c>d\nfalling: bdc, c<a\nfalling: bdca\nacdb\n#### acdb"
    )


def test_orders_of_work_differ():
    problem = reasoning.parse("compute: 9-4+2*3")
    assert lines_of(problem, "steps") == ["2*3=6", "9-4=5", "5+6=11"]
    assert lines_of(problem, "states") == ["5+2*3", "5+6", "11"]


def test_arithmetic_is_what_python_computes(problems):
    for problem in of(problems, "arithmetic"):
        expression = problem.prompt.removeprefix("compute: ").strip()
        assert str(eval(expression)) == problem.answer
        assert all(str(eval(line)) == problem.answer for line in lines_of(problem, "states"))
        left = collections.Counter(map(int, re.findall(r"\d+", expression)))
        for line in lines_of(problem, "steps"):
            operation, result = line.split("=")
            assert eval(operation) == int(result) and 0 <= int(result) <= 999
            left.subtract(map(int, re.findall(r"\d+", operation)))
            assert min(left.values()) >= 0  # works only with numbers that are there
            left[int(result)] += 1
        assert +left == {int(problem.answer): 1}


def interpret(operation, items):
    """The operations once more, on lists of numbers or letters."""
    word, *rest = operation.split()
    n = int(rest[0]) if rest and rest[0].isdigit() else None
    if word in ("sum", "max", "min", "length"):
        return {"sum": sum, "max": max, "min": min, "length": len}[word](items)
    if word == "count":
        return len([x for x in items if x == rest[0]])
    return {
        "sort": lambda: sorted(items),
        "reverse": lambda: list(reversed(items)),
        "evens": lambda: [x for x in items if not x % 2],
        "odds": lambda: [x for x in items if x % 2],
        "unique": lambda: [x for i, x in enumerate(items) if x not in items[:i]],
        "swap": lambda: [items[-1], *items[1:-1], items[0]],
        "take": lambda: [x for i, x in enumerate(items) if i < n],
        "drop": lambda: [x for i, x in enumerate(items) if i >= n],
        "rotate": lambda: list(np.roll(items, -n)),
        "replace": lambda: [rest[2] if x == rest[0] else x for x in items],
        "remove": lambda: [x for x in items if x != rest[0]],
    }[word]()


def show(value, family):
    if not isinstance(value, list):
        return str(value)
    return f"[{''.join(map(str, value))}]" if family == "lists" else "".join(value)


@pytest.mark.parametrize("family", ["lists", "strings"])
def test_programs_are_what_an_interpreter_gives(problems, family):
    seen = set()
    for problem in of(problems, family):
        program, _, data = problem.prompt.strip().partition(": ")
        program = program.split(", ")
        value = [int(x) for x in data.strip("[]")] if family == "lists" else list(data)
        for i, (operation, step, state) in enumerate(
            zip(program, lines_of(problem, "steps"), lines_of(problem, "states"), strict=True)
        ):
            value = interpret(operation, value)
            shown, rest = show(value, family), ", ".join(program[i + 1 :])
            assert step == f"{operation}: {shown}"
            assert state == (f"{rest}: {shown}" if rest else shown)
            seen.add(operation.split()[0])
        assert problem.answer == shown
    assert seen == set(reasoning.programs.MAPS[family] + reasoning.programs.FOLDS[family])


def holds(order, clue):
    a, way, b = clue
    return (order.index(a) < order.index(b)) == (way == "<")


def test_logic_has_one_order_and_finds_it(problems):
    for problem in of(problems, "logic"):
        query, clues = problem.prompt.strip().split(": ")
        clues = clues.split(", ")
        letters = sorted(set("".join(clues)) - set("<>"))
        orders = ["".join(order) for order in itertools.permutations(letters) if all(holds(order, c) for c in clues)]
        assert len(orders) == 1
        answer = {"first": orders[0][0], "last": orders[0][-1], "rising": orders[0], "falling": orders[0][::-1]}[query]
        assert problem.answer == answer
        *steps, end = lines_of(problem, "steps")
        assert end == f"{query}: {answer}"
        assert sorted(line.split(": ")[0] for line in steps) == sorted(clues)
        used = []
        for i, (step, state) in enumerate(zip(steps, lines_of(problem, "states")[:-1], strict=True)):
            clue, chain = step.split(": ")
            used.append(clue)
            assert len(chain) == i + 2 and chain in orders[0] and set(clue) - set("<>") <= set(chain)
            assert state == f"{query}: " + ", ".join([chain, *(c for c in clues if c not in used)])
        assert lines_of(problem, "states")[-1] == answer


# ---- splits, levels, parsing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "level"), CASES)
def test_draws_are_of_their_kind_and_the_splits_disjoint(problems, family, level):
    train, test = ({p for p in problems if (p.family, p.level, p.is_test) == (family, level, t)} for t in (False, True))
    assert len(train) > 15 and len(test) > 10
    assert not {p.prompt for p in train} & {p.prompt for p in test}


def test_about_one_problem_in_six_is_held_back_by_hash(problems):
    rng = np.random.default_rng(1)
    drawn = [Problem(f, *reasoning.TABLE[f].draw(rng, 4)) for f in FAMILIES for _ in range(1000)]
    assert abs(np.mean([p.is_test for p in drawn if not p.is_held_out]) - 1 / 6) < 0.03
    fixed = {"compute: 3+4": False, "compute: 4+7": False, "sort: [5284]": False}
    assert {prompt: reasoning.parse(prompt).is_test for prompt in fixed} == fixed  # for all time: results depend on it


def test_logic_asks_nothing_of_test_clues_in_training(problems):
    clues = [{p.data for p in of(problems, "logic") if p.is_test == t and not p.is_held_out} for t in (False, True)]
    assert not clues[0] & clues[1]


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        ("arithmetic", r"\*\d+\*"),
        ("lists", r"reverse, take"),
        ("strings", r"rotate \d, replace"),
        ("logic", r"^last: \w>"),
    ],
)
def test_one_combination_per_family_is_only_in_the_test_split(problems, family, pattern):
    found = [p for p in of(problems, family) if re.search(pattern, p.prompt)]
    assert found and all(p.is_held_out and p.is_test for p in found)
    assert found == [p for p in of(problems, family) if p.is_held_out]


def test_parse_and_prompt_are_inverse(problems):
    for problem in problems:
        assert reasoning.parse(problem.prompt) == problem
        assert problem.prompt.endswith("\n")
    assert reasoning.parse("  sort,  sum: [12]") == reasoning.parse("sort, sum: [12]\n")
    for family in FAMILIES:
        assert reasoning.parse(reasoning.TABLE[family].example).family == family


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("compute: 3-5", "3-5=-2 is outside"),
        ("compute: 99*99", "outside 0..999"),
        ("compute: 100+1", "from 1 to 99"),
        ("compute: 1+1+1+1+1+1+1", "one to 5"),
        ("compute: 07+1", "from 1 to 99"),
        ("srot: [5284]", "'srot' is no operation on lists; known are sort"),
        ("swap: [5284]", "no operation on lists"),
        ("sum, sort: [5284]", "after 'sum'"),
        ("evens, sort: [135]", "after 'evens'"),
        ("sort, sort: [135]", "twice in a row"),
        ("sort: [12345678]", "two to 7 digits"),
        ("sort: badger", "letters of abcdefgh"),
        ("reverse, sort, swap, sort, reverse, sort: abc", "at most 5"),
        ("first: a<a", "'a<a' is no clue"),
        ("first: a<b, c<d", "'c<d' does not continue 'ab'"),
        ("first: a<b, b<c, c<a", "contradict"),
        ("what is love", "Write for instance 'compute: 3"),
        ("", "Write for instance"),
    ],
)
def test_what_cannot_be_read_is_named(prompt, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        reasoning.parse(prompt)
    assert repr(prompt) in str(error.value) and "\n" not in str(error.value)


def test_draws_depend_on_the_seed_alone():
    def some(seed):
        rng = np.random.default_rng(seed)
        return [reasoning.draw(rng, *case) for case in CASES]

    assert some(3) == some(3) != some(4)


def test_wrong_calls_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="level 6"):
        reasoning.draw(rng, "logic", 6)
    with pytest.raises(ValueError, match="no style 'long'"):
        reasoning.solution(reasoning.parse("sort: [21]"), "long")


# ---- scoring ---------------------------------------------------------------------------------------------------------


def test_right_solutions_score_one_and_the_styles_differ(problems):
    for problem in problems:
        texts = [reasoning.solution(problem, style) for style in STYLES]
        assert texts[0] != texts[1]
        for style, text in zip(STYLES, texts):
            assert reasoning.correct(problem, text)
            assert reasoning.steps_correct(problem, text) == reasoning.steps_correct(problem, text, style) == 1.0
        assert reasoning.steps_correct(problem, texts[0], "states") < 1


@pytest.mark.parametrize("style", STYLES)
def test_corrupted_solutions_score_wrong(problems, style):
    rng = np.random.default_rng(2)
    for problem in problems:
        lines = reasoning.solution(problem, style).split("\n")
        i = int(rng.integers(len(lines)))
        at = int(rng.choice([m.start() for m in re.finditer(r"[0-9a-h]", lines[i]) if m.start() > lines[i].find(":")]))
        symbols = "0123456789" if lines[i][at].isdigit() else "abcdefgh"
        other = symbols[(symbols.index(lines[i][at]) + 1) % len(symbols)]
        bad = [*lines[:i], lines[i][:at] + other + lines[i][at + 1 :], *lines[i + 1 :]]
        assert reasoning.steps_correct(problem, "\n".join(bad), style) == pytest.approx(1 - 1 / len(lines))
        assert reasoning.correct(problem, "\n".join(bad)) == (i < len(lines) - 1)  # the final answer alone
        assert not reasoning.correct(problem, "\n".join(lines[:-1]))
        assert reasoning.steps_correct(problem, "\n".join(lines[:-1]), style) == pytest.approx(1 - 1 / len(lines))
        assert reasoning.steps_correct(problem, "\n".join([*lines, "1"]), style) < 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 12", "12"),
        ("1+1=2\n#### 2", "2"),
        ("#### 1\n#### 2", "2"),
        ("#### 1 2", None),
        ("####12", None),
        ("12", None),
        ("", None),
        ("#### ", None),
        ("x #### 3", None),
    ],
)
def test_answer_of(text, answer):
    assert reasoning.answer_of(text) == answer


def test_garbage_scores_zero():
    problem = reasoning.parse("compute: 3+4")
    for text in ("", "\n\n", "#### ", "#### 07", "#### 7 7", "3", "\ud800"):
        assert not reasoning.correct(problem, text)
        assert reasoning.steps_correct(problem, text) == 0


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(reasoning.save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_tokens_stay_within_bounds_and_grow_with_the_level(problems):
    sizes = collections.defaultdict(list)
    for problem in problems:
        assert len(reasoning.encode(problem.prompt)) <= reasoning.PROMPT_TOKENS
        for style in STYLES:
            tokens = len(reasoning.encode(reasoning.solution(problem, style))) + 1  # and <eos>
            assert tokens <= reasoning.SOLUTION_TOKENS
            sizes[problem.family, style, problem.level].append(tokens)
    for family, style in itertools.product(FAMILIES, STYLES):
        means = [np.mean(sizes[family, style, level]) for level in LEVELS]
        assert all(np.diff(means) > 0)


@pytest.mark.parametrize(
    "prompt",
    [
        "compute: 99+99+99+99+99+99",
        "compute: 99*9+99-99+99-98",
        "rotate 1, sort, rotate 1, sort, rotate 1: [9876543]",
        "replace a by b, rotate 1, replace b by c, rotate 1, replace c by d: abcdefg",
        "rotate 1, replace a by b, rotate 1, replace b by c, rotate 1: abcdefg",
        "falling: a>b, b>c, c>d, d>e, e>f",
    ],
)
def test_the_longest_that_can_be_written_stay_within_bounds(prompt):
    problem = reasoning.parse(prompt)
    assert len(reasoning.encode(problem.prompt)) <= reasoning.PROMPT_TOKENS
    assert all(len(reasoning.encode(reasoning.solution(problem, s))) < reasoning.SOLUTION_TOKENS for s in STYLES)


def test_the_tokenizer_loses_nothing_and_agrees_with_encode(problems, tokenizer):
    texts = [text for p in problems for text in (p.prompt, *(p.prompt + reasoning.solution(p, s) for s in STYLES))]
    encoded = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(encoded) == texts
    for text, tokens in zip(texts, encoded):
        ids = reasoning.encode(text)
        assert ids.dtype == np.int32 and ids.tolist() == tokens
        assert reasoning.UNK not in tokens
        assert reasoning.decode(ids) == text


def test_a_prompt_and_its_solution_are_encoded_apart_as_together(problems):
    for problem in problems[::5]:
        solution = reasoning.solution(problem)
        apart = [*reasoning.encode(problem.prompt), *reasoning.encode(solution)]
        assert reasoning.encode(problem.prompt + solution).tolist() == apart


def test_encode_agrees_on_any_text(tokenizer):
    rng = np.random.default_rng(5)
    pieces = [*reasoning.WORDS, "x", " ", "é", "\t", "####", "tak", "\U0001f600", "\r\n", "< eos>"]
    for _ in range(500):
        text = "".join(pieces[i] for i in rng.integers(len(pieces), size=rng.integers(12)))
        assert reasoning.encode(text).tolist() == tokenizer(text)["input_ids"]


def test_special_tokens(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == len(reasoning.WORDS) == len(set(reasoning.WORDS))
    ids = [*reasoning.encode("#### 7"), reasoning.EOS, reasoning.PAD]
    assert tokenizer.decode(ids, skip_special_tokens=True) == reasoning.decode(np.array(ids)) == "#### 7"

"""What every experiment on language models is built of: a model's functions, problems with answers, and scores."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from experiments import stages
from opd_jax import hosts, sharding
from opd_jax.config import ConfigError, fingerprint
from opd_jax.models import attention, remat
from opd_jax.models.decoder import Decoder
from opd_jax.models.hf import load_decoder, tokenizer_fingerprint
from opd_jax.rewards import maths, verify
from opd_jax.sampling import tokens as sampling
from opd_jax.sampling.tokens import SamplingParams
from opd_jax.types import PyTree, TokenRollout
from opd_jax.worlds import reasoning


class Language(NamedTuple):
    """What ids mean: a tokenizer as far as sampling and scoring need it."""

    fingerprint: str
    vocab_size: int  # ids from here on are padding of a checkpoint, and are never sampled
    stop_ids: tuple[int, ...]
    pad_id: int
    decode: Callable[[np.ndarray], str]
    correct: verify.Verifier  # (completion, answer) -> 1 or 0, or Unverified
    threads: int | None = 1  # that verify side by side; None: one for each processor


class Problems(NamedTuple):
    """Prompts as ids, and what is checked; a problem is known by its index."""

    ids: list[np.ndarray]
    answers: list  # what the verifier takes beside a completion; "" where there is none: the outcome is unknown
    tasks: list[int] | None = None  # which route to their teachers, where there are several


class LanguageModel(NamedTuple):
    """A decoder as the functions that samplers and losses take. Made once: jit knows a function by identity."""

    hidden: Partial  # (params, tokens, segment_ids) -> [B, S, D]
    head: Callable[[PyTree], jax.Array]  # params -> [D, vocab_size]
    decode: Partial  # (params, tokens, positions, cache) -> ([B, S, vocab_size], cache)
    init_cache: Callable
    whole_head: Callable[[PyTree], jax.Array]  # params -> [D, V], with the padding that a checkpoint has
    vocab_size: int
    sampling_copy: Callable[[PyTree], PyTree]  # of params, or what holds them: as a loop of `decode` reads them


def functions(module: Decoder, vocab_size: int, copy: bool = True) -> LanguageModel:
    """A model's functions.

    Args:
        copy: whether the sampler reads a copy of the parameters that is not split over `fsdp` (`sharding.gathered`).
    """
    return LanguageModel(
        Partial(functools.partial(_hidden, module)),
        functools.partial(_head, module, vocab_size),
        Partial(functools.partial(_decode, module, vocab_size)),
        module.init_cache,
        module.head,
        vocab_size,
        module.sampling_copy if copy else as_they_are,
    )


def as_they_are(params: PyTree) -> PyTree:
    """`LanguageModel.sampling_copy` of one that makes none."""
    return params


def _hidden(module, params, tokens, segment_ids):
    return module.apply({"params": params}, tokens, segment_ids, method="hidden")


def _head(module, vocab_size, params):
    return module.head(params)[:, :vocab_size]


def _decode(module, vocab_size, params, tokens, positions, cache):
    logits, cache = module.apply({"params": params}, tokens, positions, cache, method="decode")
    return logits[..., :vocab_size], cache


# ---- languages and problems ------------------------------------------------------------------------------------------


def reasoning_language() -> Language:
    """The embedded world's: an answer is right if it is the same text."""
    return Language(
        fingerprint=fingerprint(reasoning.WORDS),
        vocab_size=len(reasoning.WORDS),
        stop_ids=(reasoning.EOS,),
        pad_id=reasoning.PAD,
        decode=reasoning.decode,
        correct=lambda completion, answer: float(reasoning.answer_of(completion) == answer),
    )


def reasoning_problems(count: int, seed: int, levels: Sequence[int], test: bool = False) -> Problems:
    """`count` problems of one split, uniform over families and levels, fixed by the seed."""
    generator = np.random.default_rng(seed)
    pick = lambda options: options[generator.integers(len(options))]
    drawn = [reasoning.draw(generator, pick(reasoning.FAMILIES), pick(levels), test) for _ in range(count)]
    return Problems([reasoning.encode(problem.prompt) for problem in drawn], [problem.answer for problem in drawn])


def packed_row(generator: np.random.Generator, length: int, styles, levels) -> dict[str, np.ndarray]:
    """Training problems with their worked solutions, several in a row: tokens, response and segment_ids `[length]`."""
    row = {"tokens": np.zeros(length, np.int32), "response": np.zeros(length, bool)}
    row["segment_ids"] = np.zeros(length, np.int32)
    pick, used, segment = lambda options: options[generator.integers(len(options))], 0, 1
    while True:
        problem = reasoning.draw(generator, pick(reasoning.FAMILIES), pick(levels))
        prompt = reasoning.encode(problem.prompt)
        solution = np.append(reasoning.encode(reasoning.solution(problem, pick(styles))), reasoning.EOS)
        end = used + len(prompt) + len(solution)
        if end > length:
            return row
        row["tokens"][used:end] = np.concatenate([prompt, solution])
        row["response"][used + len(prompt) : end] = True
        row["segment_ids"][used:end] = segment
        used, segment = end, segment + 1


def load_tokenizer(directory: str):
    """A directory's tokenizer, through transformers, which is imported only here: it takes seconds."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(directory)


def directory_language(directory: str, tokenizer) -> Language:
    """That of a Hugging Face directory: answers are compared as mathematics."""
    config = json.loads((Path(directory) / "config.json").read_text())
    config |= config.get("text_config", {})  # of a vision-language model
    generation = Path(directory) / "generation_config.json"
    stops = json.loads(generation.read_text()).get("eos_token_id") if generation.exists() else None
    stops = stops if stops is not None else config.get("eos_token_id")
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    stops = sorted({*stops, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
    if not stops:
        raise ConfigError(f"{directory}: no eos_token_id in its configs or tokenizer, so no answer would end; add one")
    return Language(
        fingerprint=tokenizer_fingerprint(directory),
        vocab_size=min(len(tokenizer), config["vocab_size"]),
        stop_ids=tuple(stops),
        pad_id=stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        correct=maths.correct,
    )


def read_problems(path: str, tokenizer, template: str, chat: bool, room: int, limit: int | None = None) -> Problems:
    """A JSONL file, a line `{"prompt": ..., "answer": ...}` each, the answer optional.

    Args:
        template: what is asked, with `{prompt}` in it.
        chat: whether to lay it out as a user's turn in the tokenizer's chat template.
        room: most tokens of a prompt.
        limit: of problems; None for all.

    Raises:
        ConfigError: naming file and line.
    """
    problems = Problems([], [])
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the problems {path}: {error.strerror}; give a JSONL file") from error
    for number, line in enumerate(lines[:limit], 1):
        try:
            record = json.loads(line)
            text = template.replace("{prompt}", record["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'{path} line {number}: not a JSON object with "prompt" ({error}); mend it') from error
        if chat:
            turn = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = np.asarray(tokenizer(text, add_special_tokens=not chat)["input_ids"], np.int32)
        if not 1 <= len(ids) <= room:
            raise ConfigError(f"{path} line {number}: {len(ids)} tokens; give 1 to {room}, problems.prompt_tokens")
        problems.ids.append(ids)
        problems.answers.append(str(record.get("answer") or ""))
    if not problems.ids:
        raise ConfigError(f"{path}: holds no problems; give at least one line")
    return problems


def load_directory(directory: str, mesh, compute, trained: bool = False) -> tuple[Decoder, PyTree]:
    """A model of a Hugging Face directory, which computes as the config's `compute` says."""
    module, params = load_decoder(directory, mesh=mesh, dtype=kept_in(trained))
    return computing(module, compute, trained), params


def kept_in(trained: bool) -> Any:
    """The data type of parameters in memory: float32 of what is trained, for steps of a rate of 1e-6 would be lost in
    bfloat16's eight bits; None, as stored, of the rest, where the device multiplies that."""
    return jnp.float32 if trained or jax.default_backend() == "cpu" else None


def computing(module: Decoder, compute, trained: bool) -> Decoder:
    """The same with the config's `compute`: type of products, attention and, where it is trained, recomputed blocks."""
    kernel = attention.kernel(compute.attention, module.head_dim)
    return module.clone(dtype=jnp.dtype(compute.dtype), attention=kernel, remat=compute.remat if trained else "")


def check_compute(check, compute) -> None:
    known = ("float32", "bfloat16")
    check(compute.dtype in known, f"compute.dtype={compute.dtype!r}: choose {' or '.join(known)}")
    check(not (wrong := remat.mistake(compute.remat)), f"compute.{wrong}")
    if compute.dtype in known:
        check(not (wrong := attention.mistake(compute.attention, compute.dtype)), f"compute.{wrong}")


# ---- sampling and scoring --------------------------------------------------------------------------------------------


def answer_all(
    model: LanguageModel,
    params: PyTree,
    problems: Problems,
    room: int,
    how: SamplingParams,
    key,
    *,
    slots: int,
    mesh,
    samples: int = 1,
) -> TokenRollout:
    """`samples` answers to every problem, in their order, through slots that are filled again; numpy arrays."""
    prompts = sampling.as_prompts(problems.ids, room, key, problems.tasks, samples)
    devices = 1 if mesh is None else sharding.record_parts(mesh)
    admit = max(slots // 2 // devices, 1) * devices
    decode, params = stages.copied(model.sampling_copy, (model.decode, params))
    rollout = sampling.generate_in_slots(
        decode, model.init_cache, params, prompts, how, slots=slots, admit=admit, mesh=mesh
    )
    return hosts.fetch(rollout)


def completions(language: Language, rollout: TokenRollout) -> list[str]:
    """The text of every answer, without special tokens."""
    tokens, response = np.asarray(rollout.tokens), np.asarray(rollout.response)
    return [language.decode(row[counted]) for row, counted in zip(tokens, response)]


def verdicts(language: Language, problems: Problems, rollout: TokenRollout) -> verify.Verdicts:
    """Whether every final answer is right, and why some are unknown. `group` is a problem's index."""
    rollout = hosts.fetch(rollout)
    answers = [problems.answers[i] for i in np.asarray(rollout.group)]
    texts = completions(language, rollout)
    said = verify.verdicts(lambda _: language.correct, texts, answers, [""] * len(texts), threads=language.threads)
    return said._replace(outcome=hosts.agreed(said.outcome))  # time can run out in one process alone


def outcomes(language: Language, problems: Problems, rollout: TokenRollout) -> np.ndarray:
    """1 where the final answer is right, 0 where it is not, NaN where that is unknown."""
    return verdicts(language, problems, rollout).outcome


def summary(language: Language, problems: Problems, rollout: TokenRollout) -> dict[str, float]:
    """Share of right answers, mean length in tokens, and share of answers that were cut off."""
    return {
        "accuracy ↑": float(np.nanmean(outcomes(language, problems, rollout))),
        "tokens": float(rollout.response.sum(1).mean()),
        "truncated": float(rollout.truncated.mean()),
    }

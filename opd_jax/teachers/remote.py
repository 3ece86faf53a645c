# SPDX-License-Identifier: Apache-2.0
"""A teacher behind a server: log-probs of given token ids, from vLLM, SGLang or any OpenAI-compatible completions.

| `api` | request | ids echoed |
| --- | --- | --- |
| `vllm` | `/v1/completions`, `prompt_logprobs` | yes |
| `sglang` | `/generate`, `input_ids`, `return_logprob`, `logprob_start_len` 0 | yes |
| `openai` | `/v1/completions`, `echo`, `logprobs`, `max_tokens` 0 | no: only their number is checked |

Servers answer None for the first token, which nothing predicts, and then one log-prob per token. Ids go out and are
compared as they come back, text never; every request is at temperature 1, so that no server's rule about scaling
matters. Echoed ids do not prove that the server's tokenizer is the student's: known log-probs do (`self_test`).

No rollout is lost to a failing server. `score` raises for nothing that a server does: it hands back, beside what was
scored, which sequences were not and why. `label`, for the online loop, raises, but keeps the batch and its scores on
disk first and takes them up when the same batch comes again.
"""

import hashlib
import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from opd_jax import hosts
from opd_jax.config import ConfigError, write_atomic
from opd_jax.losses.lightning_opd import LightningLabels
from opd_jax.types import TokenRollout
from opd_jax.web import Failure, Retry, fetch, retried

Ids = Sequence[int] | np.ndarray
Entry = tuple[int | None, float | None]  # id as echoed, None where the API echoes none; log-prob, None for the first


class Scored(NamedTuple):
    """One entry per sequence, in order."""

    logp: list[np.ndarray | None]  # float32, as long as the sequence, in nats; [0] is 0; None where unscored
    failed: dict[int, str]  # why, of those that are None


class RemoteTeacher:
    """Scores token ids on a server, in batches, several at once, again where something goes wrong.

    Connection errors, time-outs, 408, 425, 429, 5xx and replies that do not fit the request are retried with
    exponential back-off and jitter (never sooner than the server's `Retry-After`); other 4xx are not. A batch that
    fails for good is halved, so that one bad sequence costs only itself. Once `max(3, concurrency)` requests have
    failed in a row, refusals aside, `score` takes the server for down and sends no more.

    Args:
        url: such as `http://host:8000`, with or without `/v1`.
        api: `vllm`, `sglang` or `openai`; see the module's table.
        model: name of the served model; not for SGLang.
        batch_size: sequences per request.
        concurrency: requests under way at once.
        timeout: seconds without a byte from the server.
        retry: of each request.
        api_key: sent as a bearer token, and never shown.

    Raises:
        ConfigError: an unknown api, or numbers that are not positive.
    """

    def __init__(
        self,
        url: str,
        *,
        api: str = "vllm",
        model: str = "",
        batch_size: int = 8,
        concurrency: int = 8,
        timeout: float = 300.0,
        retry: Retry = Retry(),  # noqa: B008  immutable
        api_key: str | None = None,
    ):
        if api not in _APIS:
            raise ConfigError(f"teacher.api={api}: choose {', '.join(_APIS)}")
        if min(batch_size, concurrency, timeout, retry.attempts) <= 0 or not url.startswith(("http://", "https://")):
            sizes = f"batch_size={batch_size}, concurrency={concurrency}, timeout={timeout}, attempts={retry.attempts}"
            raise ConfigError(f"teacher {url}: {sizes}; give positive numbers, and a url that begins with http")
        path, self._request, self._entries = _APIS[api]
        self.url = url.rstrip("/").removesuffix("/v1") + path
        self.model, self.batch_size, self.concurrency = model, batch_size, concurrency
        self.timeout, self.retry, self._api_key = timeout, retry, api_key

    def score(self, sequences: Sequence[Ids]) -> Scored:
        """Log-probs of every token of every sequence given those before it, in nats at temperature 1."""
        sequences = [[int(token) for token in ids] for ids in sequences]
        health, found = _Health(max(3, self.concurrency)), {}
        parts = [range(i, min(i + self.batch_size, len(sequences))) for i in range(0, len(sequences), self.batch_size)]
        with ThreadPoolExecutor(self.concurrency) as pool:
            for part in pool.map(lambda ids: self._part(ids, sequences, health), parts):
                found |= part
        failed = {i: value for i, value in found.items() if isinstance(value, str)}
        return Scored([None if i in failed else found[i] for i in range(len(sequences))], failed)

    def label(self, rollout: TokenRollout, keep: str | Path) -> LightningLabels:
        """Teacher log-probs of a sampled batch, 0 outside the response: the `label` of an online method.

        Args:
            keep: folder for a batch that the server left unscored, as `unscored-....npz`, named after its tokens. A
                run that resumes samples the same batch again and sends only what is missing; then the file is removed.

        Raises:
            ConfigError: naming the file, where sequences remain unscored.
        """
        rollout = hosts.fetch(rollout)
        logp = hosts.from_first(lambda: self._logp(rollout, keep), rollout.tokens.shape)
        return LightningLabels(jnp.where(jnp.asarray(rollout.response), jnp.asarray(logp), 0.0))

    def _logp(self, rollout: TokenRollout, keep: str | Path) -> Float[np.ndarray, "B S"]:
        tokens, length = np.asarray(rollout.tokens), np.asarray(rollout.length)
        path = Path(keep) / f"unscored-{hashlib.sha256(tokens.tobytes()).hexdigest()[:16]}.npz"
        logp = read_unscored(path)[1] if path.exists() else np.full(tokens.shape, np.nan, np.float32)
        missing = np.flatnonzero(np.isnan(logp[:, 0]))
        scored = self.score([tokens[i, : length[i]] for i in missing])
        for i, row in zip(missing, scored.logp):
            if row is not None:
                logp[i] = np.pad(row, (0, tokens.shape[1] - len(row)))
        if scored.failed:
            buffer = io.BytesIO()
            np.savez(buffer, teacher_logp=logp, **{name: np.asarray(a) for name, a in rollout._asdict().items()})
            write_atomic(path, buffer.getvalue())
            reason = next(iter(scored.failed.values()))
            raise ConfigError(f"{len(scored.failed)} sequences unscored ({reason}); kept in {path}: mend it and resume")
        path.unlink(missing_ok=True)
        return logp

    def self_test(self, tokens: Ids, expected: Float[np.ndarray, "S"] | None = None, tolerance: float = 0.02) -> float:
        """Scores one sequence twice, alone and in company, before any rollout depends on it.

        Args:
            tokens: a typical sequence of at least 3 ids.
            expected: its log-probs as another engine found them; [0] is not read. The only proof that weights,
                tokenizer and temperature are those meant: give it wherever the teacher can be run once by other means.
            tolerance: nats, at any token; to be far below the differences of student and teacher.

        Returns:
            The largest difference found, in nats.

        Raises:
            ConfigError: the server does not answer, echoes other ids, is not consistent with itself or with `expected`.
        """
        tokens = [int(token) for token in tokens]
        try:
            alone, together = self._retried([tokens])[0], self._retried([tokens, tokens[:-1]])[0]
        except Failure as failure:
            raise ConfigError(
                f"teacher {self.url}: self-test failed, {failure}; check url, api, model, limits"
            ) from failure
        others = [(together, "itself, scored again", "make the server deterministic, or raise the tolerance")]
        if expected is not None:
            others.append((np.asarray(expected), "the known log-probs", "check weights, tokenizer and temperature"))
        largest = 0.0
        for other, name, remedy in others:
            if other.shape != alone.shape:
                raise ConfigError(f"teacher {self.url}: {other.size} known log-probs for {alone.size} tokens; give all")
            difference = float(np.abs(alone - other)[1:].max())
            if not difference <= tolerance:
                where = 1 + int(np.abs(alone - other)[1:].argmax())
                raise ConfigError(
                    f"teacher {self.url}: differs from {name} by {difference:.4f} nats at token {where}, more than "
                    f"{tolerance}; {remedy}"
                )
            largest = max(largest, difference)
        return largest

    def _part(self, ids: range, sequences: list[list[int]], health: "_Health") -> dict[int, np.ndarray | str]:
        """Log-probs, or what went wrong, of some of the sequences."""
        if health.down:
            return dict.fromkeys(ids, f"not sent, {self.url} is down")
        try:
            rows = self._retried([sequences[i] for i in ids])
        except Failure as failure:
            if failure.again:
                health.failed()
            if len(ids) == 1 or health.down:
                return dict.fromkeys(ids, str(failure))
            half = len(ids) // 2
            return self._part(ids[:half], sequences, health) | self._part(ids[half:], sequences, health)
        health.worked()
        return dict(zip(ids, rows))

    def _retried(self, batch: list[list[int]]) -> list[np.ndarray]:
        return retried(lambda: [_checked(*pair) for pair in zip(self._ask(batch), batch, strict=True)], self.retry)

    def _ask(self, batch: list[list[int]]) -> list[list[Entry]]:
        """One request: what the server says of each sequence."""
        reply = fetch(self.url, self._request(self.model, batch), timeout=self.timeout, api_key=self._api_key)
        try:
            entries = self._entries(reply)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Failure(f"a reply without log-probs ({type(error).__name__}: {error})") from error
        if len(entries) != len(batch):
            raise Failure(f"{len(entries)} replies to {len(batch)} sequences")
        return entries


def read_unscored(path: str | Path) -> tuple[TokenRollout, np.ndarray]:
    """What `RemoteTeacher.label` kept: the batch, and teacher log-probs [B, S] whose unscored rows are NaN."""
    with np.load(path) as file:
        return TokenRollout(*(file[name] for name in TokenRollout._fields)), file["teacher_logp"]


class _Health:
    """Counts requests that failed for good since the last that worked."""

    def __init__(self, limit: int):
        self._limit, self._count, self._lock = limit, 0, threading.Lock()

    @property
    def down(self) -> bool:
        return self._count >= self._limit

    def failed(self) -> None:
        with self._lock:
            self._count += 1

    def worked(self) -> None:
        with self._lock:
            self._count = 0


def _checked(entries: list[Entry], ids: list[int]) -> Float[np.ndarray, "S"]:
    """The log-probs of a sequence, aligned: one per token, 0 for the first."""
    if len(entries) != len(ids):
        raise Failure(f"{len(entries)} log-probs for {len(ids)} tokens, is a token added or cut?")
    for place, ((echoed, _), sent) in enumerate(zip(entries, ids)):
        if echoed not in (None, sent):
            raise Failure(f"the server scored token {echoed} at {place} where {sent} was sent")
    logp = np.array([0.0, *(np.nan if logp is None else logp for _, logp in entries[1:])], np.float32)
    if not (np.isfinite(logp) & (logp < 1e-3)).all():
        raise Failure(f"a log-prob of {logp[~(logp < 1e-3) | ~np.isfinite(logp)][0]}")
    return logp


# ---- the three protocols ---------------------------------------------------------------------------------------------


def _vllm_request(model: str, batch: list[list[int]]) -> dict[str, Any]:
    return {"model": model, "prompt": batch, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}


def _vllm_entries(reply: Any) -> list[list[Entry]]:
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    return [[_vllm_entry(place) for place in choice["prompt_logprobs"]] for choice in choices]


def _vllm_entry(place: dict[str, Any] | None) -> Entry:
    """None for the first token, then `{"id": {"logprob": ...}}` of the one token that was sent."""
    if place is None:
        return None, None
    ((token, about),) = place.items()
    return int(token), about["logprob"]


def _openai_request(model: str, batch: list[list[int]]) -> dict[str, Any]:
    return {"model": model, "prompt": batch, "max_tokens": 0, "temperature": 1.0, "echo": True, "logprobs": 1}


def _openai_entries(reply: Any) -> list[list[Entry]]:
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    return [[(None, logp) for logp in choice["logprobs"]["token_logprobs"]] for choice in choices]


def _sglang_request(model: str, batch: list[list[int]]) -> dict[str, Any]:
    sampling = {"max_new_tokens": 0, "temperature": 1.0}
    return {"input_ids": batch, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}


def _sglang_entries(reply: Any) -> list[list[Entry]]:
    return [[(entry[1], entry[0]) for entry in one["meta_info"]["input_token_logprobs"]] for one in reply]


_APIS: dict[str, tuple[str, Callable, Callable]] = {
    "vllm": ("/v1/completions", _vllm_request, _vllm_entries),
    "openai": ("/v1/completions", _openai_request, _openai_entries),
    "sglang": ("/generate", _sglang_request, _sglang_entries),
}

# SPDX-License-Identifier: Apache-2.0
"""Rewards of pictures from a server: GenEval, PickScore, DeQA, an OCR engine, or any scorer behind a small protocol.

    GET /health   ->  {"name": "pickscore", "version": "1f0c..."}
    POST /score   {"images": [PNG in base64, ...], "prompts": ["a cat", ...], "metadata": [{...} or null, ...]}
                  ->  {"scores": [0.83, "why there is none", ...]}

A score is a finite number, or a string that says why this picture has none; one for each picture, in order. Name and
version may stand in the reply to `POST /score` too, and are then compared. `serve.py` is a server; docs/rewards.md has
the protocol in full.

No picture is lost to a failing server, and none is scored 0 for it. A request that fails is tried again; one that fails
for good is halved where the server still scores a known picture, so that a bad picture costs only itself, and is
*unknown*. Where the server does not even do that, the run waits for it, with the batch and its scores on disk.
"""

import base64
import collections
import functools
import hashlib
import io
import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from opd_jax.config import ConfigError, write_atomic
from opd_jax.web import Failure, Retry, fetch, retried

Metadata = Sequence[Mapping[str, Any] | None]
REFUSED = (400, 413, 422)  # statuses that are about the pictures sent, not about the server
FELLED = 2  # times that a picture, sent alone, may be followed by a server that is down, before it is left out


class Scores(NamedTuple):
    """What a reward says of a batch."""

    score: Float[np.ndarray, "B"]  # float32, NaN where unknown
    known: Bool[np.ndarray, "B"]  # True where there is a score
    failures: dict[str, int]  # why the others have none, and how often


class Known(NamedTuple):
    """A picture to try a scorer with: one that it can score."""

    image: UInt8[np.ndarray, "H W 3"]
    prompt: str
    metadata: Mapping[str, Any] | None = None
    score: float | None = None  # as known from elsewhere


def _square() -> UInt8[np.ndarray, "64 64 3"]:
    image = np.full((64, 64, 3), 230, np.uint8)
    image[16:48, 16:48] = 200, 30, 30
    return image


SQUARE = Known(_square(), 'a red square, with the word "square"')  # a prompt for OCR as well


class RemoteReward:
    """Scores pictures on a server, in batches, several at once, while the caller does something else.

    Connection errors, time-outs, 408, 425, 429, 5xx, and replies that do not fit the request (no JSON, another number
    of scores, a score of NaN) are retried with exponential back-off and jitter, never sooner than the server's
    `Retry-After`. Where that does not help:

    | case | what happens |
    | --- | --- |
    | 400, 422 | not retried; the batch is halved, a picture refused alone is unknown |
    | 413 | the same, and later batches are no larger than the halves |
    | the known picture is still scored | the batch is halved, a picture that fails alone is unknown |
    | it is not, or the answer is 429, or names another server or version | the server is down: `collect` waits |
    | a picture, sent alone, is followed twice by a server that is down | it is unknown |

    Args:
        url: such as `http://host:8000`.
        name, version: what the server must say that it is; "" takes what `self_test` finds.
        batch_size: pictures in a request at most.
        concurrency: requests under way at once.
        timeout: seconds without a byte from the server.
        retry: of each request, and how often a server that is down is tried.
        patience: seconds that `collect` waits for a server that is down; 0 raises at once.
        api_key: sent as a bearer token, and never shown.

    Raises:
        ConfigError: numbers that are not positive, or a url that is none.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "",
        version: str = "",
        batch_size: int = 16,
        concurrency: int = 4,
        timeout: float = 120.0,
        retry: Retry = Retry(),  # noqa: B008  immutable
        patience: float = 3600.0,
        api_key: str | None = None,
    ):
        if min(batch_size, concurrency, timeout, retry.attempts) <= 0 or not url.startswith(("http://", "https://")):
            sizes = f"batch_size={batch_size}, concurrency={concurrency}, timeout={timeout}, attempts={retry.attempts}"
            raise ConfigError(f"reward {url}: {sizes}; give positive numbers, and a url that begins with http")
        self.url, self.name, self.version = url.rstrip("/"), name, version
        self.batch_size, self.concurrency, self.timeout = batch_size, concurrency, timeout
        self.retry, self.patience, self._api_key = retry, patience, api_key
        self._slots, self._known = threading.Semaphore(concurrency), SQUARE

    def __str__(self) -> str:
        return f"reward {self.name} at {self.url}" if self.name else f"reward at {self.url}"

    def submit(
        self,
        images: UInt8[np.ndarray, "B H W 3"],
        prompts: Sequence[str],
        keep: str | Path,
        metadata: Metadata | None = None,
    ) -> "Pending":
        """Starts to score a batch and returns at once. The arrays are not to be changed before `collect` returns.

        Args:
            keep: folder for a batch that the server left unscored, as `unscored-....npz`, named after the batch and the
                server's name and version. Where the same batch is submitted again, the scores in the file are taken
                up and only the other pictures sent; `collect` removes it when all is done.
            metadata: for each picture what its scorer needs beside the prompt, in JSON's types.
        """
        return Pending(self, images, list(prompts), [None] * len(images) if metadata is None else list(metadata), keep)

    def label(
        self,
        images: UInt8[np.ndarray, "B H W 3"],
        prompts: Sequence[str],
        keep: str | Path,
        metadata: Metadata | None = None,
    ) -> Scores:
        """`submit(...).collect()`."""
        return self.submit(images, prompts, keep, metadata).collect()

    def self_test(self, known: Known = SQUARE, tolerance: float = 1e-3) -> float:
        """Asks the server who it is and has it score a known picture twice, before any step depends on it.

        The name and version found are those that every later reply must have, and the picture is the one that tells
        later whether the server is alive.

        Args:
            known: with its score where that is known: the only proof that weights and preprocessing are those meant.
            tolerance: of its score, and between the two; raise it for a scorer that is not deterministic.

        Returns:
            The score found.

        Raises:
            ConfigError: in one line: no answer, another name or version, no score, or another one than expected.
        """
        try:
            said = retried(self._health, self.retry)
            self.name, self.version = (said.get(key, "") for key in ("name", "version"))
            twice = [known.image] * 2, [known.prompt] * 2, [known.metadata] * 2
            first, second = retried(lambda: self._ask(*twice), self.retry)
        except Failure as failure:
            raise ConfigError(f"{self}: self-test failed, {failure}; check url, server and its log") from failure
        if isinstance(first, str) or isinstance(second, str) or not math.isfinite(first):
            raise ConfigError(f"{self}: no score for the known picture ({first}); give one that it can score")
        for other, what in ((second, "scored again in the same request"), (known.score, "as the config states it")):
            if other is not None and not abs(first - other) <= tolerance:
                raise ConfigError(
                    f"{self}: the known picture scores {first:.6g}, {what} {other:.6g}; "
                    f"check weights and preprocessing, or raise the tolerance of {tolerance:g}"
                )
        self._known = known
        return float(first)

    def wrong(self) -> str | None:
        """Why the server does not score its known picture now, or None where it does."""
        try:
            self._health()
            (score,) = self._ask([self._known.image], [self._known.prompt], [self._known.metadata])
        except Failure as failure:
            return str(failure)
        return None if isinstance(score, str) or math.isfinite(score) else "no score for the known picture"

    def _health(self) -> dict[str, Any]:
        said = fetch(f"{self.url}/health", timeout=self.timeout, api_key=self._api_key)
        if not isinstance(said, dict) or not all(isinstance(said.get(key, ""), str) for key in ("name", "version")):
            raise Failure(f"/health answers {str(said)[:100]}, no name and version")
        self._same({"name": "", "version": ""} | said)
        return said

    def _same(self, reply: dict[str, Any]) -> None:
        """Fails where a reply has another name or version than this reward."""
        for key, stated in (("name", self.name), ("version", self.version)):
            if stated and reply.get(key, stated) != stated:
                raise Failure(f"its {key} is {reply[key]!r}, where {stated!r} is expected", again=False)

    def _ask(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Metadata) -> list[float | str]:
        """One request: for each picture its score, which may be NaN, or why it has none."""
        body = {"images": [_encoded(image) for image in images], "prompts": prompts, "metadata": metadata}
        with self._slots:
            reply = fetch(f"{self.url}/score", body, timeout=self.timeout, api_key=self._api_key)
        scores = reply.get("scores") if isinstance(reply, dict) else None
        if not isinstance(scores, list):
            raise Failure("a reply without scores")
        if len(scores) != len(images):
            raise Failure(f"{len(scores)} scores for {len(images)} pictures")
        self._same(reply)
        number = lambda score: float(score) if isinstance(score, int | float) else math.nan
        return [score if isinstance(score, str) else number(score) for score in scores]


class Pending:
    """A batch that is being scored: `collect` waits for it.

    Daemon threads send the requests and give up on a server that is down; only `collect`, in the caller's thread,
    waits for it.
    """

    def __init__(self, reward: RemoteReward, images: np.ndarray, prompts: list, metadata: list, keep: str | Path):
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"{len(images)} pictures, {len(prompts)} prompts, {len(metadata)} metadata; give one for each"
            )
        self._reward, self._images, self._prompts, self._metadata = reward, images, prompts, metadata
        self._folder, self._values = Path(keep), np.full(len(images), np.nan)
        self._kept = any(self._folder.glob("unscored-*.npz")) and self.path.exists()
        if self._kept:
            self._values = read_unscored(self.path).score
        self._unknown, self._refused = {}, 0  # why, of pictures without score; how many not by the scorer's own words
        self._pauses, self._felled, self._stopped = 0, collections.Counter(), threading.Event()
        self._start()

    @functools.cached_property
    def path(self) -> Path:
        """The file that `keep` writes."""
        reward = self._reward
        texts = [reward.name, reward.version, self._images.shape, self._prompts, self._metadata]
        digest = hashlib.sha256(json.dumps(texts).encode())
        digest.update(np.ascontiguousarray(self._images))
        return self._folder / f"unscored-{digest.hexdigest()[:16]}.npz"

    def collect(self) -> Scores:
        """Every score of the batch; waits for the server where it is down, and says so in one line.

        Raises:
            ConfigError: the server was down for longer than `patience`, or refused every picture; the message names the
                file with the batch and the scores so far, as any other end of the wait leaves it (Ctrl-C, say).
        """
        try:
            while True:
                for thread in self._threads:
                    thread.join()
                if self._error:
                    raise self._error
                if not self._missing():
                    break
                self._pause()
                self._start()
            if self._refused and self._refused == len(self._values):
                reason = next(iter(self._unknown.values()))
                raise ConfigError(
                    f"{self._reward}: none of {len(self._values)} pictures has a score ({reason}); "
                    f"kept in {self.keep()}: mend it and resume"
                )
        except BaseException:
            self.keep()
            raise
        if self._kept:
            self.path.unlink(missing_ok=True)
        failures = dict(collections.Counter(self._unknown.values()))
        return Scores(self._values.astype(np.float32), ~np.isnan(self._values), failures)

    def keep(self) -> Path:
        """Stops what is under way and writes the batch with the scores so far; `submit` takes them up."""
        self._parts.clear()
        self._stopped.set()
        buffer = io.BytesIO()
        texts = np.asarray(json.dumps([self._prompts, self._metadata]))
        np.savez(buffer, images=self._images, texts=texts, score=self._values)
        self._kept = True
        return write_atomic(self.path, buffer.getvalue())

    def _missing(self) -> list[int]:
        return [i for i in range(len(self._values)) if self._lacks(i)]

    def _lacks(self, i: int) -> bool:
        return math.isnan(self._values[i]) and i not in self._unknown

    def _start(self) -> None:
        """Sends what is missing. After a second pause in smaller and smaller requests, one at a time: a picture that
        ends the server is then found, and costs only itself."""
        missing, size, count = self._missing(), self._reward.batch_size, self._reward.concurrency
        if self._pauses > 1:
            size, count = max(1, size >> (self._pauses - 1)), 1
        self._parts = collections.deque(missing[i : i + size] for i in range(0, len(missing), size))
        self._down, self._error = None, None
        self._stopped.clear()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(count, len(self._parts)))]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        try:
            while self._down is None:
                try:
                    part = self._parts.popleft()
                except IndexError:
                    return
                self._score(part)
        except Exception as error:  # ours; `collect` raises it
            self._error = error

    def _score(self, part: list[int]) -> None:
        try:
            retried(lambda: self._ask(part), self._reward.retry, self._stopped.wait)
            return
        except Failure as failure:
            status, reason = failure.status, str(failure)
        part = [i for i in part if self._lacks(i)]
        if status == 429:  # says nothing of the pictures
            self._down = reason
            return
        if status not in REFUSED and (wrong := self._reward.wrong()):
            alone = len(part) == 1 and self._pauses > 1
            self._felled.update(part if alone else ())
            self._down = wrong
            if not alone or self._felled[part[0]] < FELLED:
                return
            reason = f"the server went down whenever it was to score it ({reason})"
        if len(part) == 1:
            self._unknown[part[0]] = reason
            self._refused += 1
            return
        if status == 413:
            self._reward.batch_size = min(self._reward.batch_size, len(part) // 2)
        for half in (part[: len(part) // 2], part[len(part) // 2 :]):
            if self._down is None:
                self._score(half)

    def _ask(self, part: list[int]) -> None:
        """Sends those of a part that still lack a score, and notes what is said of each."""
        part = [i for i in part if self._lacks(i)]
        columns = ([column[i] for i in part] for column in (self._images, self._prompts, self._metadata))
        said = self._reward._ask(*columns)
        for i, score in zip(part, said):
            if isinstance(score, str):
                self._unknown[i] = score or "no reason given"
            elif math.isfinite(score):
                self._values[i] = score
        if any(map(self._lacks, part)):
            raise Failure("a score that is no finite number")

    def _pause(self) -> None:
        """Waits until the server scores its known picture, or raises."""
        reward, began, clock = self._reward, time.monotonic(), time.strftime("%H:%M:%S")
        path, known, self._pauses = self.keep(), int((~np.isnan(self._values)).sum()), self._pauses + 1
        about = f"{reward}: down since {clock} ({self._down}); {known} of {len(self._values)} scores, and the pictures"
        if reward.patience > 0:
            print(f"{about}, are kept in {path}; waiting up to {reward.patience:g} seconds", flush=True)
        attempt = 0
        while (left := began + reward.patience - time.monotonic()) > 0:
            time.sleep(min(reward.retry.wait(attempt), left))
            attempt += 1
            if reward.wrong() is None:
                print(f"{reward}: up again after {time.monotonic() - began:.0f} seconds", flush=True)
                return
        raise ConfigError(f"{about}, are kept in {path}: mend it and resume")


class Unscored(NamedTuple):
    """What `Pending.keep` wrote."""

    images: UInt8[np.ndarray, "B H W 3"]
    prompts: list[str]
    metadata: list[Mapping[str, Any] | None]
    score: Float[np.ndarray, "B"]  # float64, NaN where there is none yet


def read_unscored(path: str | Path) -> Unscored:
    """A batch that was kept, with the scores it had."""
    with np.load(path) as file:
        return Unscored(file["images"], *json.loads(str(file["texts"])), file["score"])


def _encoded(image: np.ndarray) -> str:
    """A PNG in base64: lossless, where JPEG would change what is judged. Pillow's fastest level, a tenth larger."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()

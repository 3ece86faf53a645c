# SPDX-License-Identifier: Apache-2.0
"""Several rewards of pictures and their weighted sum, from dictionaries as they stand in a config.

    weights = {"ocr": 1.0, "pickscore": 0.5}
    rewards = {"ocr": {"kind": "ocr"}, "pickscore": {"kind": "http", "url": "http://host:8001", "version": "1f0c..."}}

| kind | keys | what it is |
| --- | --- | --- |
| `http` | `url`, and any of `name`, `version`, `batch_size`, `concurrency`, `timeout`, `attempts`, `patience`, `api_key_env`, `known` | `remote.RemoteReward` |
| `clip`, `pickscore` | `path`, and any of `processor`, `device`, `batch_size` | `clip.clip_score`, `clip.pick_score` |
| `ocr` | | `ocr.Ocr` |
"""  # noqa: E501

import collections
import concurrent.futures
import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from opd_jax.config import ConfigError, checks
from opd_jax.rewards.remote import SQUARE, Known, Metadata, RemoteReward, Scores
from opd_jax.web import Retry

_POSITIVE = {"batch_size": int, "concurrency": int, "attempts": int, "timeout": float}
_KEYS = {  # by kind; the first is needed
    "http": ("url", "name", "version", *_POSITIVE, "patience", "api_key_env", "known"),
    "clip": ("path", "processor", "device", "batch_size"),
    "pickscore": ("path", "processor", "device", "batch_size"),
    "ocr": (),
}


class Combined(NamedTuple):
    """The weighted sum of several rewards, and each of them."""

    score: Float[np.ndarray, "B"]  # float32, NaN where a reward of weight other than 0 is unknown
    known: Bool[np.ndarray, "B"]  # True where there is a score
    parts: dict[str, Scores]

    def metrics(self) -> dict[str, float]:
        """Of each reward the mean over the pictures it is known of, and the share it is unknown of."""
        found = {}
        for name, part in self.parts.items():
            found[f"reward/{name}"] = float(part.score[part.known].mean()) if part.known.any() else math.nan
            found[f"unknown/{name}"] = float(1 - part.known.mean())
        return found


class Rewards:
    """Named rewards with weights; `submit` starts all of them, and what it returns collects the sum.

    Args:
        weights: by name; a reward of weight 0 is reported only.
        rewards: by name, a config as in the module's table. Scorers in this process each have a thread.

    Raises:
        ConfigError: every mistake, one line each; before any model is loaded.
    """

    def __init__(self, weights: Mapping[str, Any], rewards: Mapping[str, Any]):
        with checks() as check:
            for line in mistakes(weights, rewards):
                check(False, line)
        self._weights, self._parts = dict(weights), {}
        for name in weights:
            part = rewards[name]
            self._parts[name] = _remote(part) if part["kind"] == "http" else _Local(make_scorer(part))
        self._known = {name: _known(rewards[name].get("known")) for name in weights}

    def self_test(self) -> dict[str, float]:
        """The score of a known picture by each reward, before any step depends on them.

        Raises:
            ConfigError: one line for each that does not answer, is not what the config states, or has no score.
        """
        found = {}
        with checks() as check:
            for name, part in self._parts.items():
                try:
                    found[name] = part.self_test(self._known[name])
                except ConfigError as error:
                    check(False, f"{name}: {error}")
        return found

    def submit(
        self,
        images: UInt8[np.ndarray, "B H W 3"] | Float[np.ndarray, "B H W 3"],
        prompts: Sequence[str],
        keep: str | Path,
        metadata: Metadata | None = None,
    ) -> "PendingSum":
        """Starts to score a batch and returns at once.

        Args:
            images: uint8, or floats in [-1, 1], cut there.
            keep: folder for what a server leaves unscored, in a folder for each reward; see `RemoteReward.submit`.
            metadata: for each picture what its scorer needs beside the prompt.

        Raises:
            ValueError: a picture with NaN.
        """
        if images.dtype != np.uint8:
            images = to_uint8(images)
        started = {
            name: part.submit(images, prompts, Path(keep) / name, metadata) for name, part in self._parts.items()
        }
        return PendingSum(self._weights, started)

    def label(
        self,
        images: UInt8[np.ndarray, "B H W 3"] | Float[np.ndarray, "B H W 3"],
        prompts: Sequence[str],
        keep: str | Path,
        metadata: Metadata | None = None,
    ) -> Combined:
        """`submit(...).collect()`."""
        return self.submit(images, prompts, keep, metadata).collect()


class PendingSum:
    """A batch that several rewards are scoring."""

    def __init__(self, weights: Mapping[str, Any], pending: Mapping[str, Any]):
        self._weights, self._pending = weights, pending

    def collect(self) -> Combined:
        """Waits for all. Where one raises, the scores of all servers are on disk, and taken up when the run resumes."""
        try:
            parts = {name: pending.collect() for name, pending in self._pending.items()}
        except BaseException:
            self.keep()
            raise
        weighted = [np.float64(weight) * parts[name].score for name, weight in self._weights.items() if weight]
        score = np.sum(weighted, axis=0).astype(np.float32)
        return Combined(score, ~np.isnan(score), parts)

    def keep(self) -> None:
        """Stops what is under way and writes the scores so far, where they come from a server."""
        for pending in self._pending.values():
            pending.keep()


class _Local:
    """A scorer in this process with the interface of `RemoteReward`.

    Where it raises it is asked for each picture alone; those at which it raises again are unknown, unless they are all.
    """

    def __init__(self, scorer: Callable):
        self._scorer, self._pool = scorer, concurrent.futures.ThreadPoolExecutor(1)

    def submit(self, images: np.ndarray, prompts: Sequence[str], _: Path, metadata: Metadata | None) -> "_LocalPending":
        metadata = [None] * len(images) if metadata is None else metadata
        return _LocalPending(self._pool.submit(self._scores, list(images), list(prompts), list(metadata)))

    def _scores(self, images: list, prompts: list, metadata: list) -> list:
        try:
            said = list(self._scorer(images, prompts, metadata))
        except ConfigError:
            raise
        except Exception:
            said = [self._attempt(*row) for row in zip(images, prompts, metadata)]
            if all(isinstance(one, Exception) for one in said):
                raise
            said = [f"{type(one).__name__}: {one}" if isinstance(one, Exception) else one for one in said]
        if len(said) != len(images):
            raise ValueError(f"a scorer gave {len(said)} scores for {len(images)} pictures")
        return said

    def _attempt(self, image: np.ndarray, prompt: str, metadata: Any) -> Any:
        try:
            (said,) = self._scorer([image], [prompt], [metadata])
        except Exception as error:
            return error
        return said

    def self_test(self, known: Known) -> float:
        (score,) = self._scorer([known.image], [known.prompt], [known.metadata])
        if isinstance(score, str) or not math.isfinite(score):
            raise ConfigError(f"no score for the known picture ({score})")
        return float(score)


class _LocalPending(NamedTuple):
    future: concurrent.futures.Future

    def collect(self) -> Scores:
        said = self.future.result()
        score = np.array([np.nan if isinstance(one, str) else one for one in said], np.float32)
        known = np.isfinite(score)
        reasons = (one if isinstance(one, str) else f"a score of {one}" for one, fine in zip(said, known) if not fine)
        return Scores(np.where(known, score, np.float32(np.nan)), known, dict(collections.Counter(reasons)))

    def keep(self) -> None:
        """Nothing: it is computed again."""


def to_uint8(images: Float[np.ndarray, "B H W 3"]) -> UInt8[np.ndarray, "B H W 3"]:
    """Pictures in [-1, 1] as bytes, to the nearest. Raises: ValueError, a picture with NaN."""
    broken = np.flatnonzero(np.isnan(images).any((1, 2, 3)))
    if broken.size:
        raise ValueError(f"picture {broken[0]} of {len(images)} has NaN in it")
    return np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


# ---- from a config ---------------------------------------------------------------------------------------------------


def mistakes(weights: Mapping[str, Any], rewards: Mapping[str, Any]) -> list[str]:
    """What is wrong with them, one line each; nothing is loaded and no server asked."""
    lines = [] if any(weights.values()) else [f"weights={dict(weights)}: give a reward a weight other than 0"]
    for name in sorted({*weights, *rewards}):
        if name not in rewards:
            lines.append(f"weights.{name}: there is no such reward; there are {', '.join(sorted(rewards)) or 'none'}")
        elif name not in weights:
            lines.append(f"rewards.{name}: has no weight; give one, 0 to report it only")
        elif not isinstance(weights[name], int | float) or not math.isfinite(weights[name]):
            lines.append(f"weights.{name}={weights[name]!r}: give a finite number")
    for name, part in rewards.items():
        lines += [f"rewards.{name}{line}" for line in _mistakes_of(part)]
    return lines


def make_scorer(part: Mapping[str, Any]) -> Callable:
    """The scorer `score(images, prompts, metadata)` of a config whose kind is not `http`.

    Raises:
        ConfigError: a mistake in it; what it needs is not installed.
    """
    with checks() as check:
        for line in _mistakes_of(part):
            check(False, f"reward{line}")
        check(part["kind"] != "http", "reward.kind='http': is a server already")
    options = {key: value for key, value in part.items() if key not in ("kind", "path")}
    if part["kind"] == "ocr":
        from opd_jax.rewards.ocr import Ocr

        return Ocr()
    from opd_jax.rewards import clip

    return {"clip": clip.clip_score, "pickscore": clip.pick_score}[part["kind"]](part["path"], **options)


def _mistakes_of(part: Any) -> list[str]:
    if not isinstance(part, Mapping):
        return [f"={part!r}: give a dictionary with a kind, one of {', '.join(_KEYS)}"]
    kind = part.get("kind")
    if kind not in _KEYS:
        return [f".kind={kind!r}: choose one of {', '.join(_KEYS)}"]
    keys, lines = _KEYS[kind], []
    for key, value in part.items():
        if key not in ("kind", *keys):
            near = difflib.get_close_matches(key, keys, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"{kind} has {', '.join(keys) or 'none'}"
            lines.append(f".{key}: no such key; {remedy}")
        elif key in _POSITIVE and not (isinstance(value, _POSITIVE[key] | int) and value > 0):
            lines.append(f".{key}={value!r}: give a positive number{'' if key == 'timeout' else ', a whole one'}")
    if kind == "http":
        url, patience = str(part.get("url", "")), part.get("patience", 0)
        if not url.startswith(("http://", "https://")):
            lines.append(f".url={url!r}: give one that begins with http, such as http://host:8000")
        if not isinstance(patience, int | float) or not patience >= 0:
            lines.append(f".patience={patience!r}: give seconds, 0 to stop at once")
        if (variable := part.get("api_key_env")) and variable not in os.environ:
            lines.append(f".api_key_env={variable!r}: no such environment variable")
        lines += [f".known{line}" for line in _mistakes_of_known(part.get("known"))]
    elif kind != "ocr":
        for key in ("path", "processor"):
            if (key in part or key == "path") and not Path(part.get(key) or "/nowhere").is_dir():
                lines.append(f".{key}={part.get(key)!r}: no such directory")
    return lines


def _mistakes_of_known(known: Mapping[str, Any] | None) -> list[str]:
    if known is None:
        return []
    keys = ("image", "prompt", "metadata", "score")
    lines = [f".{key}: no such key; there are {', '.join(keys)}" for key in known if key not in keys]
    if "prompt" not in known:
        lines.append(".prompt: give the text that belongs to the picture")
    if not Path(known.get("image") or "/nowhere").is_file():
        lines.append(f".image={known.get('image')!r}: no such file")
    return lines


def _known(part: Mapping[str, Any] | None) -> Known:
    if part is None:
        return SQUARE
    metadata = part.get("metadata")
    with Image.open(part["image"]) as image:
        return Known(np.asarray(image.convert("RGB")), part["prompt"], metadata and dict(metadata), part.get("score"))


def _remote(part: Mapping[str, Any]) -> RemoteReward:
    options = {
        key: value for key, value in part.items() if key not in ("kind", "url", "attempts", "api_key_env", "known")
    }
    if "attempts" in part:
        options["retry"] = Retry(part["attempts"])
    if "timeout" in part:
        options["timeout"] = float(part["timeout"])
    if "patience" in part:
        options["patience"] = float(part["patience"])
    if variable := part.get("api_key_env"):
        options["api_key"] = os.environ[variable]
    return RemoteReward(part["url"], **options)

"""A Stable Diffusion 3 or 3.5 directory of the user's as a world: latents flow, prompts and rewards are the user's."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from experiments import flow_methods, latents_inputs, stages
from opd_jax import data, hosts, rng, sharding
from opd_jax.checkpoint import params_sha256
from opd_jax.config import ConfigError, fingerprint
from opd_jax.models import attention
from opd_jax.models.autoencoder import Autoencoder, latents_to_images
from opd_jax.models.hf import load_autoencoder, load_mmdit, text_embeddings
from opd_jax.models.mmdit import MMDiT
from opd_jax.rewards.combination import to_uint8
from opd_jax.sampling import flow


class Prompt(NamedTuple):
    """A condition: what the text encoders made of a prompt, and which one it is."""

    index: Int[Array, "B"]
    context: Float[Array, "B L E"]
    pooled: Float[Array, "B P"]


def encoded(prompt: Prompt) -> tuple:
    return prompt.context, prompt.pooled


class Pipeline:
    """A diffusers directory as `flow_methods.World`; `config.pipeline` has its settings.

    The transformer computes in `pipeline.dtype`, with adapters beside its weights as they are stored; the autoencoder
    in float32.

    Raises:
        ConfigError: what `mistakes` would have found; the text embeddings cannot be written.
    """

    own_rewards, splits, shown = (), ("Held-out",), 4

    def __init__(self, config, workdir: Path, mesh, about: dict):
        part, path = config.pipeline, Path(config.pipeline.path).expanduser()
        self.mesh, self.pictures_at_once = mesh, part.pictures * sharding.record_parts(mesh)
        self._prompts = latents_inputs.read_prompts(config)
        self._row = {text: row for row, text in enumerate(self._prompts.texts)}
        self._judged_on = latents_inputs.judged_on(config)
        self._stored = _embeddings(part, path, self._prompts.texts)
        self._autoencoder, decoding = load_autoencoder(path / "vae")
        model, params = load_mmdit(path / "transformer", mesh)
        self.model, self.shape = computing(model, part), shape_of(model, self._autoencoder, part)
        sha = params_sha256(params)
        self.identity = self._identity(part, sha, params_sha256(decoding))
        null = Prompt(jnp.full(1, -1, jnp.int32), *self._stored.null)
        self._decoding, null = sharding.replicate((decoding, null), mesh)
        self.base = stages.Made(params, stages.recipe_of({"given": sha}), sha, 0, 0)
        self.velocity, self.routed = velocities(self.model, config, params, null)
        self.example = next(iter(self.held_out(1, 0).values()), [""])[0]
        pairs = "; ".join(f"{name} of {', '.join(tasks)}" for name, tasks in self._judged_on.items())
        self.note = f"Rewards are means over the test prompts of their tasks: {pairs}; average is of them."

    def _identity(self, part, *hashes: str) -> str:
        about, texts = self._stored.about, self._prompts.texts
        trained_on = {task: [texts[row] for row in rows["train"]] for task, rows in self._prompts.rows.items()}
        settings = {key: part[key] for key in ("guidance", "dtype", "resolution", "max_sequence_length")}
        encoders = [about.encoders, about.settings.dtype, about.settings.compute_dtype, about.settings.negative_prompt]
        return fingerprint({"settings": settings, "weights": hashes, "encoders": encoders, "prompts": trained_on})

    @staticmethod
    def tasks(config) -> tuple[str, ...]:
        return tuple(config.pipeline.prompts)

    @staticmethod
    def mistakes(config) -> list[str]:
        return latents_inputs.mistakes(config)

    def condition(self, rows) -> Prompt:
        """Of these prompts, as numpy arrays."""
        return Prompt(np.asarray(rows, np.int32), *self._stored.rows(rows))

    def prompts(self, tasks, batch_size: int, seed: int):
        rows = [self._prompts.rows[task]["train"] for task in tasks]

        def draw(generator):
            task = int(generator.integers(len(rows)))
            row = int(generator.choice(rows[task]))
            return {"condition": Prompt(np.int32(row), *self._stored[row]), "task": np.int32(task)}

        return data.batches(draw, batch_size, seed, lambda batch: sharding.shard_batch(batch, self.mesh))

    def pairs(self, tasks, batch_size: int, seed: int):
        raise ConfigError("warm_start.steps: a pipeline's prompts have no clean pictures; set 0")

    def held_out(self, count: int, seed: int, test: bool = True) -> dict[str, list[str]]:
        """`count` prompts of each task that is judged, the same for one seed; 0: all."""
        chosen, tasks = {}, dict.fromkeys(task for tasks in self._judged_on.values() for task in tasks)
        for task in tasks:
            rows = self._prompts.rows[task]["test" if test else "train"]
            if 0 < count < len(rows):
                rows = np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))
            chosen[task] = [self._prompts.texts[row] for row in rows]
        return chosen

    def texts(self, condition: Prompt) -> list[str]:
        return [self._prompts.texts[row] for row in hosts.fetch(condition.index)]

    def metadata(self, texts) -> list[dict | None]:
        return [self._prompts.metadata[self._row[text]] for text in texts]

    def decode(self, x):
        """Pictures of latents, `pipeline.pictures` of each device at once, or as many fewer as divide the batch."""
        return decoded(self._autoencoder, parts_of(len(x), self.pictures_at_once), self._decoding, x)

    def pictures(self, adapter, texts, *, steps: int, shift: float, double_shift: bool, seed: int) -> np.ndarray:
        """One for each prompt by the ODE, uint8 `[N, H, W, 3]`; its noise is of `seed` and its place among them.

        Raises:
            ConfigError: a prompt that is in none of the run's files.
        """
        if unknown := [text for text in texts if text not in self._row]:
            raise ConfigError(f"prompt {unknown[0]!r}: its embedding is not stored; give one of the run's prompt files")
        devices = sharding.record_parts(self.mesh)
        size = min(self.pictures_at_once, -(-len(texts) // devices) * devices)
        rows = np.array([self._row[text] for text in texts])
        rows, images = np.pad(rows, (0, -len(rows) % size), mode="edge"), []
        keys = rng.per_record(rng.stream(seed, "pictures"), len(rows))
        sampling = self.shape, steps, shift, double_shift
        for start in range(0, len(rows), size):
            own = slice(start, start + size)
            batch = sharding.shard_batch(self.condition(rows[own]), self.mesh)
            latents = _latents(*sampling, self.velocity, adapter, batch, keys[own])
            images.append(to_uint8(hosts.fetch(self.decode(latents))))
        return np.concatenate(images)[: len(texts)]

    def reward(self, name: str, images, texts):
        raise ConfigError(f"reward {name!r}: a pipeline has none of its own; add it to judges")

    def score(self, images, texts, judged) -> tuple[dict, dict]:
        """Every reward on the prompts of its tasks, over the pictures it is known of, and what a sum is made of."""
        rewards, others = {}, {}
        for name, tasks in self._judged_on.items():
            found = [judged(name, images[task], texts[task]) for task in tasks]
            rewards[name] = _mean([one.score for one in found])
            parts = found[0].parts if len(found[0].parts) > 1 else {}
            others |= {f"{name}: {part}": _mean([one.parts[part].score for one in found]) for part in parts}
        return rewards, others


def _mean(scores: list[np.ndarray]) -> float:
    scores = np.concatenate(scores)
    return float(scores[np.isfinite(scores)].mean()) if np.isfinite(scores).any() else float("nan")


def computing(model: MMDiT, part) -> MMDiT:
    """The transformer with the data type, the attention and the recomputed blocks of `config.pipeline`."""
    kernel = attention.kernel(part.attention, model.head_dim)
    return model.clone(dtype=jnp.dtype(part.dtype), attention=kernel, remat=part.remat)


def shape_of(model: MMDiT, autoencoder: Autoencoder, part) -> tuple[int, int, int]:
    """Of a latent."""
    side = part.resolution // autoencoder.downscale
    return side, side, model.in_channels


def velocities(model: MMDiT, config, params, null: Prompt) -> tuple[Partial, Partial]:
    """`World.velocity` and `World.routed`, with guidance."""
    wearing, guidance = (model, config.lora.scale, params, encoded), config.pipeline.guidance
    adapted = flow_methods.adapted_velocity(*wearing, merged=False)
    return flow.guided(adapted, null, guidance), flow_methods.routed_velocity(*wearing, guidance, null)


def parts_of(count: int, at_once: int) -> int:
    """That so many pictures are decoded in: `at_once`, or as many fewer as divide them."""
    return next(parts for parts in range(-(-count // at_once), count + 1) if count % parts == 0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def decoded(autoencoder, parts, params, latents):
    return 2 * latents_to_images(autoencoder, params, latents, parts) - 1


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _latents(shape, steps, shift, double_shift, velocity_fn, adapter, condition, keys):
    times = flow.time_grid(steps, shift, double_shift)
    return flow.generate(velocity_fn, adapter, condition, keys, shape, times)


def _embeddings(part, path: Path, texts: list[str]) -> text_embeddings.TextEmbeddings:
    """The store of these prompts; what is missing of it is written, by the first of several processes."""
    folder = Path(part.embeddings).expanduser()
    settings = text_embeddings.Settings(part.max_sequence_length, part.encoders.stored, part.encoders.dtype)
    write = lambda: text_embeddings.write(folder, path, texts, settings, part.encoders.batch_size, part.encoders.device)
    hosts.by_first(write)
    return write()  # nothing is missing

"""What every experiment on the scenes world is built of: its model, its prompts, its pictures and their scores."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from configs import common
from experiments import flow_methods, stages
from opd_jax import data, hosts, rng, sharding
from opd_jax.models import mmdit
from opd_jax.models.decoder import partition_rules
from opd_jax.models.mmdit import MMDiT
from opd_jax.rewards import tesseract
from opd_jax.sampling import flow
from opd_jax.worlds import scene_verifiers, scenes

SHAPE = (scenes.SIZE, scenes.SIZE, 3)
encode = scenes.encode
SHIPPED_BASE = stages.SHIPPED / "scenes_base.safetensors"
NOTE = (
    "composition and ocr are of their own prompts, quality of both; average is of the three. strict is the share of "
    "pictures right in every respect, tesseract an OCR engine's reading; nothing trained on these."
)


class Scenes:
    """The embedded world as `flow_methods.World`, with its shipped base."""

    own_rewards, splits, shown = scene_verifiers.REWARDS, ("Held-out", "Training"), 10
    note, example = NOTE, "a red circle"
    shape = SHAPE

    def __init__(self, config, workdir: Path, mesh, about: dict):
        self.mesh, self.model = mesh, module(config)
        self.base = _base(config, self.model, workdir, about)
        self.identity = self.base.sha256
        backbone = place(self.base.params, mesh)
        self.velocity, self.routed = velocities(self.model, config, backbone)

    @staticmethod
    def tasks(config) -> tuple[str, ...]:
        return scenes.TASKS

    @staticmethod
    def mistakes(config) -> list[str]:
        return []

    def prompts(self, tasks, batch_size: int, seed: int):
        return prompts(tuple(tasks), batch_size, seed, self.mesh)

    def pairs(self, tasks, batch_size: int, seed: int):
        """Of clean pictures: with nothing wrong."""
        clean = {"wrong": dict.fromkeys(scenes.TASKS, 0.0), "damaged": 0.0}
        return pairs(batch_size, seed, self.mesh, tasks=tuple(tasks), **clean)

    def held_out(self, count: int, seed: int, test: bool = True) -> dict[str, list[str]]:
        return held_out(count, seed, test)

    def texts(self, condition) -> list[str]:
        return [scenes.caption_of(tokens) for tokens in hosts.fetch(condition)]

    def metadata(self, texts) -> None:
        return None

    def decode(self, x):
        return x

    def pictures(self, adapter, texts, **sampler) -> np.ndarray:
        return pictures(self.velocity, adapter, texts, **sampler)

    def reward(self, name: str, images: np.ndarray, texts) -> np.ndarray:
        return scene_verifiers.reward(name, images, texts)

    def score(self, images, texts, judged) -> tuple[dict, dict]:
        return score(images, texts)


def _base(config, model: MMDiT, workdir: Path, about: dict) -> stages.Made:
    """The shipped model, made by `configs/scenes_base.py`; a random one if the config asks for another size."""
    if config.model.to_dict() == common.scene_model().to_dict():
        return stages.load(SHIPPED_BASE)
    recipe = stages.recipe_of({"model": config.model.to_dict(), "seed": config.seed})
    return stages.once("random_base", workdir, recipe, lambda _: (init_params(model, config.seed), 0), about)


def place(tree, mesh):
    """All parameters of the model, or a state that holds trees of them, by its rules."""
    return sharding.shard_params(tree, mesh, partition_rules(mesh, mmdit.RULES))


def velocities(model: MMDiT, config, backbone) -> tuple[Partial, Partial]:
    """`World.velocity` and `World.routed`."""
    wearing = model, config.lora.scale, backbone, encode
    return flow_methods.adapted_velocity(*wearing), flow_methods.routed_velocity(*wearing)


def module(config) -> MMDiT:
    return MMDiT(**config.model)


def full_velocity(model: MMDiT) -> Partial:
    """`velocity_fn(params, x, t, tokens)` with all parameters trained."""
    return Partial(functools.partial(_full, model))


def _full(model, params, x, t, tokens):
    return model.apply({"params": params}, x, t, *scenes.encode(tokens))


def init_params(model: MMDiT, seed: int):
    """Fresh parameters, with position embeddings of a picture's own size.

    Sines and cosines made for large pictures hardly differ over six patches, and patches then come out right one by one
    but uncoordinated. Random rows plus random columns of unit scale tell them apart from the first step on.
    """
    x, tokens = jnp.zeros((1, *SHAPE)), jnp.zeros((1, scenes.CONTEXT_LENGTH), jnp.int32)
    params = jax.jit(model.init)(rng.stream(seed, "init"), x, jnp.zeros(1), *scenes.encode(tokens))["params"]
    n, width = model.pos_embed_max_size, model.width
    rows, columns = jax.random.normal(rng.stream(seed, "positions"), (2, n, width))
    positions = (rows[:, None] + columns[None]).reshape(1, n * n, width)
    return params | {"pos_embed": positions}


def prompts(kinds: tuple[str, ...], batch_size: int, seed: int, mesh):
    """Endless batches `{"condition": [B, L], "task": [B]}` of training prompts: task i is a prompt of `kinds[i]`."""

    def draw(generator):
        task = int(generator.integers(len(kinds)))
        scene = scenes.draw_scene(generator, kinds[task])
        return {"condition": scenes.tokenize(scene.caption), "task": np.int32(task)}

    return data.batches(draw, batch_size, seed, lambda batch: sharding.shard_batch(batch, mesh))


def pairs(batch_size: int, seed: int, mesh, **found):
    """Endless batches `{"image": [B, H, W, 3], "condition": [B, L]}` as crawled; `found` as of `web_pair`."""

    def draw(generator):
        caption, image = scenes.web_pair(generator, **found)
        return {"image": image, "condition": scenes.tokenize(caption)}

    return data.batches(draw, batch_size, seed, lambda batch: sharding.shard_batch(batch, mesh))


def held_out(count: int, seed: int, test: bool = True) -> dict[str, list[str]]:
    """`count` captions of each task from the test (or training) split, fixed by the seed."""
    generator = np.random.default_rng(seed)
    return {task: [scenes.draw_scene(generator, task, test).caption for _ in range(count)] for task in scenes.TASKS}


def tokens_of(captions: list[str]) -> np.ndarray:
    return np.stack([scenes.tokenize(caption) for caption in captions])


@functools.partial(jax.jit, static_argnames=("steps", "shift", "double_shift"))
def _pictures(velocity_fn, params, tokens, key, steps, shift, double_shift):
    keys = rng.per_record(key, tokens.shape[0])
    return flow.generate(velocity_fn, params, tokens, keys, SHAPE, flow.time_grid(steps, shift, double_shift))


def pictures(
    velocity_fn, params, captions: list[str], *, steps: int, shift: float, seed: int, double_shift: bool = False
) -> np.ndarray:
    """One picture for each caption by the ODE, float32 `[N, H, W, 3]`; the same noise for every model."""
    tokens, devices = tokens_of(captions), sharding.record_parts()
    if devices > 1:
        tokens = sharding.shard_batch(np.pad(tokens, ((0, -len(tokens) % devices), (0, 0))), jax.sharding.get_mesh())
    images = _pictures(velocity_fn, params, tokens, rng.stream(seed, "pictures"), steps, shift, double_shift)
    return hosts.fetch(images)[: len(captions)]


def score(images: dict[str, np.ndarray], captions: dict[str, list[str]]) -> tuple[dict[str, float], dict[str, float]]:
    """The three rewards on pictures of held-out captions: composition and ocr on their own task, quality on both.

    And two judges that nothing was trained on: `strict`, the share of pictures right in every respect (the
    benchmark form of composition), and `tesseract`, an OCR engine's reading of the signs, where one is installed.
    """
    texts = [scenes.parse(caption).text for caption in captions["ocr"]]
    words = tesseract.read(images["ocr"], scenes.LETTERS)
    second = {} if words is None else {"tesseract": float(np.mean(list(map(tesseract.likeness, words, texts))))}
    quality = [scene_verifiers.quality(images[task], texts) for task, texts in captions.items()]
    rewards = {
        "composition": float(
            scene_verifiers.reward("composition", images["composition"], captions["composition"]).mean()
        ),
        "ocr": float(scene_verifiers.ocr(images["ocr"], captions["ocr"]).mean()),
        "quality": float(np.concatenate(quality).mean()),
    }
    strict = float(scene_verifiers.composition(images["composition"], captions["composition"]).mean())
    return rewards, {"strict": strict} | second

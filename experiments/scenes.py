"""What every experiment on the scenes world is built of: its model, its prompts, its pictures and their scores."""

import functools
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from opd_jax import data, hosts, rng, sharding
from opd_jax.models.mmdit import MMDiT
from opd_jax.rewards import tesseract
from opd_jax.sampling import flow
from opd_jax.worlds import scene_verifiers, scenes

SHAPE = (scenes.SIZE, scenes.SIZE, 3)
WEIGHTS = resources.files("opd_jax") / "worlds" / "weights"


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
    """Endless batches `{"tokens": [B, L], "task": [B]}` of training prompts: task i is a prompt of `kinds[i]`."""

    def draw(generator):
        task = int(generator.integers(len(kinds)))
        scene = scenes.draw_scene(generator, kinds[task])
        return {"tokens": scenes.tokenize(scene.caption), "task": np.int32(task)}

    return data.batches(draw, batch_size, seed, lambda batch: sharding.shard_batch(batch, mesh))


def pairs(batch_size: int, seed: int, mesh, **found):
    """Endless batches `{"image": [B, H, W, 3], "tokens": [B, L]}` as a crawler finds them; `found` as of `web_pair`."""

    def draw(generator):
        caption, image = scenes.web_pair(generator, **found)
        return {"image": image, "tokens": scenes.tokenize(caption)}

    return data.batches(draw, batch_size, seed, lambda batch: sharding.shard_batch(batch, mesh))


def clean_pairs(tasks: tuple[str, ...], batch_size: int, seed: int, mesh):
    """Endless batches as `pairs`, of some tasks, with nothing wrong."""
    return pairs(batch_size, seed, mesh, wrong=dict.fromkeys(scenes.TASKS, 0.0), damaged=0.0, tasks=tasks)


def held_out(count: int, seed: int, test: bool = True) -> dict[str, list[str]]:
    """`count` captions of each task from the test (or training) split, fixed by the seed."""
    generator = np.random.default_rng(seed)
    return {task: [scenes.draw_scene(generator, task, test).caption for _ in range(count)] for task in scenes.TASKS}


def tokens_of(captions: list[str]) -> np.ndarray:
    return np.stack([scenes.tokenize(caption) for caption in captions])


@functools.partial(jax.jit, static_argnames=("steps", "shift"))
def _pictures(velocity_fn, params, tokens, key, steps, shift):
    keys = rng.per_record(key, tokens.shape[0])
    return flow.generate(velocity_fn, params, tokens, keys, SHAPE, flow.time_grid(steps, shift))


def pictures(velocity_fn, params, captions: list[str], *, steps: int, shift: float, seed: int) -> np.ndarray:
    """One picture for each caption by the ODE, float32 `[N, H, W, 3]`; the same noise for every model."""
    tokens, devices = tokens_of(captions), jax.sharding.get_mesh().shape.get("data", 1)
    if devices > 1:
        tokens = sharding.shard_batch(np.pad(tokens, ((0, -len(tokens) % devices), (0, 0))), jax.sharding.get_mesh())
    images = _pictures(velocity_fn, params, tokens, rng.stream(seed, "pictures"), steps, shift)
    return hosts.fetch(images)[: len(captions)]


def score(velocity_fn, params, captions: dict[str, list[str]], **sampler) -> dict[str, float]:
    """The three rewards on pictures of held-out captions: composition and ocr on their own task, quality on both.

    Beside them two judges that nothing was trained on: `strict`, the share of pictures right in every respect (the
    benchmark form of composition), and `tesseract`, an OCR engine's reading of the signs, where one is installed.
    """
    images = {task: pictures(velocity_fn, params, texts, **sampler) for task, texts in captions.items()}
    texts = [scenes.parse(caption).text for caption in captions["ocr"]]
    words = tesseract.read(images["ocr"], scenes.LETTERS)
    second = {} if words is None else {"tesseract": float(np.mean(list(map(tesseract.likeness, words, texts))))}
    quality = [scene_verifiers.quality(images[task], texts) for task, texts in captions.items()]
    return {
        "composition": float(
            scene_verifiers.reward("composition", images["composition"], captions["composition"]).mean()
        ),
        "ocr": float(scene_verifiers.ocr(images["ocr"], captions["ocr"]).mean()),
        "quality": float(np.concatenate(quality).mean()),
        "strict": float(scene_verifiers.composition(images["composition"], captions["composition"]).mean()),
    } | second

"""Practice before any task, in the one loop: a policy that the students of VLA-OPD may begin with."""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from experiments import stages, vla_methods
from experiments.recipes import check_counts, optimizer_of
from experiments.vla_tabletop import first_observation, module_of
from opd_jax import data, hosts, optim, report, rng, sharding
from opd_jax.config import checks, command_line
from opd_jax.losses import vla_opd
from opd_jax.models import action_tokens
from opd_jax.models.keypoints import pointing_loss
from opd_jax.models.vla import Observation
from opd_jax.sampling import episodes
from opd_jax.sampling.episodes import Plan
from opd_jax.types import ActionLabels, Method, Weighted
from opd_jax.worlds import tabletop, tabletop_skills
from opd_jax.worlds.tabletop_skills import Moment


def recipe_of(config) -> str:
    settings = config.to_dict()
    return stages.recipe_of({name: settings[name] for name in ("seed", "policy", "practice", "sigma")})


def validate(config, mesh) -> None:
    with checks() as check:
        check_counts(check, config, "save_every", "eval.moments")
        for phase in ("practice", "again"):
            uneven = sharding.uneven(config[phase].batch_size, mesh, f"{phase}.batch_size")
            check(not uneven, uneven)
            wrong = optim.schedule_mistake(config[phase].steps, config[phase].warmup, config[phase].decay_steps)
            check(not wrong, f"{phase}: {wrong}")
        check(0 <= config.again.closed <= 1, f"again.closed={config.again.closed}: a share, from 0 to 1")
        uneven = sharding.uneven(config.eval.moments, mesh, "eval.moments")
        check(not uneven, uneven)
        executed, most = config.eval.executed, config.policy.horizon
        check(1 <= executed <= most, f"eval.executed={executed}: a chunk has {most} actions; give 1 to {most}")
        check(config.sigma > 0, f"sigma={config.sigma}: give a number above 0")


class Shown(NamedTuple):
    """What the `states` of practice hold."""

    actions: Float[Array, "B T H A"]
    aim: Float[Array, "B T C 2 2"]  # where in the pictures the thing and the place lie


class Practice:
    """A moment of practice as an environment."""

    def step(self, moment: Moment, action) -> Moment:
        return moment._replace(state=tabletop.step(moment.state, action))

    def observe(self, moment: Moment) -> Observation:
        seen = tabletop.observe(moment.state)
        return Observation(seen.images, seen.proprioception, moment.instruction)

    def success(self, moment: Moment) -> Array:
        return tabletop_skills.done(moment.state, moment.subject, moment.place)


PRACTICE = Practice()


@functools.partial(jax.jit, static_argnames="plan")
def _tried(act, params, key, seeds, *, plan: Plan):
    moments = jax.vmap(lambda seed: tabletop_skills.moment(jax.random.key(seed)))(seeds)
    index, horizon = jnp.arange(len(seeds)), jnp.full(len(seeds), plan.decisions * plan.executed)
    how = {"plan": plan, "horizon": horizon, "group": index, "task": index}
    played = episodes.rollout(PRACTICE, act, params, moments, rng.per_record(key, len(seeds)), **how)
    return played.success, moments.place >= 0, moments.state.held >= 0


def tried(config, module, params, mesh) -> dict[str, float]:
    """Share of new moments in which the policy, by its most probable bins, does what it is told: `picked` up a thing,
    `put` down what it held, `carried` a thing that it had to pick up first."""
    part, act = config.eval, vla_methods.greedy(vla_methods.logits_fn(module))
    seeds = np.random.default_rng(part.seed).integers(0, 2**32, part.moments, np.uint32)
    plan = Plan(-(-part.steps // part.executed), part.executed)
    params, seeds = sharding.replicate(params, mesh), sharding.shard_batch(seeds, mesh)
    success, somewhere, held = hosts.fetch(_tried(act, params, rng.stream(part.seed, "eval"), seeds, plan=plan))
    kinds = {"picked": ~somewhere, "put": held, "carried": somewhere & ~held}
    return {name: float(success[kind].mean()) for name, kind in kinds.items() if kind.any()}


class PracticeLabels(NamedTuple):
    """What practice is taught."""

    actions: ActionLabels
    aim: Float[Array, "B T C 2 2"]


@functools.partial(jax.jit, static_argnames="steps")
def practise(seeds, closed=0.0, *, steps: int):
    """Moments of practice as episodes of one decision."""
    moments = jax.vmap(lambda seed: tabletop_skills.moment(jax.random.key(seed), closed))(seeds)
    seen = jax.vmap(tabletop.observe)(moments.state)
    observation = Observation(seen.images, seen.proprioception, moments.instruction)
    actions = jax.vmap(functools.partial(tabletop_skills.chunk, steps=steps))(moments)
    counted = np.ones(actions.shape[:2], bool)
    task = np.zeros(len(actions), np.int32)
    rollout = vla_methods.as_rollout({"observation": observation, "actions": actions, "counted": counted, "task": task})
    return rollout._replace(states=Shown(actions[:, None], jax.vmap(tabletop_skills.aim)(moments)[:, None]))


def pointing(module, weight: float, own, params, rollout, labels: PracticeLabels, key) -> Weighted:
    """`own`, the loss of the actions, and how far the first points of every camera are from the thing and the place."""
    out = own(params, rollout, labels.actions, key)
    seen = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rollout.observation)
    target = labels.aim.reshape(-1, 2, 2)
    inside = (jnp.abs(target) < 1).all(-1)
    (points,) = module.apply({"params": params}, seen, method="points")
    missed = sum(pointing_loss(points, target[:, which], inside[:, which], which) for which in range(2))
    near = jnp.abs(points.place[:, :2] - target).max(-1) < 1 / 10  # a cell of a picture
    missed, near, inside = (part.reshape(len(out.total), -1) for part in (missed, near & inside, inside))
    share = near.sum(1) / jnp.maximum(inside.sum(1), 1)
    metrics = {"missed": missed.mean(1), "pointed": share}
    return out._replace(
        total=out.total + weight * missed.mean(1) * out.weight,
        metrics=out.metrics | jax.lax.stop_gradient(metrics),
    )


def method_of(config, module, recipe) -> tuple:
    """The method of a phase, and its optimiser."""
    optimizer = optimizer_of(recipe)
    own = vla_opd.supervise(vla_methods.logits_fn(module), "forward_kl")
    if config.policy.points:
        own = Partial(functools.partial(pointing, module, recipe.pointing), own)
    else:
        own = Partial(lambda own, params, rollout, labels, key: own(params, rollout, labels.actions, key), own)
    update = optim.dense(own, optimizer, ema_decay=recipe.ema_decay)

    @jax.jit
    def label(rollout):
        return PracticeLabels(
            ActionLabels(action_tokens.expert_logits(rollout.states.actions, config.sigma)), rollout.states.aim
        )

    closed = recipe.get("closed", 0.0)
    sample = lambda _, batch, key: practise(batch["seed"], closed, steps=module.horizon)
    return Method(sample, lambda _, rollout: label(rollout), update), optimizer


def make(config, mesh, workdir) -> stages.Made:
    """Practice with open hands, and then with hands that may have missed."""
    module = module_of(config.policy)
    start = jax.jit(module.init)(rng.stream(config.seed, "policy"), first_observation())["params"]
    draw = lambda generator: {"seed": generator.integers(0, 2**32, dtype=np.uint32)}

    def phase(stage: str, recipe_hash: str, recipe, start, seed: int) -> stages.Made:
        batches = data.batches(draw, recipe.batch_size, seed, functools.partial(sharding.shard_batch, mesh=mesh))
        return stages.trained(
            stage, workdir, recipe_hash, method_of(config, module, recipe), start, batches, recipe, seed,
            place=functools.partial(sharding.replicate, mesh=mesh), about={"command": command_line()},
            averaged=True, save_every=config.save_every,
        )  # fmt: skip

    first = phase("practice", recipe_of(config), config.practice, start, config.seed)
    again = stages.recipe_of(config.again.to_dict(), first.sha256)
    made = phase("base", again, config.again, first.params, config.seed + 1)
    return made._replace(seconds=first.seconds + made.seconds, samples=first.samples + made.samples)


def run(config, workdir, mesh) -> None:
    began = time.time()
    made = make(config, mesh, workdir)
    found = tried(config, module_of(config.policy), made.params, mesh)
    rows = [{"model": "base"} | found | {"samples": made.samples, "seconds": round(made.seconds)}]
    summary = {"table": rows, "params_sha256": made.sha256, "seconds": {"total": time.time() - began}}
    report.write_summary(workdir / "summary.json", summary)
    print(report.format_table(rows))

# SPDX-License-Identifier: Apache-2.0
"""Flow-OPD's rollout and step with LoRA teachers, beside a plain PyTorch loop on diffusers' transformer.

    python benchmarks/flow_step.py                                     # a small model; a minute on two idle cores
    python benchmarks/flow_step.py --shape=sd3p5_medium --compile      # one GPU of 80 GB: SD3.5-Medium at 512 px

One random transformer, saved once and read by both sides; four teachers, adapters on its attention, each of a quarter
of the records; a student that starts as the mean of them, of four times their rank; random prompts. Rows: `sample`, the
student's stochastic paths with guidance; `update`, of one and the same batch of paths: the teachers' velocities at all
visited states but the last, the student's with gradient, AdamW; `step`, both. With `--dtype=bfloat16`, the default on
a GPU, the transformer's weights and products are bfloat16 on both sides and the student's adapter float32. `--compile`
puts the peer's transformer under torch.compile; `--remat` recomputes blocks on both sides, ours by a policy of
`opd_jax/models/remat.py`.

Columns are those of `token_opd.py`, in images. FLOPs are what the step must do (`opd_jax/flops.py`): one teacher at
each state. `loss` is that of the first update of both sides, of the same paths, to show that they do the same work.
"""

import argparse
import os
import tempfile
from functools import partial
from types import SimpleNamespace

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU

import jax
import jax.numpy as jnp
import measures
import numpy as np
from measures import Side, Work

from configs import flow_opd as flow_config
from experiments import flow_methods, latents, plan_models
from experiments.latents import Prompt
from opd_jax import flops, optim, report, rng
from opd_jax.models import attention, lora
from opd_jax.models.hf import load_mmdit, save_mmdit
from opd_jax.models.hf.mmdit import diffusers_name
from opd_jax.models.mmdit import MMDiT
from opd_jax.models.remat import CHOICES

TINY = MMDiT(2, 4, 4, 2, 2, 16, 24, 12, 8, (0,), "rms_norm")
SHAPES = {  # model; latents of 512 px, tokens of CLIP and of T5, as in configs/flow_opd.py:paper
    "": (TINY, {"side": 8, "context": 5, "batch": 8, "steps": 4, "micro_batches": 2, "rank": 2}),
    "sd3p5_medium": (
        plan_models.MMDITS["sd3.5-medium"],
        {"side": 64, "context": 205, "batch": 16, "steps": 10, "micro_batches": 16, "rank": 32},
    ),
}
TEACHERS = 4


def save_model(module: MMDiT, directory: str, dtype) -> None:
    """Random weights, those that start at zero too, as diffusers reads them."""

    def init(key):
        inputs = jnp.zeros((1, 2, 2, module.in_channels)), jnp.zeros(1), jnp.zeros((1, 1, module.joint_attention_dim))
        params = module.init(key, *inputs, jnp.zeros((1, module.pooled_projection_dim)))["params"]
        position = params.pop("pos_embed")
        leaves, tree = jax.tree.flatten(params)
        keys = rng.per_record(rng.at_step(key, 1), len(leaves))
        size = lambda leaf: 0.1 if leaf.ndim < 2 else leaf.shape[0] ** -0.5
        noisy = [leaf + size(leaf) * jax.random.normal(own, leaf.shape) for leaf, own in zip(leaves, keys)]
        return jax.tree.map(lambda leaf: leaf.astype(dtype), tree.unflatten(noisy) | {"pos_embed": position})

    save_mmdit(module, jax.jit(init)(rng.stream(0, "base")), directory)


def settings_of(args):
    """The paper's config, with the sizes of this measurement."""
    config = flow_config.get_config("paper")
    with config.unlocked():
        config.pipeline.update({"dtype": args.dtype, "remat": args.remat})
        config.pipeline.update({"attention": args.attention, "guidance": args.guidance})
        config.sampler.steps, config.lora.rank = args.steps, args.rank
        config.opd.update({"prompts": args.batch, "group": 1, "micro_batches": args.micro_batches})
        config.opd.update({"anchor_weight": 0.0, "steps": 1_000})
    return config


class Ours:
    def __init__(self, directory, args):
        self.config, self.args = settings_of(args), args
        module, backbone = load_mmdit(directory)
        self.module = latents.computing(module, self.config.pipeline)
        size = args.context, module.joint_attention_dim
        normal = lambda name, *shape: jax.random.normal(rng.stream(0, name), shape).astype(args.dtype)
        self.prompts = normal("context", args.batch, *size), normal("pooled", args.batch, module.pooled_projection_dim)
        self.null = normal("null context", 1, *size), normal("null pooled", 1, module.pooled_projection_dim)
        self.teachers = [self.adapter(backbone, f"teacher {i}") for i in range(TEACHERS)]
        student, routed = latents.velocities(
            self.module, self.config, backbone, Prompt(jnp.full(1, -1, jnp.int32), *self.null)
        )
        world = SimpleNamespace(
            velocity=student, routed=routed, shape=(args.side, args.side, module.in_channels)
        )  # what `opd_method` takes of a World
        self._update, optimizer = flow_methods.opd_update(student, self.config.opd, self.config)
        self.method = flow_methods.opd_method(world, self._update, self.config, self.config.opd)
        self.start = lora.average(self.teachers)
        self.state = optim.init_state(self.start, optimizer)
        index = jnp.arange(args.batch, dtype=jnp.int32)
        self.batch = {"condition": Prompt(index, *self.prompts), "task": index % TEACHERS}
        self.calls = 0
        self.rollout = self.sample()

    def adapter(self, backbone, name: str):
        new = lora.init(rng.stream(0, name), backbone, self.config.lora.pattern, self.args.rank)
        other = rng.stream(0, f"{name}, b")
        fill = lambda i, pair: pair | {"b": 0.1 * jax.random.normal(rng.at_step(other, i), pair["b"].shape)}
        return {path: fill(i, pair) for i, (path, pair) in enumerate(new.items())}

    def sample(self):
        self.calls += 1
        return jax.block_until_ready(self.method.sample(self.state.params, self.batch, jax.random.key(self.calls)))

    def update(self, rollout=None) -> float:
        rollout = rollout or self.rollout
        labels = self.method.label((self.teachers, None), rollout)
        self.state, metrics = self.method.update(self.state, rollout, labels, jax.random.key(0))
        return float(metrics["loss"])

    def step(self):
        return self.update(self.sample())


def peer_of(directory, ours: Ours, args):
    """Raises: ImportError: torch or diffusers is absent."""
    import flow_peer

    name = lambda path: diffusers_name(path).removesuffix(".weight")
    wearing = [ours.start, *ours.teachers]
    pairs = {name(path): [(one[path]["a"], one[path]["b"]) for one in wearing] for path in ours.start}
    sampler = ours.config.sampler
    settings = SimpleNamespace(
        steps=args.steps, shift=sampler.shift, level=sampler.noise_level, guidance=args.guidance,
        scale=ours.config.lora.scale, micro_batches=args.micro_batches, remat=args.remat, compile=args.compile,
        dtype=args.dtype, cuda=jax.default_backend() == "gpu" and flow_peer.torch.cuda.is_available(),
    )  # fmt: skip
    prompts = [[np.asarray(x, np.float32) for x in some] for some in (ours.prompts, ours.null)]
    peer = flow_peer.Torch(directory, pairs, *prompts, np.asarray(ours.batch["task"]), settings)
    peer.learn_from(np.asarray(ours.rollout.states))
    return peer


def work_of(module: MMDiT, args) -> dict[str, Work]:
    """What each row must do; guidance is two forward passes."""
    passes = args.batch * (1 if args.guidance == 1 else 2)
    pattern = flow_config.get_config("paper").lora.pattern
    of = lambda steps, rank: flops.mmdit(module, passes * steps, args.side, args.context, pattern, rank)
    sampled = of(args.steps, TEACHERS * args.rank).total
    student = of(args.steps - 1, TEACHERS * args.rank)
    learnt = of(args.steps - 1, args.rank).total + student.total + student.backward(frozen=True)
    work = {"sample": sampled, "update": learnt, "step": sampled + learnt}
    return {name: Work(value, None, args.batch, "images") for name, value in work.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="", choices=list(SHAPES))
    for name in SHAPES[""][1]:
        parser.add_argument(f"--{name}", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=4.5)
    on_gpu = jax.default_backend() == "gpu"
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", choices=["float32", "bfloat16"])
    parser.add_argument("--remat", default="", choices=CHOICES, help="what our blocks keep; the peer's then nothing")
    parser.add_argument("--attention", default="flash", choices=attention.NAMES, help="ours; '': XLA's")
    parser.add_argument("--compile", action="store_true", help="the peer's transformer under torch.compile")
    parser.add_argument("--profile", default="", help="a folder, for a trace of one call of each of our rows")
    args = parser.parse_args()
    if wrong := attention.mistake(args.attention, args.dtype):
        parser.error(wrong)
    for name, default in SHAPES[args.shape][1].items():
        setattr(args, name, getattr(args, name) or default)
    return args


def main() -> None:
    args = arguments()
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}; {vars(args)}")
    with tempfile.TemporaryDirectory() as directory:
        save_model(SHAPES[args.shape][0], directory, jnp.dtype(args.dtype))
        ours = Ours(directory, args)
        side = lambda one, peak: Side({name: getattr(one, name) for name in ("sample", "update", "step")}, peak)
        sides, losses = {"ours": side(ours, measures.jax_peak)}, {}
        try:
            peer = peer_of(directory, ours, args)
        except ImportError as problem:
            print(f"the peer is left out: {problem}")
        else:
            name = "PyTorch, compiled" if args.compile else "PyTorch"
            sides[name] = side(peer, partial(measures.torch_peak, peer.device))
            losses[name] = peer.update()
        losses = {"ours": ours.update()} | losses
        print("loss of the first update:", ", ".join(f"{name} {value:.6g}" for name, value in losses.items()))
        rows = measures.compare(sides, work_of(ours.module, args), args.repeats, args.dtype == "float32")
        print(report.format_table(rows), flush=True)
        if args.profile:
            measures.profiled(sides["ours"], args.profile)


if __name__ == "__main__":
    main()

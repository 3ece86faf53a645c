# SPDX-License-Identifier: Apache-2.0
"""Sampling and one step of on-policy distillation, beside transformers' modules in a plain PyTorch loop.

    python benchmarks/token_opd.py                                  # some minutes on two idle cores
    python benchmarks/token_opd.py --shape=qwen3_0p6b --compile     # one GPU of 80 GB: Qwen3-0.6B from Qwen3-1.7B
    pip install torch==2.13.0 transformers                          # the peer, left out where absent

The same random Qwen3 student and teacher, saved once and read by both sides, on the same prompts. Rows: `sample`,
answers of a fixed length, no stop token, temperature 1; `update`, of one and the same batch of answers: the teacher's
forward, the exact reverse KL over the vocabulary at every token of an answer, its gradient, the clip of its norm,
AdamW; `step`, both. With `--dtype=bfloat16`, the default on a GPU, trained parameters are float32 on both sides and
products bfloat16 (in torch by autocast); the teacher, and the copy of the student that is sampled from, are bfloat16.
`--compile` puts the peer's models under torch.compile, and gives `generate` its static cache. `--loss=trl` takes the
loss from TRL's GKD, where that is installed. All in one process, in turns, so that other load falls on all alike.

Columns: fastest and median seconds; tokens of answers a second at the fastest, and that relative to ours; FLOP/s and
their share of the device's peak, FLOPs being what the step must do (`opd_jax/flops.py`) whatever a side recomputes; of
`sample` the share of the memory's bandwidth, by the bytes of the kernels and of the cache that it must read, the time
of the prompts' own forward being in it; and the most memory in use since the start. `reverse_kl` is the loss both sides
find on one batch, to show that they do the same work.
"""

import argparse
import os
import tempfile
from functools import partial

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU

import jax
import jax.numpy as jnp
import measures
import numpy as np
from measures import Side, Work

from experiments import language, plan_models, token_methods
from opd_jax import flops, optim, report, rng
from opd_jax.losses import opd
from opd_jax.models import attention
from opd_jax.models.decoder import Decoder
from opd_jax.models.hf import load_decoder, save_decoder
from opd_jax.models.remat import CHOICES
from opd_jax.sampling.tokens import SamplingParams
from opd_jax.types import TokenRollout

SHAPES = {  # student and teacher of public shapes, and sizes of a batch that 80 GB hold
    "qwen3_0p6b": ("qwen3-0.6b", "qwen3-1.7b", {"batch": 32, "prompt": 256, "new": 512, "micro_batches": 8}),
}
SMALL = {"batch": 32, "prompt": 32, "new": 64, "micro_batches": 1}


def modules(args) -> dict[str, Decoder]:
    """A student and a larger teacher with one vocabulary."""
    if args.shape:
        student, teacher, _ = SHAPES[args.shape]
        return {"student": plan_models.decoder_of(student, ""), "teacher": plan_models.decoder_of(teacher, "")}
    tiny = lambda width: Decoder(
        args.vocabulary, width, 3 * width, args.layers, width // 32, width // 32, 32, qk_norm=True, tie_embeddings=True
    )
    return {"student": tiny(args.width), "teacher": tiny(2 * args.width)}


def save_models(folder: str, args) -> dict[str, str]:
    """Random weights of both, as transformers directories."""
    paths = {}
    for role, module in modules(args).items():
        params = jax.jit(module.init)(rng.stream(0, role), jnp.zeros((1, 1), jnp.int32))["params"]
        params = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, params)  # far enough from uniform
        paths[role] = str(save_decoder(module, params, os.path.join(folder, role)))
    return paths


class Ours:
    def __init__(self, paths, prompts, args):
        dtype = jnp.dtype(args.dtype)
        student, self.params = load_decoder(paths["student"])
        own = {"dtype": dtype, "attention": attention.kernel(args.attention, student.head_dim)}
        teacher, self.teacher_params = load_decoder(paths["teacher"], dtype=dtype)
        self.modules = {"student": student, "teacher": teacher}
        student, teacher = student.clone(remat=args.remat, **own), teacher.clone(**own)
        self.student, teacher = (language.functions(m, m.vocab_size) for m in (student, teacher))
        self.answer = token_methods.answer(self.student, SamplingParams(args.new))
        self.label = token_methods.states_of(teacher, args.micro_batches)
        optimizer = optim.adamw(1e-5)
        self.loss = opd.supervise(self.student.hidden, self.student.head, teacher.head(self.teacher_params))
        self._update = optim.dense(self.loss, optimizer, micro_batches=args.micro_batches)
        self.state = optim.init_state(self.params, optimizer)
        self.params = self.state.ema
        length = jnp.full(len(prompts), prompts.shape[1], jnp.int32)
        one = jnp.arange(len(prompts), dtype=jnp.int32)
        self.batch = {"tokens": jnp.asarray(prompts), "length": length, "index": one, "task": jnp.zeros_like(one)}
        self.calls = 0
        self.rollout = self.sample()

    def sample(self):
        self.calls += 1
        return jax.block_until_ready(self.answer(self.params, self.batch, jax.random.key(self.calls)))

    def update(self, rollout=None):
        rollout = rollout or self.rollout
        labels = self.label(self.teacher_params, rollout)
        self.state, metrics = self._update(self.state, rollout, labels, jax.random.key(0))
        self.params = self.state.params
        return jax.block_until_ready(metrics)

    def step(self):
        return self.update(self.sample())

    def side(self) -> Side:
        return Side({name: getattr(self, name) for name in ("sample", "update", "step")}, measures.jax_peak)

    def value(self, tokens: np.ndarray) -> float:
        b, s = tokens.shape
        response = np.arange(s)[None] >= np.asarray(self.batch["length"])[:, None]
        zero, logp = jnp.zeros(b, jnp.int32), jnp.zeros((b, s))
        rollout = TokenRollout(jnp.asarray(tokens), jnp.asarray(response), zero + s, zero, zero, logp, logp, zero > 0)
        labels = self.label(self.teacher_params, rollout)
        out = jax.jit(self.loss)(self.params, rollout, labels, None)
        return float(out.total.sum() / out.weight.sum())


class Torch:
    """The peer. Raises: ImportError: torch, transformers, or with `--loss=trl` TRL, is absent."""

    def __init__(self, paths, prompts, args, tokens: np.ndarray):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.args = torch, args
        self.device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
        self.kind = getattr(torch, args.dtype)
        load = lambda role, kind: AutoModelForCausalLM.from_pretrained(paths[role], dtype=kind).to(self.device)
        self.student, self.teacher = load("student", torch.float32), load("teacher", self.kind).eval()
        narrow = self.kind is not torch.float32
        self.sampler = load("student", self.kind).eval() if narrow else self.student  # a copy, made anew each time
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5, fused=self.device == "cuda")
        self.given = torch.tensor(prompts, device=self.device).long()
        self.tokens = torch.tensor(tokens, device=self.device).long()
        compiled = torch.compile if args.compile else lambda model: model
        self.models = compiled(self.student), compiled(self.teacher)
        self.divergence = _trl_loss() if args.loss == "trl" else self.reverse_kl

    def sync(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def sample(self):
        torch, new = self.torch, self.args.new
        with torch.no_grad():
            if self.sampler is not self.student:
                torch._foreach_copy_(list(self.sampler.parameters()), list(self.student.parameters()))
            static = {"cache_implementation": "static"} if self.args.compile else {}
            tokens = self.sampler.generate(
                self.given, attention_mask=torch.ones_like(self.given), do_sample=True, top_k=0, temperature=1.0,
                use_cache=True, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **static,
            )  # fmt: skip
        self.sync()
        return tokens

    def reverse_kl(self, student_logits, teacher_logits, labels):
        """KL(student || teacher) in nats, the mean over tokens."""
        student, teacher = (logits.float().log_softmax(-1) for logits in (student_logits, teacher_logits))
        return (student.exp() * (student - teacher)).sum(-1).mean()

    def loss(self, tokens):
        first, torch = self.given.shape[1], self.torch
        keep = slice(first - 1, tokens.shape[1] - 1)
        where = torch.arange(keep.start, keep.stop, device=self.device)
        student, teacher = self.models
        with torch.no_grad():
            theirs = teacher(tokens, logits_to_keep=where, use_cache=False).logits
        with torch.autocast(self.device, dtype=self.kind, enabled=self.kind is not torch.float32):
            ours = student(tokens, logits_to_keep=where, use_cache=False).logits
        return self.divergence(ours, theirs, labels=tokens[:, first:])

    def update(self, tokens=None):
        tokens, torch, parts = self.tokens if tokens is None else tokens, self.torch, self.args.micro_batches
        self.optimizer.zero_grad()
        for part in tokens.chunk(parts):
            (self.loss(part) / parts).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.sync()

    def step(self):
        self.update(self.sample())

    def side(self) -> Side:
        calls = {name: getattr(self, name) for name in ("sample", "update", "step")}
        return Side(calls, partial(measures.torch_peak, self.device))

    def value(self, tokens: np.ndarray) -> float:
        parts = self.torch.tensor(tokens, device=self.device).long().chunk(self.args.micro_batches)
        with self.torch.no_grad():
            return float(np.mean([float(self.loss(part)) for part in parts]))


def _trl_loss():
    from trl.experimental.gkd import GKDTrainer

    return partial(GKDTrainer.generalized_jsd_loss, beta=1.0)


def work_of(models: dict[str, Decoder], args) -> dict[str, Work]:
    """What each row must do."""
    student, teacher = models["student"], models["teacher"]
    tokens = args.batch * (args.prompt + args.new)
    each = (tokens, args.prompt + args.new, args.batch * args.new)
    forward, label = flops.decoder(student, *each), flops.decoder(teacher, *each)
    sampled = flops.answers(student, args.batch, args.prompt, args.new).total
    read = flops.decoding_bytes(student, args.batch, args.prompt, args.new, jnp.dtype(args.dtype).itemsize)
    learnt, count = label.total + forward.total + forward.backward(), args.batch * args.new
    return {
        "sample": Work(sampled, read, count),
        "update": Work(learnt, None, count),
        "step": Work(sampled + learnt, None, count),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="", choices=["", *SHAPES], help="public shapes; without it, the sizes below")
    for name, default in (("width", 128), ("layers", 4), ("vocabulary", 4096), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in SMALL:
        parser.add_argument(f"--{name}", type=int, default=None)
    on_gpu = jax.default_backend() == "gpu"
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", choices=["float32", "bfloat16"])
    parser.add_argument("--attention", default="flash", choices=attention.NAMES, help="ours; '': XLA's")
    parser.add_argument("--remat", default="", choices=CHOICES, help="ours: what blocks keep for the backward pass")
    parser.add_argument("--compile", action="store_true", help="the peer's models under torch.compile")
    parser.add_argument("--loss", default="plain", choices=["plain", "trl"], help="the peer's")
    parser.add_argument("--profile", default="", help="a folder, for a trace of one call of each of our rows")
    args = parser.parse_args()
    if wrong := attention.mistake(args.attention, args.dtype):
        parser.error(wrong)
    for name, default in (SHAPES[args.shape][2] if args.shape else SMALL).items():
        setattr(args, name, getattr(args, name) or default)
    return args


def main() -> None:
    args = arguments()
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}; {vars(args)}")
    with tempfile.TemporaryDirectory() as folder:
        paths = save_models(folder, args)
        generator = np.random.default_rng(0)
        vocabulary = modules(args)["student"].vocab_size
        prompts = generator.integers(1, vocabulary, (args.batch, args.prompt)).astype(np.int32)
        ours = Ours(paths, prompts, args)
        tokens, sides, values = np.asarray(ours.rollout.tokens), {"ours": ours.side()}, {}
        values["ours"] = ours.value(tokens)
        try:
            peer = Torch(paths, prompts, args, tokens)
        except ImportError as problem:
            print(f"the peer is left out: {problem}")
        else:
            name = f"PyTorch{', compiled' if args.compile else ''}{', TRL' if args.loss == 'trl' else ''}"
            sides[name], values[name] = peer.side(), peer.value(tokens)
        print("reverse_kl of one batch, nats per token:", ", ".join(f"{k} {v:.6f}" for k, v in values.items()))
        rows = measures.compare(sides, work_of(ours.modules, args), args.repeats, args.dtype == "float32")
        print(report.format_table(rows), flush=True)
        if args.profile:
            measures.profiled(sides["ours"], args.profile)


if __name__ == "__main__":
    main()

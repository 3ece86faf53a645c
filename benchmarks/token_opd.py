# SPDX-License-Identifier: Apache-2.0
"""Sampling and one step of on-policy distillation, beside transformers' `generate` and TRL's GKD loss in torch.

    python benchmarks/token_opd.py                         # some minutes on two idle cores
    pip install torch==2.13.0 trl                          # the peers, left out where absent

The same random Qwen3 student and teacher, saved once and read by both sides, on the same prompts. `sample`: answers of
a fixed length, no stop token, temperature 1. `step`: those answers, the teacher's forward, the exact reverse KL over
the vocabulary at every token, its gradient, AdamW; for TRL that is its `generalized_jsd_loss` with beta = 1 between
`generate` and torch's AdamW. All in one process, in turns, so that other load falls on all alike. Columns: fastest and
median seconds, response tokens per second at the fastest, and that relative to ours; `reverse_kl` is the loss both
sides find on one and the same batch, to show that they do the same work.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU

import jax
import jax.numpy as jnp
import numpy as np

from experiments import language, token_methods
from opd_jax import optim, rng
from opd_jax.losses import opd
from opd_jax.losses.opd import TeacherStates
from opd_jax.models.decoder import Decoder
from opd_jax.models.hf import load_decoder, save_decoder
from opd_jax.sampling.tokens import SamplingParams
from opd_jax.types import TokenRollout

PEAK = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12}  # bfloat16 FLOP/s, dense


def save_models(folder: str, args) -> dict[str, str]:
    """A random student and a wider random teacher with one vocabulary, as transformers directories."""
    paths = {}
    for name, width in (("student", args.width), ("teacher", 2 * args.width)):
        module = Decoder(
            args.vocabulary,
            width,
            3 * width,
            args.layers,
            width // 32,
            width // 32,
            32,
            qk_norm=True,
            tie_embeddings=True,
        )
        params = jax.jit(module.init)(rng.stream(0, name), jnp.zeros((1, 1), jnp.int32))["params"]
        params = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, params)  # far enough from uniform
        paths[name] = str(save_decoder(module, params, os.path.join(folder, name)))
    return paths


class Ours:
    def __init__(self, paths, prompts, args):
        student, self.params = load_decoder(paths["student"])
        teacher, self.teacher_params = load_decoder(paths["teacher"])
        if jax.default_backend() == "gpu":
            student, teacher = student.clone(dtype=jnp.bfloat16), teacher.clone(dtype=jnp.bfloat16)
        self.student, teacher = (language.functions(m, args.vocabulary) for m in (student, teacher))
        self.answer = token_methods.answer(self.student, SamplingParams(args.new))
        self.label = token_methods.states_of(teacher)
        optimizer = optim.adamw(1e-5)
        self.loss = opd.supervise(self.student.hidden, self.student.head, teacher.head(self.teacher_params))
        self.update = optim.dense(self.loss, optimizer)
        self.state = optim.init_state(self.params, optimizer)
        length = jnp.full(len(prompts), prompts.shape[1], jnp.int32)
        self.batch = {"tokens": jnp.asarray(prompts), "length": length, "index": jnp.arange(len(prompts))}
        self.calls = 0

    def sample(self):
        self.calls += 1
        return jax.block_until_ready(self.answer(self.params, self.batch, jax.random.key(self.calls)))

    def step(self):
        self.calls += 1
        rollout = self.answer(self.state.params, self.batch, jax.random.key(self.calls))
        labels = self.label(self.teacher_params, rollout)
        self.state, metrics = self.update(self.state, rollout, labels, jax.random.key(0))
        return jax.block_until_ready(metrics)

    def value(self, tokens: np.ndarray) -> float:
        b, s = tokens.shape
        response = np.arange(s)[None] >= np.asarray(self.batch["length"])[:, None]
        zero, logp = jnp.zeros(b, jnp.int32), jnp.zeros((b, s))
        rollout = TokenRollout(jnp.asarray(tokens), jnp.asarray(response), zero + s, zero, zero, logp, logp, zero > 0)
        labels: TeacherStates = self.label(self.teacher_params, rollout)
        out = self.loss(self.params, rollout, labels, None)
        return float(out.total.sum() / out.weight.sum())


def torch_peer(paths, prompts, args):
    """Functions of nothing for `sample` and `step`, and the loss; None where torch or TRL is absent."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from trl.experimental.gkd import GKDTrainer
    except ImportError as problem:
        print(f"transformers and TRL left out: {problem}")
        return None
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    load = lambda name: AutoModelForCausalLM.from_pretrained(paths[name], dtype=kind).to(device)
    student, teacher = load("student"), load("teacher").eval()
    optimizer, given = torch.optim.AdamW(student.parameters(), lr=1e-5), torch.tensor(prompts, device=device).long()
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None

    def sample():
        with torch.no_grad():
            tokens = student.generate(
                given, attention_mask=torch.ones_like(given), do_sample=True, top_k=0, temperature=1.0, use_cache=True,
                max_new_tokens=args.new, min_new_tokens=args.new, pad_token_id=0,
            )  # fmt: skip
        sync()
        return tokens

    def loss(tokens):
        first = given.shape[1]
        with torch.no_grad():
            theirs = teacher(tokens).logits[:, first - 1 : -1]
        ours = student(tokens).logits[:, first - 1 : -1]
        labels = tokens[:, first:]
        return GKDTrainer.generalized_jsd_loss(ours, theirs, labels=labels, beta=1.0)

    def step():
        value = loss(sample())
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        sync()

    return {"sample": sample, "step": step}, lambda tokens: float(
        loss(torch.tensor(tokens, device=device).long()).detach()
    )


def timed(calls: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, in turns."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def flops_of_step(args, params, teacher_params) -> float:
    """Matrix products of one step by the rule of 2 per parameter and token: sampling, teacher, forward and backward."""
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    tokens = args.batch * (args.prompt + args.new)
    return 2 * tokens * (count(params) + count(teacher_params)) + 6 * tokens * count(params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("width", 128), ("layers", 4), ("vocabulary", 4096), ("batch", 32), ("prompt", 32), ("new", 64), ("repeats", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}; {vars(args)}")
    prompts = np.random.default_rng(0).integers(1, args.vocabulary, (args.batch, args.prompt)).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        paths = save_models(folder, args)
        ours, peer = Ours(paths, prompts, args), torch_peer(paths, prompts, args)
        tokens = np.asarray(ours.sample().tokens)
        values = {"ours": ours.value(tokens)} | ({"TRL": peer[1](tokens)} if peer else {})
        print("reverse_kl of one batch, nats per token:", ", ".join(f"{k} {v:.6f}" for k, v in values.items()))
        for what in ("sample", "step"):
            calls = {"ours": getattr(ours, what)} | ({"transformers + TRL": peer[0][what]} if peer else {})
            seconds = timed(calls, args.repeats)
            best = {name: args.batch * args.new / min(times) for name, times in seconds.items()}
            for name, times in seconds.items():
                line = f"{what:8}{name:22}{min(times):9.3f} s {np.median(times):9.3f} s {best[name]:11,.0f} tokens/s"
                print(line + f" {best[name] / best['ours']:8.2f}")
        flops = flops_of_step(args, ours.params, ours.teacher_params)
        kind = jax.devices()[0].device_kind
        peak = next((value for name, value in PEAK.items() if kind.startswith(name)), None)
        rate = flops / min(timed({"step": ours.step}, 2)["step"])
        print(f"step: {rate / 1e9:,.1f} GFLOP/s" + (f", {rate / peak:.1%} of peak" if peak else ""))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The fused linear divergence beside full logits in JAX, TRL's GKD loss and Liger's fused linear JSD in torch.

    python benchmarks/linear_divergence.py                 # about a minute on two idle cores
    pip install torch==2.13.0 trl && pip install --no-deps liger-kernel      # the peers, left out where absent

One loss, the Jensen-Shannon divergence of every token, summed, and its gradients by the student's hidden states and
head; the same numbers for all, in one process, in turns, so that other load falls on all alike. Columns: fastest and
median call in milliseconds, the fastest relative to ours, the memory a call needs beyond inputs and results, and the
relative error (2-norm) of both gradients against float64. Memory is what XLA has planned for JAX ("compiled"), and for
all the growth of the process while it runs, sampled (on a GPU: torch's own peak). `frozen` needs no gradient of the
head, which neither peer exploits. The last rows are the reverse KL, which needs one pass over the vocabulary, not two.
"""

import argparse
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.losses import divergences
from opd_jax.losses.linear_divergence import Options, linear_divergence

BETA = 0.5


def jax_candidates() -> dict[str, Callable]:
    def ours(kind, **options):
        settings = Options(BETA if kind == "generalized_jsd" else None, **options)
        return lambda x, w, y, u: linear_divergence(x, w, y, u, kind, options=settings).divergence.sum()

    def full(kind):
        parameter = BETA if kind == "generalized_jsd" else None
        return lambda x, w, y, u: divergences.divergence(x @ w, y @ u, kind, parameter).sum()

    return {
        "ours": ours("generalized_jsd"),
        "ours, frozen": ours("generalized_jsd", train_head=False),
        "full logits, JAX": full("generalized_jsd"),
        "ours, reverse_kl": ours("reverse_kl"),
        "full logits, JAX, reverse_kl": full("reverse_kl"),
    }


def torch_candidates(arrays: list[np.ndarray]) -> dict[str, Callable]:
    """Functions of nothing that return both gradients; a peer that is absent or fails says so in one line."""
    try:
        import torch
    except ImportError as problem:
        print(f"torch, TRL and Liger left out: {problem}")
        return {}
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    x, w, y, u = (torch.tensor(a, device=device) for a in arrays)
    weight, teacher_weight = w.T.contiguous(), u.T.contiguous()  # torch keeps [V, D]

    def gradients(loss):
        def call():
            hidden, head = x.detach().requires_grad_(), weight.detach().requires_grad_()
            loss(hidden, head).backward()
            return hidden.grad, head.grad.T

        return call

    def trl():
        from trl.experimental.gkd import GKDTrainer

        jsd = lambda s, t: GKDTrainer.generalized_jsd_loss(s[None], t[None], beta=BETA, reduction="sum")
        return lambda hidden, head: jsd(hidden @ head.T, (y @ teacher_weight.T).detach())

    def liger():
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=BETA, compiled=device == "cuda")
        labels = torch.zeros(len(x), dtype=torch.long, device=device)
        return lambda hidden, head: loss(hidden, head, y, teacher_weight, labels) * len(x)  # its own is a mean

    found = {}
    for name, make in {"TRL generalized_jsd_loss": trl, "Liger fused linear JSD": liger}.items():
        try:
            call = gradients(make())
            call()
            found[name] = call
        except Exception as problem:
            print(f"{name} left out: {type(problem).__name__}: {str(problem).splitlines()[0][:90]}")
    return found


def exact_gradients(kind: str, x, w, y, u) -> tuple[np.ndarray, np.ndarray]:
    """In float64, from the closed forms of the derivative by the logits."""
    logp = []
    for hidden, head in ((x, w), (y, u)):
        z = hidden.astype(np.float64) @ head.astype(np.float64)
        z -= z.max(-1, keepdims=True)
        logp.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
    student, teacher = logp
    p = np.exp(student)
    mixture = np.logaddexp(teacher + np.log(BETA), student + np.log(1 - BETA))
    slope = p * (student - teacher) if kind == "reverse_kl" else (1 - BETA) * p * (student - mixture)
    by_logits = slope - p * slope.sum(-1, keepdims=True)
    return by_logits @ w.T.astype(np.float64), x.T.astype(np.float64) @ by_logits


def growth(call: Callable) -> float:
    """MiB by which the resident memory of the process rises above its start in a call, sampled every millisecond."""
    pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])
    start, highest, done = pages(), [0], threading.Event()

    def watch():
        while not done.wait(1e-3):
            highest[0] = max(highest[0], pages() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    call()
    done.set()
    thread.join()
    return highest[0] * os.sysconf("SC_PAGE_SIZE") / 2**20


def torch_peak(call: Callable) -> float:
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--widths", type=int, nargs=2, default=(256, 384), metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--vocabulary", type=int, default=32_003)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    rng = np.random.default_rng(0)
    arrays = []
    for width in flags.widths:
        arrays += [rng.normal(size=(flags.tokens, width)), rng.normal(size=(width, flags.vocabulary)) / width**0.5]
    arrays = [a.astype(np.float32) for a in arrays]

    on_gpu = jax.default_backend() == "gpu"
    inputs, calls, planned = [jnp.asarray(a) for a in arrays], {}, {}
    for name, loss in jax_candidates().items():
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*inputs).compile()
        planned[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        calls[name] = lambda compiled=compiled: jax.block_until_ready(compiled(*inputs))
    calls |= torch_candidates(arrays)

    times, memory, error = {name: [] for name in calls}, {}, {}
    exact = {kind: exact_gradients(kind, *arrays) for kind in ("reverse_kl", "generalized_jsd")}
    for name, call in calls.items():
        expected = exact["reverse_kl" if "reverse_kl" in name else "generalized_jsd"]
        distance = lambda a, b: np.linalg.norm(np.asarray(a.cpu() if hasattr(a, "cpu") else a) - b) / np.linalg.norm(b)
        error[name] = [distance(a, b) for a, b in zip(call(), expected)]
        memory[name] = growth(call) if not on_gpu else float("nan") if name in planned else torch_peak(call)
    for _ in range(flags.rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if on_gpu and name not in planned:
                import torch

                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))

    logits = flags.tokens * flags.vocabulary * 4 / 2**20
    print(
        f"{flags.tokens} tokens, widths {flags.widths}, {flags.vocabulary} columns; one [tokens, V] is {logits:.0f} MiB"
    )
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'':30} {'fastest':>8} {'median':>8} {'ratio':>6} {'compiled':>9} {'grown':>6}  error: hidden, head")
    for name, values in times.items():
        ratio = min(values) / min(times["ours, reverse_kl" if "reverse_kl" in name else "ours"])
        plan = f"{planned[name]:9.0f}" if name in planned else f"{'':9}"
        head = "" if "frozen" in name else f"{error[name][1]:.1e}"
        print(
            f"{name:30} {min(values):8.0f} {np.median(values):8.0f} {ratio:6.2f} {plan} {memory[name]:6.0f}"
            f"  {error[name][0]:.1e} {head}",
            flush=True,
        )


if __name__ == "__main__":
    main()

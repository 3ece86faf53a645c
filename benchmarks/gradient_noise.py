# SPDX-License-Identifier: Apache-2.0
"""How much of a batch's gradient is noise: the sampled token's estimate, by its clip, beside the exact reverse KL.

    python experiments/main.py --config=configs/lightning_opd.py --workdir=runs/lightning
    python benchmarks/gradient_noise.py runs/lightning      # two minutes; what the run has made is not made again

At the SFT'd student and on its stored answers, where `offline` and `online` have one and the same gradient. Columns:
`agreement` is the cosine between the gradients of two batches that share no prompt, mean and standard deviation over
all such pairs of neighbours (1: no noise, 0: nothing but noise); `with exact` the cosine between the mean gradient over
all batches and that of the exact reverse KL; `norm` that of the mean, and `per batch` the mean norm of one batch's.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from configs import lightning_opd as lightning_config
from experiments import token_methods
from experiments.reasoning_stages import Experiment
from opd_jax import report, sharding
from opd_jax.losses import lightning_opd, opd
from opd_jax.teachers import lookup


def gradients(supervise, label, params, batches) -> np.ndarray:
    """The gradient of every batch's mean loss per token, `[batches, parameters]`."""

    def loss(params, batch, labels):
        out = supervise(params, batch, labels, None)
        return out.total.sum() / out.weight.sum()

    grad = jax.jit(lambda *given: ravel_pytree(jax.grad(loss)(*given))[0])
    return np.stack([grad(params, batch, label(batch)) for batch in batches])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--batch", type=int, default=128, help="answers in a batch")
    parser.add_argument("--batches", type=int, default=32)
    args = parser.parse_args()
    if not (args.workdir / "stages").is_dir():
        parser.error(f"{args.workdir}: holds no stages; give the workdir of a run of configs/lightning_opd.py")

    config, answers = lightning_config.get_config(), args.batch * args.batches
    if answers > config.problems.count:
        parser.error(f"{answers} answers: batches would share prompts; ask for {config.problems.count} or fewer")
    mesh = sharding.make_mesh(config.mesh)
    experiment = Experiment(config, args.workdir, mesh)
    student, own = experiment.student, experiment.teachers["own"]
    params = experiment.place(experiment.sft("own", 0).params)
    source = experiment.stored(experiment.rollouts("own", "own", 0), args.batch, 0)
    batches = [next(source) for _ in range(args.batches)]

    stored = lambda batch: lookup.labels(None, batch)
    sampled = lambda clip: lightning_opd.supervise(student.hidden, head_fn=student.head, clip=clip)
    exact = opd.supervise(student.hidden, student.head, own.model.head(own.params), divergence="reverse_kl")
    states = token_methods.states_of(own.model)
    found = {"exact reverse_kl": gradients(exact, lambda batch: states(own.params, batch), params, batches)}
    found |= {f"sampled, clip {clip:g}": gradients(sampled(clip), stored, params, batches) for clip in (10.0, 1.0, 0.3)}

    rows = []
    for name, each in found.items():
        agreement = [cosine(a, b) for a, b in zip(each[::2], each[1::2])]
        rows.append({
            "gradient": name,
            "agreement": report.Estimate(float(np.mean(agreement)), float(np.std(agreement, ddof=1))),
            "with exact": cosine(each.mean(0), found["exact reverse_kl"].mean(0)),
            "norm": float(np.linalg.norm(each.mean(0))),
            "per batch": float(np.linalg.norm(each, axis=1).mean()),
        })  # fmt: skip
    print(report.format_table(rows))
    advantage = np.concatenate([np.asarray((b.teacher_logp - b.reference_logp)[b.response]) for b in batches])
    low = ", ".join(f"{share:g}% below {np.percentile(advantage, share):.2f}" for share in (1, 2, 5))
    print(f"\nteacher - student log-probability of {advantage.size:,} tokens, nats: {low}, mean {advantage.mean():.3f}")


if __name__ == "__main__":
    main()

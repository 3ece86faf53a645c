"""Standard on-policy distillation of language models, online: which divergence, at every token of an answer.

    python experiments/main.py --config=configs/opd.py            # from shipped models; 10 minutes on two cores
    python experiments/main.py --config=configs/opd.py:tiny       # every stage, a few steps

The exact divergences of GKD (arXiv:2306.13649) over the whole vocabulary beside the sampled token of Lightning OPD's
online baseline (arXiv:2604.13010, eq. 3). Wall time, machine and the numbers to expect: `docs/results.md`.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("default", "tiny", "seeds")


def get_config(arg: str | None = None) -> ConfigDict:
    variant = common.variant(arg, VARIANTS)
    config = common.language_experiment()
    config.arms = {
        "online": {"divergence": "sampled"},
        "reverse_kl": {"divergence": "reverse_kl"},
        "forward_kl": {"divergence": "forward_kl"},
        "jsd": {"divergence": "generalized_jsd", "parameter": 0.5},
        "off_policy": {"method": "off_policy"},
    }
    {"tiny": common.tiny_language, "seeds": _seeds}.get(variant, lambda _: None)(config)
    return config.lock()


def _seeds(config: ConfigDict) -> None:
    config.seeds = (0, 1, 2)

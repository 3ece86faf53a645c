"""The stages of Uni-OPD, each made once: how often the student solves each prompt, students, and their scores."""

import functools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np

from experiments import language, reasoning_stores, stages, token_methods, uni_methods, uni_setup
from experiments.reasoning_stages import sampling_params
from experiments.recipes import arm_recipe
from experiments.uni_setup import Model, Setup
from opd_jax import hosts, rng, sharding
from opd_jax.config import command_line, write_atomic
from opd_jax.losses.balancing import balance_offline
from opd_jax.losses.lightning_opd import LightningLabels
from opd_jax.models.decoder import Decoder
from opd_jax.models.hf import save_decoder, save_vlm
from opd_jax.sampling.tokens import SamplingParams
from opd_jax.teachers import lookup, store


class Experiment:
    """The stages of a config on a setup."""

    def __init__(self, config, setup: Setup, workdir: Path, mesh):
        self.config, self.setup, self.workdir, self.mesh = config, setup, workdir, mesh
        self.about = {"command": command_line()}
        self.where = {"slots": config.sampler.slots, "mesh": mesh}
        self.failures: Counter = Counter()  # why outcomes are unknown
        self.methods, self.scored = {}, {}

    def sampler(self, part) -> SamplingParams:
        own = self.setup.language
        return sampling_params(part, self.config.sampler.max_new_tokens, own.stop_ids, own.pad_id)

    def of_domains(self, names, problems: language.Problems) -> list[np.ndarray]:
        """Indices of the problems of each domain."""
        return [np.flatnonzero(np.asarray(problems.tasks) == self.setup.domains.index(name)) for name in names]

    @functools.cached_property
    def asked(self) -> str:
        return stages.recipe_of([ids.tolist() for ids in self.setup.problems.ids])

    def teachers(self, setting: str) -> dict[int, Model]:
        """By task."""
        pairs = self.config.settings[setting].items()
        return {self.setup.domains.index(domain): self.setup.load(teacher) for domain, teacher in pairs}

    def judge(self, teachers: dict[int, Model], problems: language.Problems, exact: bool, parts: int = 1):
        keep = self.workdir / "unscored"
        said = {task: uni_methods.reader(teacher, exact, keep, parts) for task, teacher in teachers.items()}
        return uni_methods.judge(said, self.setup.language, problems, self.mesh, self.failures, exact)

    # ---- stages ----

    def solved(self) -> np.ndarray:
        """How often the student solves each problem, of `balancing.samples` answers; -1 where that is unknown."""
        part, how, setup = self.config.balancing, self.sampler(self.config.balancing), self.setup
        recipe = stages.recipe_of({"how": how._asdict(), "samples": part.samples}, self.asked, setup.student.sha256)
        path = self.workdir / "stages" / f"solved-{recipe[:12]}.json"
        if not path.exists():
            key, student = rng.stream(self.config.problems.seed, "solved"), setup.student
            where = self.where | {"samples": part.samples}
            rollout = language.answer_all(
                student.functions, student.params, setup.problems, setup.room, how, key, **where
            )
            outcome = language.outcomes(setup.language, setup.problems, rollout).reshape(-1, part.samples)
            counts = np.where(np.isnan(outcome).any(1), -1, outcome.sum(1)).astype(int)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(counts.tolist()))
            hosts.wait("solved counts are written")
        return np.asarray(json.loads(path.read_text()))

    def chosen(self, recipe) -> list[list[int]]:
        """The problems that an arm asks, of each domain of its setting, some of them repeatedly."""
        indices = self.of_domains(self.config.settings[recipe.setting], self.setup.problems)
        if not recipe.upsample:
            return [some.tolist() for some in indices]
        counts, part = self.solved(), self.config.balancing
        balance = lambda some: balance_offline(some.tolist(), counts[some].tolist(), part.samples, part.shape, part.cap)
        return [balance(some).prompts for some in indices]

    def arm(self, name: str, seed: int) -> stages.Made:
        """One student."""
        recipe, how = arm_recipe(self.config, name), self.sampler(self.config.sampler)
        setup, student, teachers = self.setup, self.setup.student, self.teachers(recipe.setting)
        upstream = [self.asked, student.sha256, *(f"{task}:{one.sha256}" for task, one in sorted(teachers.items()))]
        settings, chosen = {"arm": recipe.to_dict(), "seed": seed, "how": how._asdict()}, self.chosen(recipe)
        if recipe.method == "offline":
            stored = self.stored(name, recipe, chosen, teachers, upstream, seed)
            batches = self.stored_batches(stored, recipe, seed)
        else:
            batches = uni_methods.bundles(setup.problems, chosen, recipe.batch_size, setup.room, seed, self.mesh)
        exact = recipe.divergence != "sampled" and recipe.method == "uni_opd"
        judge = lambda: self.judge(teachers, setup.problems, exact, recipe.label_parts)
        new = {
            "uni_opd": lambda: uni_methods.online(student.functions, teachers, judge(), how, recipe),
            "offline": lambda: uni_methods.offline(student.functions, recipe),
            "grpo": lambda: token_methods.grpo(student.functions, setup.language, setup.problems, how, recipe),
        }[recipe.method]
        if name not in self.methods:  # one for all seeds
            self.methods[name] = new()
        return stages.trained(
            f"{name}_seed{seed}",
            self.workdir,
            stages.recipe_of(settings | {"chosen": chosen}, *upstream),
            self.methods[name],
            student.params,
            batches,
            recipe,
            seed,
            place=functools.partial(uni_setup.place, mesh=self.mesh),
            about=self.about,
            offload=self.config.compute.offload,
            save_every=self.config.save_every,
        )

    def stored(self, name: str, recipe, chosen, teachers, upstream, seed: int) -> store.Store:
        """The student's answers to as many prompts as an offline arm uses, labelled and verified once."""
        setup, how = self.setup, self.sampler(self.config.sampler)
        count = math.ceil(recipe.steps * recipe.batch_size / len(chosen))
        mixed = [np.random.default_rng((seed, i)).permutation(some) for i, some in enumerate(chosen)]
        indices = [int(some[i % len(some)]) for i in range(min(count, max(map(len, chosen)))) for some in mixed]
        problems = language.Problems(*([column[i] for i in indices] for column in setup.problems))
        judge = self.judge(teachers, problems, False)

        def label(rollout):
            judged = judge(None, rollout)
            return LightningLabels(judged.teacher_logp, rollout.behavior_logp, judged.outcome)

        key = stages.recipe_of({"how": how._asdict(), "seed": seed, "group": recipe.group, "asked": indices}, *upstream)
        teacher = stages.recipe_of({}, *upstream)
        about = store.About(teacher, teacher, setup.student.sha256, setup.language.fingerprint, how._asdict())
        directory, student = self.workdir / "stores" / f"{name}_seed{seed}-{key[:12]}", setup.student
        where = self.where | {"samples": recipe.group}
        reasoning_stores.write(
            directory, f"{name}_answers_seed{seed}", about, problems, setup.room, self.config.shard,
            student.functions, student.params, how, label, seed, **where,
        )  # fmt: skip
        return store.open_store(directory, tokenizer=setup.language.fingerprint)

    def stored_batches(self, stored: store.Store, recipe, seed: int):
        place = functools.partial(sharding.shard_batch, mesh=self.mesh)
        length = self.setup.room + self.config.sampler.max_new_tokens
        return lookup.batches(
            stored, recipe.batch_size * recipe.group, seed, buckets=(length,), place=place, whole_groups=True
        )

    # ---- scores ----

    def score(self, model: Model, params, names, seed: int = 0) -> dict[str, np.ndarray]:
        """Outcomes of the held-out problems of each domain."""
        setup, indices = self.setup, self.of_domains(names, self.setup.held_out)
        few = np.concatenate(indices)
        asked = language.Problems(*([column[i] for i in few] for column in setup.held_out))
        key, how = rng.stream(self.config.eval.seed + seed, "evaluation"), self.sampler(self.config.eval)
        params = uni_setup.place(params, self.mesh)
        rollout = language.answer_all(model.functions, params, asked, setup.room, how, key, **self.where)
        found = language.verdicts(setup.language, asked, rollout)
        self.failures.update(found.failures)
        return dict(zip(names, np.split(found.outcome, np.cumsum([len(some) for some in indices])[:-1])))

    def score_of_teachers(self, setting: str) -> dict[str, np.ndarray] | None:
        """Each domain's own teacher; None where one is behind a server, which labels and does not answer."""
        pairs = self.config.settings[setting].items()
        teachers = {pair: self.setup.load(pair[1]) for pair in pairs}
        if any(teacher.server is not None for teacher in teachers.values()):
            return None
        for (domain, name), teacher in teachers.items():
            if (domain, name) not in self.scored:
                self.scored[domain, name] = self.score(teacher, teacher.params, [domain])[domain]
        return {domain: self.scored[domain, name] for domain, name in pairs}

    def export(self, name: str, made: stages.Made) -> None:
        """A student as a Hugging Face directory, where it came from one."""
        directory, like = self.workdir / "models" / name, self.config.student.path
        if like:
            module = self.setup.student.module
            save = save_decoder if isinstance(module, Decoder) else save_vlm
            hosts.by_first(lambda: directory.exists() or save(module, made.params, directory, like=like))


def order_violations(lines: list[dict]) -> tuple[float, float]:
    """Share of answers in groups with both outcomes whose teacher disagrees with the verifier, at the start and end."""
    fifth = max(len(lines) // 5, 1)
    rate = lambda part: sum(x["order_violation"] for x in part) / max(sum(x["mixed"] for x in part), 1e-9)
    return rate(lines[:fifth]), rate(lines[-fifth:])

"""The stages of an experiment on language models, each made once and kept under the hash of all it depends on.

A teacher's answers -> SFT of the student -> its rollouts, labelled once -> students. Online arms skip the rollouts.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax

from experiments import language, reasoning_stores, stages, token_methods
from experiments.reasoning_stores import Teacher
from experiments.recipes import arm_recipe
from opd_jax import hosts, rng, sharding
from opd_jax.checkpoint import params_sha256
from opd_jax.config import ConfigError, command_line
from opd_jax.models.decoder import partition_rules
from opd_jax.models.hf import check_same_tokenizer, save_decoder
from opd_jax.sampling.tokens import SamplingParams
from opd_jax.teachers import lookup, store


def sampling_params(part, max_new_tokens: int, stop_ids: tuple[int, ...], pad_id: int) -> SamplingParams:
    own = {name: part[name] for name in ("temperature", "top_k", "top_p")}
    return SamplingParams(max_new_tokens, stop_ids, pad_id=pad_id, **own)


class Scored(NamedTuple):
    """What a model did on the held-out problems."""

    scores: dict[str, float]
    texts: list[str]


class Experiment:
    """The models, the problems and the stages, each made once."""

    def __init__(self, config, workdir: Path, mesh):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.about = {"command": command_line()}
        self.room = config.problems.prompt_tokens
        if config.problems.path:
            self.load_directories()
        else:
            self.load_world()
        for name, part in config.teachers.items():
            if part.url:
                known = self.teachers.get(name)
                self.teachers[name] = reasoning_stores.served_teacher(name, part, known, self.problems["opd"].ids[0])
        self.sampler = functools.partial(
            sampling_params,
            max_new_tokens=config.sampler.max_new_tokens,
            stop_ids=self.language.stop_ids,
            pad_id=self.language.pad_id,
        )
        self.where = {"slots": config.sampler.slots, "mesh": mesh}
        self.methods = {}

    def load_world(self) -> None:
        """The embedded problems and the shipped models."""
        config, draw = self.config, language.reasoning_problems
        self.language = language.reasoning_language()
        self.module, start = reasoning_stores.world_model("student", config.student)
        self.start, self.start_sha = start, params_sha256(start)
        self.teachers = {}
        for name, part in config.teachers.items():
            module, params = reasoning_stores.world_model("teacher" if name == "own" else name, part)
            self.teachers[name] = self.local_teacher(name, module, params)
        levels, seed = config.problems.levels, config.problems.seed
        self.problems = {
            "sft": draw(config.sft.answers, seed, levels),
            "opd": draw(config.problems.count, seed + 1, levels),
            "eval": draw(config.eval.problems, config.eval.seed, levels, test=config.eval.held_out),
        }
        longest = max(len(ids) for problems in self.problems.values() for ids in problems.ids)
        if longest > self.room:
            raise ConfigError(f"problems.prompt_tokens={self.room}: the longest prompt has {longest}; give so many")
        self.student = self.functions(self.module)

    def load_directories(self) -> None:
        """A user's models and problems."""
        config, part = self.config, self.config.problems
        for teacher in config.teachers.values():
            if teacher.path:
                check_same_tokenizer(config.student.path, teacher.path)
        tokenizer = language.load_tokenizer(config.student.path)
        self.language = language.directory_language(config.student.path, tokenizer)
        read = functools.partial(
            language.read_problems, tokenizer=tokenizer, template=part.template, chat=part.chat, room=self.room
        )
        self.problems = {
            "sft": read(config.sft.path or part.path, limit=config.sft.answers or None),
            "opd": read(part.path, limit=part.count or None),
            "eval": read(config.eval.path, limit=config.eval.problems or None),
        }
        self.module, self.start = language.load_directory(config.student.path, self.mesh, config.compute, trained=True)
        self.start_sha = params_sha256(self.start)
        self.student = self.functions(self.module)
        self.teachers = {}
        for name, one in config.teachers.items():
            if one.path:
                loaded = language.load_directory(one.path, self.mesh, config.compute)
                self.teachers[name] = self.local_teacher(name, *loaded)

    def local_teacher(self, name: str, module, params) -> Teacher:
        model = self.functions(module)
        return Teacher(name, params_sha256(params), model, self.place(params), None)

    def functions(self, module) -> language.LanguageModel:
        return language.functions(module, self.language.vocab_size, self.config.compute.sampling_copy)

    def place(self, tree):
        """Parameters, or a state that holds trees of them, by the rules of the decoder."""
        return sharding.shard_params(tree, self.mesh, partition_rules(self.mesh))

    # ---- stages ----

    def answers(self, teacher: str) -> store.Store:
        """The teacher's answers to the SFT problems, with its log-probs."""
        own = self.teachers[teacher]
        how = self.sampler(self.config.sft)
        recipe = stages.recipe_of({"how": how._asdict(), "problems": self.asked("sft")}, own.identity)
        about = store.About(own.identity, own.identity, own.identity, self.language.fingerprint, how._asdict())
        label = lambda rollout: lookup.LightningLabels(rollout.behavior_logp)
        return self.write_store(f"answers_{teacher}", recipe, about, "sft", own.model, own.params, how, label, 0)

    def sft(self, teacher: str, seed: int) -> stages.Made:
        """The student after SFT on a teacher's answers: the reference of all arms of this teacher."""
        part = self.config.sft
        if not part.steps:
            return stages.Made(self.start, self.start_sha, self.start_sha, 0.0, 0)
        answers = self.answers(teacher)
        batches = self.stored(answers, part.batch_size, seed)
        method = self.method(("sft",), part, lambda: token_methods.sft(self.student, part))
        upstream = (self.start_sha, answers.manifest.about.teacher, store_id(answers))
        recipe = stages.recipe_of({"sft": part.to_dict(), "seed": seed}, *upstream)
        return self.train(f"sft_{teacher}_seed{seed}", recipe, method, self.start, batches, part, seed)

    def rollouts(self, sft: str, teacher: str, seed: int, residual: bool = False) -> store.Store:
        """One answer of the SFT'd student per problem, with the teacher's and its own log-probs, and the outcome."""
        reference, own, how = self.sft(sft, seed), self.teachers[teacher], self.sampler(self.config.sampler)
        wrote = self.teachers[sft].identity
        about = store.About(own.identity, wrote, reference.sha256, self.language.fingerprint, how._asdict())
        recipe = stages.recipe_of(
            {"how": how._asdict(), "problems": self.asked("opd"), "seed": seed}, reference.sha256, own.identity, wrote
        )
        params, name = self.place(reference.params), f"rollouts_{sft}_{teacher}_seed{seed}"
        label = functools.partial(self.label, own, params)
        made = self.write_store(name, recipe, about, "opd", self.student, params, how, label, seed)
        if not residual:
            return made
        directory = made.directory.with_name(f"residual_{made.directory.name}")
        if not (directory / "manifest.json").exists():
            lookup.write_residual(made, directory)
        return store.open_store(directory, tokenizer=self.language.fingerprint)

    def label(self, teacher: Teacher, reference, rollout) -> lookup.LightningLabels:
        logp = token_methods.logp_of_many(self.student, reference, rollout, **self.where)
        taught = reasoning_stores.logp_by(teacher, rollout, self.workdir, **self.where)
        outcome = language.outcomes(self.language, self.problems["opd"], rollout)
        return lookup.LightningLabels(taught, logp, outcome)

    def write_store(self, name, recipe, about, which: str, *model_and_more) -> store.Store:
        directory = self.workdir / "stores" / f"{name}-{recipe[:12]}"
        reasoning_stores.write(
            directory, name, about, self.problems[which], self.room, self.config.shard, *model_and_more, **self.where
        )
        return store.open_store(directory, tokenizer=self.language.fingerprint)

    def asked(self, which: str) -> str:
        return stages.recipe_of([ids.tolist() for ids in self.problems[which].ids], *self.problems[which].answers)

    def stored(self, source: store.Store, batch_size: int, seed: int):
        place = lambda batch: sharding.shard_batch(batch, self.mesh)
        length = self.room + self.config.sampler.max_new_tokens
        return lookup.batches(source, batch_size, seed, buckets=(length,), place=place)

    def method(self, kind: tuple, recipe, new):
        """A method with its optimiser, made once for all seeds and for arms that differ elsewhere."""
        elsewhere = ("sft", "teacher", "method", "residual", "allow_inconsistent_teacher")
        shared = stages.recipe_of({k: v for k, v in recipe.to_dict().items() if k not in elsewhere}, *map(str, kind))
        if shared not in self.methods:
            self.methods[shared] = new()
        return self.methods[shared]

    def arm(self, name: str, seed: int) -> stages.Made:
        """One student of the table."""
        config, recipe = self.config, arm_recipe(self.config, name)
        reference, teacher = self.sft(recipe.sft, seed), self.teachers[recipe.teacher]
        upstream, problems, how = [reference.sha256], self.problems["opd"], self.sampler(config.sampler)
        online = lambda: token_methods.prompts(problems, recipe.batch_size, self.room, seed, self.mesh)
        settings = {"arm": recipe.to_dict(), "seed": seed}
        if recipe.method in ("lightning", "off_policy", "sft"):
            offline = recipe.method == "lightning"
            rollouts = self.rollouts(recipe.sft, recipe.teacher, seed, recipe.residual) if offline else None
            source = rollouts or self.answers(recipe.teacher)
            if offline:
                allowed = recipe.allow_inconsistent_teacher or config.allow_inconsistent_teacher
                store.check_consistency(source.manifest, allowed)
            batches, upstream = self.stored(source, recipe.batch_size, seed), [*upstream, store_id(source)]
        else:
            batches, upstream = online(), [*upstream, self.asked("opd")]
            settings["how"] = how._asdict()
        if recipe.method in ("online", "off_policy"):
            upstream.append(teacher.identity)
        new = {
            "online": functools.partial(self.online, teacher, how, recipe),
            "lightning": lambda: token_methods.lightning(self.student, recipe),
            "off_policy": lambda: token_methods.off_policy(self.student, teacher.model, teacher.params, recipe),
            "grpo": lambda: token_methods.grpo(self.student, self.language, problems, how, recipe),
            "sft": lambda: token_methods.sft(self.student, recipe),
        }[recipe.method]
        taught = recipe.teacher if recipe.method in ("online", "off_policy") else ""
        method = self.method((recipe.method, taught), recipe, new)
        recipe_hash, params = stages.recipe_of(settings, *upstream), teacher.params
        return self.train(f"{name}_seed{seed}", recipe_hash, method, reference.params, batches, recipe, seed, params)

    def online(self, teacher: Teacher, how: SamplingParams, recipe):
        if teacher.server is None:
            return token_methods.online(self.student, teacher.model, teacher.params, how, recipe)
        return token_methods.remote_online(self.student, teacher.server, self.workdir / "unscored", how, recipe)

    def train(self, stage, recipe_hash, method_and_optimizer, start, batches, part, seed, teacher_params=None):
        return stages.trained(
            stage,
            self.workdir,
            recipe_hash,
            method_and_optimizer,
            start,
            batches,
            part,
            seed,
            place=self.place,
            about=self.about,
            offload=self.config.compute.offload,
            teacher_params=teacher_params,
            save_every=self.config.save_every,
        )

    # ---- scores ----

    def score(self, params) -> Scored:
        """A student on held-out problems, and its distance to the teacher `own` at the tokens of its answers."""
        scored, rollout = self.answers_of(self.student, params := self.place(params))
        own = self.teachers["own"]
        distance = {} if own.model is None else {"reverse_kl ↓": self.distance(params, own, rollout)}
        return scored._replace(scores=scored.scores | distance)

    def score_of_teacher(self, teacher: Teacher) -> Scored:
        return self.answers_of(teacher.model, teacher.params)[0]

    def answers_of(self, model, params):
        how, key = self.sampler(self.config.eval), rng.stream(self.config.eval.seed, "evaluation")
        rollout = language.answer_all(model, params, self.problems["eval"], self.room, how, key, **self.where)
        scores = language.summary(self.language, self.problems["eval"], rollout)
        return Scored(scores, language.completions(self.language, rollout)), rollout

    def distance(self, params, teacher: Teacher, rollout) -> float:
        """KL(student || teacher) in nats per token."""
        size, count = self.config.sampler.slots, len(rollout.length)
        if ("distance", teacher.name) not in self.methods:
            own = token_methods.exact(self.student, teacher.model, teacher.params, "reverse_kl")
            self.methods["distance", teacher.name] = functools.partial(token_methods.supervised, own)
        label = token_methods.states_of(teacher.model)
        total = weight = 0.0
        for first in range(0, count - count % size or count, size):
            part = jax.tree.map(lambda leaf, i=first: leaf[i : i + size], rollout)
            part = sharding.shard_batch(part, self.mesh) if len(part.length) == size else part
            out = self.methods["distance", teacher.name](params, part, label(teacher.params, part))
            total, weight = total + float(out.total.sum()), weight + float(out.weight.sum())
        return total / max(weight, 1.0)

    def export(self, name: str, made: stages.Made) -> None:
        """A student as a Hugging Face directory, where it came from one."""
        directory = self.workdir / "models" / name
        if like := self.config.student.path:
            hosts.by_first(lambda: directory.exists() or save_decoder(self.module, made.params, directory, like=like))


def store_id(source: store.Store) -> str:
    return stages.recipe_of([shard.sha256 for shard in source.manifest.shards])

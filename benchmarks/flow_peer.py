# SPDX-License-Identifier: Apache-2.0
"""Flow-OPD's rollout and step in plain PyTorch, on diffusers' transformer: the peer of `flow_step.py`.

Written from the papers' formulas and diffusers' scheduler, with nothing of ours but the weights and the states that
both sides learn from. Latents are NCHW here. Every teacher is asked for the records of its task; adapters are beside
the frozen weights, as PEFT has them.
"""

import diffusers
import numpy as np
import torch
from torch import nn


class Adapted(nn.Module):
    """A frozen Linear with adapters, of which `worn` counts: y = W x + scale * B (A x)."""

    def __init__(self, linear: nn.Linear, pairs: list[tuple[np.ndarray, np.ndarray]], scale: float):
        super().__init__()
        self.linear, self.scale, self.worn = linear, scale, 0
        own = lambda matrix: nn.Parameter(torch.tensor(np.asarray(matrix, np.float32)))
        self.a = nn.ParameterList(own(a) for a, _ in pairs)
        self.b = nn.ParameterList(own(b) for _, b in pairs)

    def forward(self, x):
        a, b = (factors[self.worn].to(x.dtype) for factors in (self.a, self.b))
        return self.linear(x) + self.scale * (x @ a @ b)


class Torch:
    """Student and teachers on one transformer; adapter 0 is the student's, 1 + i that of task i.

    Args:
        directory: of the transformer, as diffusers reads it.
        adapters: by module name, a pair `(a [in, r], b [r, out])` for each of them.
        prompts: context `[B, L, E]` and pooled `[B, P]`, and those of the empty prompt, `[1, ...]`.
        task: of every record, `[B]`.
        settings: steps, shift, level, guidance, scale, micro_batches, remat, compile, dtype, cuda.
    """

    def __init__(self, directory: str, adapters: dict, prompts: tuple, null: tuple, task: np.ndarray, settings):
        self.s, self.device = settings, "cuda" if settings.cuda else "cpu"
        self.dtype = getattr(torch, settings.dtype)
        model = diffusers.SD3Transformer2DModel.from_pretrained(directory, torch_dtype=self.dtype)
        model.requires_grad_(False)
        self.wearing = []
        for name, pairs in adapters.items():
            parent, _, last = name.rpartition(".")
            adapted = Adapted(model.get_submodule(name), pairs, settings.scale)
            setattr(model.get_submodule(parent), last, adapted)
            self.wearing.append(adapted)
        self.own = [factor for one in self.wearing for factor in (one.a[0], one.b[0])]
        for one in self.wearing:
            for factor in (*one.a[1:], *one.b[1:]):
                factor.requires_grad_(False)
        model = model.to(self.device)
        if settings.remat:
            model.enable_gradient_checkpointing()
            model.train()
        self.model = torch.compile(model) if settings.compile else model
        self.optimizer = torch.optim.AdamW(self.own, lr=1e-4, fused=settings.cuda)
        place = lambda x: torch.tensor(np.asarray(x, np.float32), device=self.device)
        self.prompts = [place(x).to(self.dtype) for x in prompts]
        self.null = [place(x).to(self.dtype) for x in null]
        self.task = torch.tensor(np.asarray(task), device=self.device)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=settings.shift)
        scheduler.set_timesteps(settings.steps)
        self.times = scheduler.sigmas.float().to(self.device)  # steps + 1, from 1 to 0
        self.states = None

    def learn_from(self, states: np.ndarray) -> None:
        """Paths `[B, T + 1, H, W, C]`, the batch of `update`."""
        self.states = torch.tensor(np.asarray(states), device=self.device).permute(0, 1, 4, 2, 3).contiguous()

    def velocity(self, adapter: int, x, t, prompts):
        """With guidance, both halves in one batch; x `[N, C, H, W]`, t `[N]`."""
        for one in self.wearing:
            one.worn = adapter
        guided = self.s.guidance != 1
        if guided:
            x, t = torch.cat([x, x]), torch.cat([t, t])
            prompts = [torch.cat([n.expand_as(p), p]) for n, p in zip(self.null, prompts)]
        context, pooled = prompts
        v = self.model(x.to(self.dtype), context, pooled, 1000 * t, return_dict=False)[0].float()
        if guided:
            without, asked = v.chunk(2)
            v = without + self.s.guidance * (asked - without)
        return v

    def coefficients(self):
        """Of every step: what state and velocity count in the mean, and the noise (Flow-GRPO, 2505.05470)."""
        t, after = self.times[:-1], self.times[1:]
        dt = after - t
        spread = self.s.level * torch.sqrt(t / torch.where(t < 1, 1 - t, 1 - after))
        drift = spread**2 / (2 * t) * dt
        return 1 + drift, dt + drift * (1 - t), spread * torch.sqrt(-dt)

    @torch.no_grad()
    def sample(self):
        state, change, noise = self.coefficients()
        channels, height, width = self.shape()
        x = torch.randn(len(self.task), channels, height, width, device=self.device)
        path = [x]
        for i in range(self.s.steps):
            v = self.velocity(0, x, self.times[i].expand(len(x)), self.prompts)
            x = state[i] * x + change[i] * v + noise[i] * torch.randn_like(x)
            path.append(x)
        self.sync()
        return torch.stack(path, 1)

    def shape(self):
        return self.states.shape[2:]

    def update(self, states=None) -> float:
        """The loss of the batch before the step: weighted velocity errors, the mean over records and counted steps."""
        states, counted = self.states if states is None else states, self.s.steps - 1  # but the last
        _, change, noise = self.coefficients()
        weights = (change**2 / (2 * noise**2))[:counted]
        weights = weights / weights.mean()
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for rows in torch.arange(len(states), device=self.device).chunk(self.s.micro_batches):
            loss = self.errors(states[rows, :counted], rows, weights).sum() / (len(states) * counted)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.own, 1.0)
        self.optimizer.step()
        self.sync()
        return float(total)

    def errors(self, states, rows, weights):
        """`w_t mean (v_S - v_T)^2` at every state of these records, the teacher that of a record's task."""
        steps, times = states.shape[1], self.times[: states.shape[1]]
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        prompts = lambda which: [p[which].repeat_interleave(steps, 0) for p in self.prompts]
        teacher = torch.zeros_like(states)
        with torch.no_grad():
            for task in self.task[rows].unique().tolist():
                mine = self.task[rows] == task
                asked = flat(states[mine]), times.repeat(int(mine.sum())), prompts(rows[mine])
                teacher[mine] = self.velocity(1 + task, *asked).reshape(states[mine].shape)
        student = self.velocity(0, flat(states), times.repeat(len(rows)), prompts(rows)).reshape(states.shape)
        return weights * ((student - teacher) ** 2).mean((2, 3, 4))

    def step(self):
        return self.update(self.sample())

    def sync(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

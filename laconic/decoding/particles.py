"""Sequential Monte Carlo under a constraint: particles that write side by side, are weighed, and are drawn anew by their weights.

The cache holds one row per particle that is still writing; resampling copies rows.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from laconic.decoding.base import SampleMethod, Setting
from laconic.decoding.constraints import Constraint, State
from laconic.decoding.engine import drafting
from laconic.decoding.runner import Runner
from laconic.decoding.sampling import Sampling, Text
from laconic.decoding.tree import DraftTree
from laconic.errors import LaconicError
from laconic.hooks import apply
from laconic.method import parameter
from laconic.recipe import Recipe


@dataclass(frozen=True)
class Draw:
    """One token that is ok, or None; the log of its weight, -inf without a token; how many tokens were checked for it."""

    token: int | None
    weight: float
    checks: int

    def plus(self, log: float) -> Draw:
        return dataclasses.replace(self, weight=self.weight + log)


@dataclass(frozen=True, kw_only=True)
class ParticleMethod(SampleMethod):
    """Base of methods that draw tokens under a constraint: ``laconic.decoding.particles.sample`` runs them."""

    guarantee: ClassVar[str] = "properly weighted"
    entry: ClassVar[str] = "laconic.decoding.particles.sample"

    particles: int = parameter(10, "texts that are written side by side", least=1)
    ess_threshold: float = parameter(0.5, "resample below this share of effective particles; 0 never", least=0.0)
    proper_weights: bool = parameter(True, "weigh particles; without, the law is that of local masking")

    def draw(
        self, logs: torch.Tensor, states: Sequence[State], constraint: Constraint, generator: torch.Generator
    ) -> list[Draw]:  # fmt: skip
        """The next token of each particle.

        Args:
            logs: float64 ``(particles, vocabulary)`` log probabilities.
        """
        raise NotImplementedError


@dataclass
class Particles:
    """What ``sample`` made.

    Attributes:
        rows: new tokens of each particle, the end as the last. log_weights: of each, -inf for one that failed.
        checks: tokens that were tested; tokens: that were drawn; forwards: of the model.
        check_s: time spent on drawing and checking; model_s: on the model.
        resampled: how often particles were drawn anew. evidence: log of the estimated probability that a text of the model
            satisfies the constraint within the length.
    """

    rows: list[list[int]]
    log_weights: torch.Tensor
    checks: int = 0
    tokens: int = 0
    forwards: int = 0
    check_s: float = 0.0
    model_s: float = 0.0
    resampled: int = 0

    @property
    def satisfied(self) -> bool:
        """Whether any particle ended as the constraint asks."""
        return bool((self.log_weights > -math.inf).any())

    @property
    def evidence(self) -> float:
        return float(self.log_weights.logsumexp(0)) - math.log(len(self.rows))

    @property
    def weights(self) -> torch.Tensor:
        """Of each particle, with sum 1; all 0 where none satisfies the constraint."""
        return self.log_weights.softmax(0) if self.satisfied else torch.zeros_like(self.log_weights)

    @property
    def posterior(self) -> dict[tuple[int, ...], float]:
        """Probability of each different text, the likeliest first, of those that satisfy the constraint."""
        mass: dict[tuple[int, ...], float] = {}
        for row, weight in zip(self.rows, self.weights.tolist(), strict=True):
            if weight > 0:
                mass[tuple(row)] = mass.get(tuple(row), 0.0) + weight
        return dict(sorted(mass.items(), key=lambda item: -item[1]))

    @property
    def best(self) -> list[int] | None:
        """The likeliest text; None where all failed."""
        return list(next(iter(self.posterior))) if self.satisfied else None


def sample(
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    constraint: Constraint,
    recipe: Any = "awrs",
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    seed: int = 0,
    proposal: torch.nn.Module | None = None,
    critic: Callable[[list[int]], float] | None = None,
    tokenizer: Any = None,
) -> Particles:
    """Continues one prompt with texts that satisfy a constraint.

    The target is the model's law after processors, temperature, top-k and top-p, given that the whole text satisfies the
    constraint and ends within the length: with weights, particles follow it, the better the more there are.

    Args:
        inputs: ``input_ids`` (1, n).
        recipe: ``awrs`` or ``masking``, and methods of the cache and processors beside it.
        max_new_tokens: the token that ends the text comes on top: behind the last it is forced, at its probability.
        sampling: by default temperature 1.
        proposal: another model of the same vocabulary that tokens are drawn from; weights make up for the difference. What the
            model may say, it must be able to say; top-k and top-p are the model's alone.
        critic: the log of a factor on a text's weight, -inf to refuse it. Applied at every step where particles are resampled,
            else at the end.
        tokenizer: for methods that look for words.

    Raises:
        LaconicError: where the methods do not fit together or no text can satisfy the constraint. Particles that fail on the way
            have the weight -inf; where all do, ``Particles.satisfied`` is False.
    """
    method, samplers, rest = _parts(Recipe.parse(recipe))
    sampling = sampling or Sampling(temperature=1.0)
    if sampling.greedy:
        raise LaconicError(f"{method.id} draws tokens: give a temperature above 0.")
    if inputs["input_ids"].shape[0] != 1 or inputs["input_ids"].shape[1] == 0:
        raise LaconicError("Give a single prompt of at least one token: the rows of the batch are the particles.")
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(), apply(model, rest) as handle:
        text = Text(inputs["input_ids"].tolist())
        setting = Setting(model, text, sampling, generator, None, inputs, tokenizer, constraint.vocabulary.ends)
        own = tuple(process for m in samplers for process in m.processors(setting))
        law = _Law(Runner(handle), dataclasses.replace(sampling, processors=(*sampling.processors, *own)))
        loop = _Loop(method, constraint, generator, critic, law)
        if proposal is None:
            return loop(inputs, max_new_tokens)
        with apply(proposal, "dense") as other:
            loop.proposal = _Law(Runner(other), Sampling(temperature=sampling.temperature))
            return loop(inputs, max_new_tokens)


def _parts(recipe: Recipe) -> tuple[ParticleMethod, list[SampleMethod], Recipe]:
    found = [m for m in recipe.methods if isinstance(m, ParticleMethod)]
    if len(found) != 1 or drafting(recipe) is not None:
        raise LaconicError("Constrained sampling takes one of awrs and masking, and no method that drafts.")
    samplers = [m for m in recipe.methods if isinstance(m, SampleMethod) and m not in found]
    if any(type(m).chooser is not SampleMethod.chooser for m in samplers):
        raise LaconicError(f"{found[0].id} chooses the tokens: leave {' and '.join(m.id for m in samplers)} out.")
    rest = tuple(m for m in recipe.methods if not isinstance(m, SampleMethod))
    return found[0], samplers, Recipe(rest) if rest else Recipe.parse("dense")


@dataclass
class _Particle:
    state: State
    ids: list[int] = field(default_factory=list)
    weight: float = 0.0
    twist: float = 0.0  # what the critic said last, which is part of the weight
    done: bool = False
    row: int = 0  # in the caches and logits

    @property
    def going(self) -> bool:
        return not self.done and self.weight > -math.inf


class _Law:
    """A model that says what may come next after each particle."""

    def __init__(self, runner: Runner, sampling: Sampling) -> None:
        self.runner, self.sampling = runner, sampling
        self.logits: torch.Tensor | None = None

    def prefill(self, inputs: dict[str, Any]) -> None:
        self.prompt = inputs["input_ids"][0].tolist()
        self.logits = self.runner.prefill(dict(inputs)).logits[:, -1:]

    def step(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        self.runner.select(rows)
        self.logits = self.runner.step(tokens.to(self.runner.model.device)).logits

    def logs(self, particles: Sequence[_Particle]) -> torch.Tensor:
        """Log probabilities ``(particles, vocabulary)``, float64, on the CPU: what follows looks at few of them, one by one."""
        logits = self.logits[[p.row for p in particles]]
        if self.sampling.processors:
            text = Text([[*self.prompt, *p.ids] for p in particles])
            text.prompts = [len(self.prompt)] * len(particles)
            root = DraftTree.chain(text.roots(logits.device)[:, None])
            logits = self.sampling.scores(logits, text, root)
        logits = logits[:, 0].double()
        if self.sampling.top_k == 0 and self.sampling.top_p == 1:
            return (logits / self.sampling.temperature).log_softmax(-1).cpu()
        return self.sampling.law(logits).log().cpu()


class _Loop:
    proposal: _Law | None = None

    def __init__(
        self, method: ParticleMethod, constraint: Constraint, generator: torch.Generator, critic: Any, law: _Law
    ) -> None:  # fmt: skip
        self.method, self.constraint, self.generator, self.critic, self.law = method, constraint, generator, critic, law
        self.particles = [_Particle(constraint.start) for _ in range(method.particles)]
        self.result = Particles([], torch.zeros(0))

    @property
    def laws(self) -> list[_Law]:
        return [law for law in (self.law, self.proposal) if law is not None]

    def __call__(self, inputs: dict[str, torch.Tensor], most: int) -> Particles:
        begun = time.perf_counter()
        for law in self.laws:
            law.prefill(inputs)
        while going := [p for p in self.particles if p.going]:
            asked = time.perf_counter()
            self._end(going) if len(going[0].ids) >= most else self._draw(going)
            self._resample()
            self.result.check_s += time.perf_counter() - asked
            self._advance()
        if self.critic is not None and self.method.ess_threshold == 0:
            for particle in (p for p in self.particles if p.weight > -math.inf):
                particle.weight += self.critic(particle.ids)
        result = self.result
        result.rows = [p.ids for p in self.particles]
        result.log_weights = torch.tensor([p.weight for p in self.particles], dtype=torch.float64)
        result.forwards = sum(law.runner.forwards for law in self.laws)
        result.model_s = time.perf_counter() - begun - result.check_s
        return result

    def _draw(self, going: list[_Particle]) -> None:
        """Gives every particle its next token, or the weight -inf."""
        logs = self.law.logs(going)
        own = logs if self.proposal is None else self.proposal.logs(going)
        draws = self.method.draw(own, [p.state for p in going], self.constraint, self.generator)
        for index, (particle, draw) in enumerate(zip(going, draws, strict=True)):
            self.result.checks += draw.checks
            particle.weight += draw.weight
            if draw.token is None:
                continue
            self.result.tokens += 1
            if self.proposal is not None and self.method.proper_weights:
                particle.weight += float(logs[index, draw.token] - own[index, draw.token])
            self._write(particle, draw.token)
        if not going[0].ids and not any(p.going or p.done for p in going) and not self.constraint.start.mask().any():
            raise LaconicError("The constraint cannot be satisfied: no token of this vocabulary may begin a text.")

    def _end(self, going: list[_Particle]) -> None:
        """At the limit: the text ends here, at the probability that the model gives to that, if it may."""
        ends = sorted(self.constraint.vocabulary.ends)
        logs = self.law.logs(going)[:, ends]
        for particle, row in zip(going, logs, strict=True):
            self.result.checks += 1
            if not particle.state.complete:
                particle.weight = -math.inf
                continue
            particle.weight += float(row.logsumexp(0)) if self.method.proper_weights else 0.0
            self._write(particle, ends[int(row.argmax())])

    def _write(self, particle: _Particle, token: int) -> None:
        particle.ids.append(token)
        particle.done = token in self.constraint.vocabulary.ends
        if not particle.done:
            particle.state = particle.state.after(token)
        if self.critic is not None and self.method.ess_threshold > 0:
            twist = self.critic(particle.ids)
            particle.weight, particle.twist = particle.weight - particle.twist + twist, twist

    def _resample(self) -> None:
        """Draws particles anew by their weights where too few of them count (systematic resampling)."""
        weighed = self.method.proper_weights or self.critic is not None
        if not weighed or not any(p.going for p in self.particles):
            return
        logs = torch.tensor([p.weight for p in self.particles], dtype=torch.float64)
        weights, count = logs.softmax(0), len(logs)
        if 1 / float((weights**2).sum()) >= self.method.ess_threshold * count:
            return
        places = (torch.arange(count) + torch.rand((), dtype=torch.float64, generator=self.generator)) / count
        chosen = torch.searchsorted(weights.cumsum(0), places).clamp(max=count - 1).tolist()
        mean = float(logs.logsumexp(0)) - math.log(count)
        self.particles = [copy.copy(self.particles[i]) for i in chosen]
        for particle in self.particles:
            particle.ids, particle.weight = list(particle.ids), mean
        self.result.resampled += 1

    def _advance(self) -> None:
        """Feeds the newest tokens of the particles that go on; the caches keep those rows alone."""
        going = [p for p in self.particles if p.going]
        if not going:
            return
        rows, tokens = torch.tensor([p.row for p in going]), torch.tensor([p.ids[-1] for p in going])
        for law in self.laws:
            law.step(rows, tokens)
        for row, particle in enumerate(going):
            particle.row = row



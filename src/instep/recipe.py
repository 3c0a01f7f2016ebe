"""What is trained (`Recipe`) and who trains it (`Team`).

The recipe decides the result; the team decides only the time. Under a rule in lockstep no field of the team may
change a bit of the weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from instep import buffer_modes, freezing
from instep.bounds import Bounds, parse_bounds
from instep.budget import parse_budget, parse_share
from instep.by_pattern import ByPattern
from instep.components import Component
from instep.differences import differences, flat, without_contents
from instep.ema import check_decays
from instep.errors import RecipeError, cut, shown
from instep.loss_scale import LossScale, of_precision
from instep.references import resolved
from instep.rules import UpdateRule
from instep.rules.presets import synchronous
from instep.schedule import Change, Phase
from instep.schedule import Schedule as Schedule  # noqa: PLC0414  # which belongs to a recipe
from instep.tables import added, as_before, at_least, at_most, check_types, from_table, suggest, to_table
from instep.turns import Turns
from instep.watch import Watch

if TYPE_CHECKING:
    ComponentLike = Any
    ComponentsLike = Any
    TurnsLike = Any
else:
    ComponentLike = Component  # a field takes whatever `Component.of` does, and is a Component afterwards
    ComponentsLike = ByPattern  # or several, by patterns of names
    TurnsLike = Turns  # or several objectives, which take turns

_MOST = {"batch": 1 << 40, "microbatches": 1 << 20, "steps": 1 << 53, "threads": 1024, "sample_length": 1 << 20}
"""Beyond these no machine gets, or floating-point numbers cannot count."""

MOST_WORKERS = 1 << 20
MOST_LOADERS = 256
"""Of a team, virtual ones too."""

_LONGEST_NAME = 240
"""Bytes of a recipe's name: file systems take 255, and a folder's name may get a number."""

LEAST_TIMEOUT_S = 0.5
"""Seconds: two heartbeats of a worker. With less, workers that are well would count as stopped."""

_NO_RESULT = {"result": False}
"""Marks a field of a recipe that changes what is shown, never the weights."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained. Every field but the last group decides the result, bit for bit.

    >>> pairs = torch.utils.data.TensorDataset(torch.randn(64, 3), torch.zeros(64, 1))
    >>> recipe = instep.Recipe(model=torch.nn.Linear(3, 1), objective=squares, data=pairs, batch=16, steps=3)
    >>> recipe.rule.name, recipe.microbatches, recipe.optimizer.describe()
    ('synchronous', 8, 'instep.optimizers:adamw')

    Fields
    ------
    model: builds a `torch.nn.Module`, or is one.
    objective: see `instep.objectives`: a function of (model, batch) to sums, or a class of such; or several that take
        turns, a list of tables, each with the parameters that it trains, see `instep.turns`.
    data: gives a map-style data set, a pair (training, held out), or an `instep.Data`.
    optimizer: called with the list of parameters, gives a `torch.optim.Optimizer`; or several, a mapping of patterns of
        the parameters' names to such, see `instep.by_pattern`.
    schedule: the learning rate by step, which under every rule is a global batch of items.
    rule: who waits for whom, and what makes an update: an `instep.UpdateRule`, or text such as "diloco:20".
    batch: samples in the global batch of one step. The last batch of an epoch may be smaller.
    drop_last: leave that smaller batch out. Each epoch then leaves out other samples, fewer than a batch.
    ragged: how that smaller batch is cut: "even" into as few microbatches as hold it at their usual size,
        batch / microbatches, or one sample less; "spread" over all, however small they become.
    microbatches: pieces, M, that each batch is cut into; a worker computes whole pieces. `batch` is a multiple of it.
    order: of an epoch's samples: "keyed" computes it place by place; "permutation" holds 8 bytes a sample for it.
    steps: global batches. Under a synchronous rule each is one update of the weights.
    seed: keys every random number.
    clip_norm: largest global L2 norm of the gradient; None does not clip.
    precision: ``bfloat16`` and ``float16`` run the model under autocast; weights and sums stay in float32.
    loss_scale: with ``float16``, by what the objective is multiplied for backward, see `LossScale`; None for its
        defaults.
    compile: run the model through `torch.compile`.
    threads: CPU threads inside each worker. It is part of the recipe since matrix kernels change their order with it.
    watch: what is done about an objective that spikes, or no longer improves. With its `patience`, `evaluate_every` and
        `evaluate_samples` decide the result too.
    changes: what resumes have changed, each from its version on, by rising version. A resume adds them.
    buffers: what becomes of the model's buffers at the end of a step, from patterns of their names to "mean", "max",
        "last", "frozen", "sum" or "sum:D", as in {"codebook.*": "sum:0.99"}; the first pattern that matches decides.
        See `instep.buffer_modes`.
    freeze: from patterns of parameters' names to the steps in which these are frozen, as in {"embedding.*": "all",
        "head.*": "..200"}, the first 200 steps; the first pattern that matches decides. See `instep.freezing`.
    ema: decays of averages of the weights, as (0.999, 0.9999), evaluated and saved beside these. See `instep.ema`.
    ema_warmup: the decays rise to these, as (1 + updates) / (10 + updates).

    These change only what is measured and shown:

    name: of the recipe, for run folders and reports.
    evaluate_every: steps between evaluations on held-out data; 0 evaluates at the end alone.
    evaluate_samples: how many held-out samples, the first ones; None takes all.
    checksum_every: under a synchronous rule, updates between two after which the tape gets a checksum of each tensor:
        parameter, buffer and optimizer state. More than the steps takes none.
    sample_prompt, sample_length: for text, the prompt and the number of tokens generated at the end; 0 for none.
    artifacts: called at the end with (model, data, folder), writes into this folder what a person can look at or use,
        and gives a mapping of figures, or None. See `instep.artifacts`.
    artifacts_every: steps between artifacts, and samples of text, during the run; 0 makes them at the end alone.
    """

    model: ComponentLike
    objective: TurnsLike
    data: ComponentLike
    optimizer: ComponentsLike = field(default_factory=lambda: Component("instep.optimizers:adamw"))
    schedule: Schedule = field(default_factory=Schedule)
    rule: UpdateRule = field(default_factory=synchronous)
    batch: int = 32
    microbatches: int = 8
    drop_last: bool = added(before=False, default=False)
    ragged: Literal["even", "spread"] = added(before="spread", default="even")
    order: Literal["keyed", "permutation"] = added(before="permutation", default="keyed")
    steps: int = 100
    seed: int = 0
    clip_norm: float | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    loss_scale: LossScale | None = added(before=None, default=None)  # noqa: RUF009  # a field
    compile: bool = False
    threads: int = 1
    watch: Watch = field(default_factory=Watch)
    changes: tuple[Change, ...] = ()
    buffers: Mapping[str, str] = added(before={}, default_factory=dict)
    freeze: Mapping[str, str] = added(before={}, default_factory=dict)
    ema: tuple[float, ...] = added(before=None, default=())
    ema_warmup: bool = added(before=False, default=False)

    name: str = field(default="custom", metadata=_NO_RESULT)
    evaluate_every: int = field(default=0, metadata=_NO_RESULT)
    evaluate_samples: int | None = field(default=None, metadata=_NO_RESULT)
    checksum_every: int = field(default=50, metadata=_NO_RESULT)
    sample_prompt: str = field(default="", metadata=_NO_RESULT)
    sample_length: int = field(default=0, metadata=_NO_RESULT)
    artifacts: ComponentLike | None = field(default=None, metadata=_NO_RESULT)
    artifacts_every: int = field(default=0, metadata=_NO_RESULT)

    def __post_init__(self) -> None:
        for key in ("model", "data"):
            object.__setattr__(self, key, Component.of(getattr(self, key)))
        object.__setattr__(self, "objective", Turns.of(self.objective))
        object.__setattr__(self, "optimizer", ByPattern.of(self.optimizer))
        if self.artifacts is not None:
            object.__setattr__(self, "artifacts", Component.of(self.artifacts))
        check_types(self, "recipe")
        modes = buffer_modes.parse(flat(self.buffers))
        object.__setattr__(self, "buffers", {pattern: str(mode) for pattern, mode in modes.items()})
        frozen = freezing.parse(flat(self.freeze))
        object.__setattr__(self, "freeze", {pattern: str(steps) for pattern, steps in frozen.items()})
        check_decays(self.ema, warmup=self.ema_warmup)
        if self.name in ("", ".", "..") or "/" in self.name or not self.name.isprintable():
            raise RecipeError(
                f"'recipe.name' is {shown(self.name)}; it names the run folder: write a name without '/'."
            )
        if len(self.name.encode()) > _LONGEST_NAME:
            raise RecipeError(
                f"'recipe.name' is {shown(self.name)}, of {len(self.name)} characters; it names the run folder: write "
                f"one of at most {_LONGEST_NAME}."
            )
        for key in ("batch", "microbatches", "steps", "threads", "checksum_every"):
            at_least(f"recipe.{key}", getattr(self, key), 1)
        for key in ("evaluate_every", "sample_length", "artifacts_every"):
            at_least(f"recipe.{key}", getattr(self, key), 0)
        for key, most in _MOST.items():
            at_most(f"recipe.{key}", getattr(self, key), most)
        if self.evaluate_samples is not None:
            at_least("recipe.evaluate_samples", self.evaluate_samples, 1)
        if self.batch % self.microbatches:
            whole = max(1, round(self.batch / self.microbatches)) * self.microbatches
            raise RecipeError(
                f"a batch of {self.batch} samples does not divide into {self.microbatches} equal microbatches; "
                f"set recipe.batch to {whole}, or choose other recipe.microbatches."
            )
        for watch in self.watches:
            watch.check(self.rule, self.evaluate_every)
        if isinstance(self.objective, Turns):
            self.objective.check(self.rule.name, together=self.rule.lockstep and not self.rule.streams)
        if list(self.changes) != sorted(self.changes, key=lambda change: change.version):
            raise RecipeError(
                "'recipe.changes' do not come by rising version; leave them as a run's recipe.toml has them."
            )
        if self.compile and self.threads > 1:
            raise RecipeError(
                f"'recipe.compile' goes with 1 thread a worker, not {self.threads}: several threads change the order "
                f"in which compiled kernels add, from run to run; set recipe.threads to 1."
            )
        object.__setattr__(self, "loss_scale", of_precision(self.precision, self.loss_scale))
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise RecipeError(
                f"'recipe.clip_norm' is {self.clip_norm}; it must be above 0 (leave it out for no clipping)."
            )

    def to_table(self) -> dict[str, Any]:
        """The recipe as a nested dict that TOML can hold."""
        return to_table(self)

    @property
    def watches(self) -> list[Watch]:
        """The watch, and those that changes put in its place."""
        return [self.watch, *(change.watch for change in self.changes if change.watch is not None)]

    def phase(self, version: int) -> Phase:
        """What holds at `version`, after the changes up to it."""
        return Phase(self.schedule, self.watch).after([each for each in self.changes if each.version <= version])

    def with_lr(self, lr: float | None) -> Recipe:
        """The recipe with `lr` as its optimizer's argument; None for its own."""
        if lr is None or isinstance(self.optimizer, ByPattern):
            return self
        return dataclasses.replace(self, optimizer=Component(self.optimizer.use, {**self.optimizer.args, "lr": lr}))

    def known(self, changes: int) -> Recipe:
        """The recipe with so many of its changes, as it was before the others were made."""
        return dataclasses.replace(self, changes=self.changes[:changes])

    def fingerprints(self) -> tuple[str, ...]:
        """The fingerprint with none of the changes, with the first, and so on to all."""
        return tuple(self.known(count).fingerprint() for count in range(len(self.changes) + 1))

    def fingerprint(self) -> str:
        """SHA-256 over the fields that decide the result, `steps` left out: a run may be prolonged."""
        table = without_contents(as_before(Recipe, self.to_table()))
        return hashlib.sha256(json.dumps(result_part(table), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Team:
    """Who trains. No field changes a bit of the weights.

    >>> team = instep.Team(workers=2)
    >>> team.workers, team.restarts
    (2, 3)

    Fields
    ------
    workers: processes, W, from 1 to the recipe's microbatches.
    bounds: as many workers as there is room for within these, as "2..8", instead of `workers`: one for each processor,
        or agent; over several hosts as these come and go. "" leaves it at `workers`.
    device: ``cpu``; ``cuda``, a GPU for each worker of a host; or ``cuda:N``, one that all workers of a host share.
    deterministic: kernels that add in the same order each time; False takes others, perhaps faster, and promises none.
    shard: ``optimizer``: of the workers of a machine each keeps the optimizer's state of a share of the weights, and
        updates that share, wherever this changes no bit; ``none``: each keeps and updates all.
    loaders: processes for each worker that read samples ahead of it; with 0 it reads them itself.
    loader_bytes: of memory, up to which each of them reads ahead.
    balance: ``auto``: in lockstep on a CPU the microbatches of a step move between the workers of a machine as their
        speed asks for; ``off``: each has as many as the others.
    restarts: how often the team may start again from its last checkpoint after a worker failed.
    checkpoint_every: steps between checkpoints; one is always written at the end.
    checkpoint_minutes: also one after the first step that ends so many minutes after the last one, as 10 or 0.5,
        written in the background from a copy of the state in memory; 0 for none.
    remember: with one worker in lockstep, how many steps it does again at most where it dies: a copy of its training
        state is kept in memory, twice over, and made anew every so many steps; 0 keeps none.
    keep: how many checkpoints are kept, the last ones; 0 keeps all. With ``thinned``, the last three and one or two for
        each power of two of versions back.
    keep_best: also save, and keep, the checkpoint with the best held-out objective, and that of each average (`ema`).
    engine: ``lockstep`` has no server and takes synchronous rules alone; ``server`` takes all; ``auto`` picks.
    memory: bytes for activations, as "512MiB", or a share of what they take, as "70%": what does not fit is computed
        again in backward (gradient checkpointing). "" recomputes nothing.
    slow: workers to slow down, by sleeping, for comparing rules: "1:4x" makes worker 1 take 4 times as long,
        "1:4x@100..200" from step 100, counted from 0, up to step 200.
    audit: in lockstep, the share of its microbatches that of each worker another one computes again, to compare their
        bits, as "1%"; "" compares none.
    answer_timeout_s: seconds without a sign of life after which a worker counts as stopped.
    stall_timeout_s: seconds in which a worker that answers may finish no microbatch.
    launcher: who has started this agent of several: ``torchrun``, ``srun``, or nobody (``local``); ``auto`` looks. With
        ``ray`` this is the first, and Ray starts one on each of the other nodes of its cluster.
    interface: address, or name of the network interface, where the hosts of a run reach each other; "" finds it.
    join_timeout_s: seconds in which all agents must have come.
    lease_s, give_up_s: seconds of silence after which a host is lost, and in which it looks for agent 0 again.
    spare: ``auto`` keeps a process built that takes the place of the first host's only worker at once; ``off``, none.
    when_lost: whether the hosts that are left ``continue`` with all workers, or ``wait`` for one that was lost.
    mixed_processors: whether hosts may have processors of several kinds, which withdraws the promise of the same bits.
    """

    workers: int = 1
    bounds: str = ""
    device: str = "cpu"
    deterministic: bool = True
    shard: Literal["optimizer", "none"] = "optimizer"
    loaders: int = 0
    loader_bytes: int = 1 << 28
    balance: Literal["auto", "off"] = "auto"
    restarts: int = 3
    checkpoint_every: int = 100
    checkpoint_minutes: float = 0.0
    remember: int = 20
    keep: int | Literal["thinned"] = 3
    keep_best: bool = True
    engine: Literal["auto", "lockstep", "server"] = "auto"
    memory: str = ""
    slow: str = ""
    audit: str = field(default="", metadata={"also": float})
    answer_timeout_s: float = 4.0
    stall_timeout_s: float = 600.0
    launcher: Literal["auto", "local", "torchrun", "srun", "ray"] = "auto"
    interface: str = ""
    join_timeout_s: float = 600.0
    lease_s: float = 5.0
    give_up_s: float = 60.0
    spare: Literal["auto", "off"] = "auto"
    when_lost: Literal["continue", "wait"] = "continue"
    mixed_processors: bool = False

    def __post_init__(self) -> None:
        check_types(self, "team")
        at_least("team.workers", self.workers, 1)
        at_most("team.workers", self.workers, MOST_WORKERS)
        _ = self.limits  # which raises where it is none
        if self.memory:
            parse_budget(self.memory, "'team.memory'")
        if self.audit:
            parse_share(self.audit, "'team.audit'")
        at_least("team.checkpoint_every", self.checkpoint_every, 1)
        at_least("team.checkpoint_minutes", self.checkpoint_minutes, 0)
        at_least("team.restarts", self.restarts, 0)
        at_least("team.remember", self.remember, 0)
        at_least("team.loaders", self.loaders, 0)
        at_most("team.loaders", self.loaders, MOST_LOADERS)
        at_least("team.loader_bytes", self.loader_bytes, 0)
        if isinstance(self.keep, int):
            at_least("team.keep", self.keep, 0)
        for key in ("answer_timeout_s", "stall_timeout_s", "join_timeout_s", "lease_s", "give_up_s"):
            if not getattr(self, key) >= LEAST_TIMEOUT_S:
                signs = "workers give four" if key in ("answer_timeout_s", "stall_timeout_s") else "hosts give five"
                least = f"it must be at least {LEAST_TIMEOUT_S:g}: {signs} signs of life a second."
                raise RecipeError(f"'team.{key}' is {getattr(self, key):g} s; {least}")
        if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", self.device):
            raise RecipeError(
                f"'team.device' is {shown(self.device)}; it must be 'cpu', 'cuda', a GPU for each worker, or 'cuda:0', "
                f"say, a GPU that all workers of a host share."
            )

    @property
    def limits(self) -> Bounds | None:
        """`bounds`, read; None where the number of workers follows nothing."""
        return parse_bounds(self.bounds, "'team.bounds'", MOST_WORKERS) if self.bounds else None

    @property
    def by_nccl(self) -> bool:
        """Whether each of several workers has a GPU, so that gradients go from GPU to GPU in lockstep."""
        return self.device == "cuda" and self.workers > 1


def engine_of(recipe: Recipe, team: Team) -> str:
    """The engine that trains: "lockstep" or "server"."""
    if team.engine != "auto":
        return team.engine
    return "lockstep" if recipe.rule.synchronous else "server"


def parse(table: Mapping[str, Any]) -> tuple[Recipe, Team]:
    """A recipe and team from a table laid out like a recipe file: the recipe's keys, and the team's under ``team``."""
    rest = resolved({key: value for key, value in table.items() if key != "team"})
    team = table.get("team", {})
    if not isinstance(team, Mapping):
        raise RecipeError(f"'team' is {shown(team)}; it must be a table.")
    for key in rest:
        if key not in {f.name for f in dataclasses.fields(Recipe)}:
            raise RecipeError(
                f"unknown key '{cut(key)}'{suggest(key, [f.name for f in dataclasses.fields(Recipe)] + ['team'])}"
            )
    return from_table(Recipe, rest, "recipe"), from_table(Team, team, "team")


def dumps(recipe: Recipe, team: Team) -> str:
    """The recipe file, TOML, that `parse` reads back."""
    import tomli_w

    return tomli_w.dumps({**recipe.to_table(), "team": to_table(team)})


def table_differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Clauses on the fields of two recipes' tables that decide the result and differ, `steps` left out."""
    return differences(result_part(here), result_part(there))


def result_part(table: Mapping[str, Any]) -> dict[str, Any]:
    decisive = {f.name for f in dataclasses.fields(Recipe) if f.metadata.get("result", True)} - {"steps"}
    watches = [each.get("watch") for each in (table, *table.get("changes", ())) if isinstance(each, Mapping)]
    if any(isinstance(watch, Mapping) and watch.get("patience") is not None for watch in watches):
        decisive |= {"evaluate_every", "evaluate_samples"}
    part = {key: value for key, value in table.items() if key in decisive}
    for key in ("buffers", "freeze"):
        if part.get(key) and isinstance(part[key], Mapping):  # their order decides too, which a table does not compare
            part[key] = [list(pair) for pair in part[key].items()]
    return part

"""The commands and what they take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cyclopts import App

from instep.cli.check import declare as declare_check
from instep.cli.cluster import cluster_of, refuse_team, steps_for
from instep.cli.diff import declare as declare_diff
from instep.cli.flags import Settings, UsageError, import_paths, parsed, refuse, share, whole_number, with_short
from instep.cli.helping import ABOUT, COMMANDS, Formatter, table
from instep.cli.plan import declare as declare_plan
from instep.cli.replay import declare as declare_replay
from instep.cli.sample import declare as declare_sample
from instep.cli.team import declare as declare_team
from instep.cli.tokenize import declare as declare_tokenize
from instep.cli.train import indices, train_recipe
from instep.cli.verify import declare as declare_verify
from instep.components import importable
from instep.monitors.console import Console
from instep.offline.cluster import Cluster
from instep.recipe import Recipe
from instep.recipe_files import names_of_recipes, path_of
from instep.record.files import json_text
from instep.record.folder import RunFolder
from instep.record.folder import digest as digest_of
from instep.record.tape import read as read_tape
from instep.team.signals import interrupting

_TRAIN = """\
Any other field is set by its name with dots: --recipe.optimizer.args.lr 3e-4, --recipe.schedule.kind wsd, \
--team.restarts 5, --recipe.checksum_every 10 (updates between checksums of each tensor on the tape). A value is read \
as in TOML (3e-4, true, [0.9, 0.95], "text"), or else as text; none takes an optional field away. Flags win over the \
file.

With --resume the run's own recipe is used. The team, the steps and fields that decide no result may change, and from \
there on --recipe.schedule.*, --recipe.watch.* and --recipe.optimizer.args.lr (of several optimizers, \
--recipe.schedule.scale, a factor on all their rates)."""

_MEMORY = """\
Profiles one microbatch of the recipe here, and trains nothing. Fields of the recipe are set as for train. A budget \
goes to a run with instep train --memory."""

_COMPARE = """\
The same recipe, seed and data under each rule, one run after another, and then a table and a page of who wins, see \
report. What is interrupted goes on with the same command. Held-out data are looked at twelve times a run unless \
--recipe.evaluate_every says how often. Fields of the recipe and the team are set as for train."""

_REPORT = """\
One HTML file, which needs no network: who wins, the objective against items, seconds and bytes, what the workers did, \
how stale contributions were. Runs of one rule that differ in their seed alone count as one. Needs the report extra."""

_SIMULATE = """\
Real gradients on a virtual clock: the same rules and the same code as in a real run, with workers and a network that \
one need not have. Fields of the recipe are set as for train."""


def app(settings: Settings) -> App:
    """The commands. `settings`, the flags with dots, are for ``train``; the others refuse them."""
    app = App(name="instep", help=ABOUT, help_format="plaintext", help_formatter=Formatter(), version_flags=[])

    @app.command(help=f"{COMMANDS['train']}\n\n{_TRAIN}")
    def train(
        recipe: str | None = None,
        /,
        *,
        workers: str | None = None,
        steps: str | None = None,
        seed: str | None = None,
        rule: str | None = None,
        slow: str | None = None,
        memory: str | None = None,
        audit: str | None = None,
        out: Path | None = None,
        resume: Path | None = None,
        tensorboard: bool | None = None,
        track: str = "",
        skip_samples: str = "",
    ) -> None:
        """Train.

        Parameters
        ----------
        recipe
            A built-in name or a TOML file. Not needed with --resume.
        workers
            How many train. They change only the time. As 2..8: as many, within these, as there is room for.
        steps
            Global batches. Under the synchronous rule each is one update of the weights.
        seed
            Keys every random number.
        rule
            Who waits for whom: NAME[:VALUE][,field=value ...], such as asynchronous, bounded_staleness:4 or
            diloco:20,outer_lr=0.5.
        slow
            Workers to slow down by sleeping, to compare rules: 1:4x makes worker 1 take 4 times as long, 1:4x@100..200
            from step 100 to step 200.
        memory
            Of activations, for each worker: 512MiB, or a share such as 70%. What does not fit is computed again in
            backward, with the same result; 'instep memory' shows the trade.
        audit
            A share of the microbatches that another worker computes again, to compare their bits: 1%.
        out
            The run folder to make; by default runs/NAME.
        resume
            The folder of a run to go on with, where it stands.
        tensorboard
            Also write the run's events for TensorBoard, into tensorboard/ in the run folder. A resume goes on writing
            there.
        track
            Also hand the run's numbers to trackers: wandb, mlflow, trackio or several of them.
        skip_samples
            Indices of training samples to leave out from here on: 17,204.
        """
        short = (
            ("workers", "team.workers", workers),
            ("steps", "recipe.steps", steps),
            ("seed", "recipe.seed", seed),
            ("rule", "recipe.rule", rule),
            ("slow", "team.slow", slow),
            ("memory", "team.memory", memory),
            ("audit", "team.audit", audit),
        )
        train_recipe(recipe, with_short(settings, short), out, resume, tensorboard, indices(skip_samples), track)

    @app.command(help=f"{COMMANDS['simulate']}\n\n{_SIMULATE}")
    def simulate(
        recipe: str,
        /,
        *,
        workers: str = "2",
        rule: str | None = None,
        steps: str | None = None,
        contributions: str | None = None,
        seed: str | None = None,
        slow: str = "",
        times: str | None = None,
        persistence: str = "0.0",
        failures: str | None = None,
        restart: str | None = None,
        bandwidth: str | None = None,
        latency: str | None = None,
        merge: str | None = None,
        server: bool = False,
        gradients: bool = True,
        batched: bool = False,
        out: Path | None = None,
    ) -> None:
        """Simulate.

        Parameters
        ----------
        recipe
            A built-in name or a TOML file.
        workers
            How many train on the virtual clock.
        rule
            Who waits for whom, as for train.
        steps
            Global batches.
        contributions
            Contributions of each worker, instead of --steps.
        seed
            Keys every random number.
        slow
            Slow workers: 1:4x (worker 1 takes 4 times as long), 5%:4x (so does a twentieth of them).
        times
            Seconds a microbatch: 100ms, normal:100ms,20ms, lognormal:100ms,20ms (mean, standard deviation) or
            bootstrap:FILE. By default measured on this machine.
        persistence
            From 0 (each contribution draws a time anew) to 1 (a worker keeps its own).
        failures
            Mean time between a worker's failures, such as 1h; by default none.
        restart
            How long a failed worker is away; by default 10s.
        bandwidth
            Of each machine's link: 1Gb/s (bits) or 100MB/s (bytes). By default messages take no time.
        latency
            Of each message, such as 1ms.
        merge
            How long an update takes at the server, such as 5ms. By default measured.
        server
            Rules in lockstep too run on a server, not on all-reduce.
        gradients
            Whether to train; --no-gradients finds times, bytes, staleness and idle shares alone.
        batched
            Compute gradients of many workers at once: much faster for small models, with other bits than a real run.
        out
            The run folder to make; by default none.
        """
        refuse_team(settings)
        if contributions is not None and steps is not None:
            raise UsageError("--contributions and --steps both set the length; give one of them.")
        if batched and not gradients:
            raise UsageError(
                "--batched says how gradients are computed, and with --no-gradients none are; leave one out."
            )
        short = (("steps", "recipe.steps", steps), ("seed", "recipe.seed", seed), ("rule", "recipe.rule", rule))
        wanted, _ = parsed(recipe, with_short(settings, short))
        count = whole_number(workers, "--workers")
        cluster = cluster_of(
            count, times=times, persistence=share(persistence, "--persistence"), slow=slow, failures=failures,
            restart=restart, bandwidth=bandwidth, latency=latency, merge=merge, collective=not server, seed=wanted.seed,
        )  # fmt: skip
        cluster = dataclasses.replace(cluster, batched=batched)
        if contributions is not None:
            wanted = dataclasses.replace(
                wanted, steps=steps_for(wanted, count, whole_number(contributions, "--contributions"))
            )
        _simulate(recipe, wanted, cluster, gradients, out)

    @app.command(help=f"{COMMANDS['memory']}\n\n{_MEMORY}")
    def memory(recipe: str, /, *, budget: str | None = None, plot: Path | None = None) -> None:
        """Memory.

        Parameters
        ----------
        recipe
            A built-in name or a TOML file.
        budget
            Shows one plan and tries it: 512MiB, or a share such as 70%.
        plot
            Draws the trade into this file, .png, .svg or .pdf. Needs the report extra.
        """
        _memory(recipe, settings, budget, plot)

    for declare in (
        declare_replay, declare_check, declare_diff, declare_verify, declare_team, declare_plan, declare_sample,
        declare_tokenize,
    ):  # fmt: skip
        declare(app, settings)

    @app.command(help=COMMANDS["recipes"])
    def recipes() -> None:
        refuse(settings)
        _recipes()

    @app.command(help=COMMANDS["digest"])
    def digest(path: Path, /) -> None:
        """Digest.

        Parameters
        ----------
        path
            A run folder, a checkpoint folder or a file of weights.
        """
        refuse(settings)
        print(digest_of(path))

    @app.command(help=f"{COMMANDS['compare']}\n\n{_COMPARE}")
    def compare(
        recipe: str,
        /,
        *,
        rules: str = "synchronous,bounded_staleness:4,asynchronous,diloco:20",
        seeds: str = "",
        workers: str | None = None,
        steps: str | None = None,
        slow: str | None = None,
        out: Path | None = None,
        target: str | None = None,
        json: bool = False,
    ) -> None:
        """Compare.

        Parameters
        ----------
        recipe
            A built-in name or a TOML file.
        rules
            Who waits for whom, as for train, one after another: synchronous,diloco:20,outer_lr=0.5,asynchronous. A
            part such as team.balance=off is of the team of the rule before it.
        seeds
            Each rule trains once with each: 0,1,2. By default the recipe's own.
        workers
            How many train.
        steps
            Global batches. A rule with local steps makes fewer updates of as many.
        slow
            Workers to slow down by sleeping: 1:4x makes worker 1 take 4 times as long.
        out
            The folder of the runs and of report.html; by default runs/compare-NAME. If some of its runs are there, the
            others are added.
        target
            The objective that rules are timed to, such as 1.6; by default the highest that one of them ended with, of
            those within 10 % of the best.
        json
            Prints one JSON document at the end, and writes no page.
        """
        from instep.cli.compare import compare_rules

        short = (("workers", "team.workers", workers), ("steps", "recipe.steps", steps), ("slow", "team.slow", slow))
        compare_rules(recipe, with_short(settings, short), rules, seeds, out, target, json)

    @app.command(help=f"{COMMANDS['report']}\n\n{_REPORT}")
    def report(*runs: Path, out: Path = Path("report.html"), target: str | None = None, json: bool = False) -> None:
        """Report.

        Parameters
        ----------
        runs
            Run folders, of real runs and simulations. A run that is still going on is shown as far as it is.
        out
            The page to write. One file of the same name is replaced.
        target
            The objective that rules are timed to, such as 1.6; by default the highest that one of them ended with, of
            those within 10 % of the best.
        json
            Prints one JSON document, and writes no page.
        """
        refuse(settings)
        from instep.cli.report import report as report_on

        report_on(runs, out, target, json)

    @app.command(help=COMMANDS["export"])
    def export(run: Path, /, *, to: str, out: Path | None = None, ema: str | None = None) -> None:
        """Export.

        Parameters
        ----------
        run
            A run folder.
        to
            perfetto: what each worker did when, for ui.perfetto.dev or chrome://tracing. csv or parquet: a row for
            each update of the weights. hf: a folder that transformers reads, with merged weights, configuration and
            tokenizer.
        out
            The file or folder to write; by default beside the run folder, with its name.
        ema
            For hf, the decay of the average of the weights to write in place of these: one of the recipe's `ema`.
        """
        refuse(settings)
        from instep.cli.report import export_run

        export_run(run, to, out, ema)

    @app.command(help=COMMANDS["tape"])
    def tape(run: Path, /) -> None:
        """Tape.

        Parameters
        ----------
        run
            A run folder.
        """
        refuse(settings)
        for event in read_tape(RunFolder.open(run).tape_path):
            print(json_text(event))

    return app


def _recipes() -> None:
    names = names_of_recipes()
    rows = []
    for name in names:
        first = path_of(name).read_text("utf-8").partition("\n")[0]
        rows.append((name, first.lstrip("# ") if first.startswith("#") else ""))
    print(table(rows, max(map(len, names), default=0), indent=""))


def _memory(given: str, settings: Settings, budget: str | None, plot: Path | None) -> None:
    from instep.budget import parse_budget
    from instep.cli.memory import check_plot, draw, show
    from instep.worker.memory_trade import memory_trade

    wanted = None if budget is None else parse_budget(budget, "--budget")
    recipe, team = parsed(given, settings)
    if plot is not None:
        check_plot(plot)  # not after the work
    with importable(import_paths(given)):
        trade = memory_trade(recipe, team.device, wanted)
    show(trade)
    if plot is not None:
        draw(trade, plot)
        print(f"\nThe trade is drawn in {plot}.")


def _simulate(given: str, recipe: Recipe, cluster: Cluster, gradients: bool, out: Path | None) -> None:
    from instep.api import simulate

    with interrupting(), Console(path=out) as console:
        simulate(recipe, cluster, gradients=gradients, out=out, monitors=(console,), import_paths=import_paths(given))

"""What ``instep memory`` shows."""

from __future__ import annotations

import math
from pathlib import Path

from instep.budget import as_size
from instep.cli.flags import UsageError, check_new_file
from instep.errors import ResourceError, shown
from instep.gradient_checkpointing.structure import Plan, listed
from instep.worker.memory_trade import Trade


def show(trade: Trade, file: object = None) -> None:
    """The trade as a table and, with a budget, the plan: predicted and then measured, and what its neighbours cost."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, file=file)  # type: ignore[arg-type]
    profile = trade.profile
    console.print(
        f"One microbatch takes {as_size(profile.peak_bytes)} for activations at its peak with nothing recomputed, "
        f"{as_size(profile.held_bytes)} of them held for backward by {len(profile.names)} blocks. Weights, gradients "
        f"and the optimizer's state come on top."
    )
    if trade.compiled:
        console.print(
            "The recipe compiles: plans are for the least FLOPs, as in its runs. Bytes and times here are those of "
            "eager mode; compiled kernels hide what they keep."
        )
    console.print()
    table = Table(box=None, pad_edge=False)
    for name in ("peak", "share", "more time", "more FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("blocks recomputed", overflow="fold")
    mark = _nearest(trade)
    for place, plan in enumerate(trade.plans):
        share = math.ceil(100 * plan.peak_bytes / profile.peak_bytes)  # so that --budget of it is enough
        table.add_row(
            as_size(plan.peak_bytes), f"{share} %", _percent(plan.extra_time),
            _percent(plan.extra_flops), _in_short(plan), style="bold" if place == mark else None,
        )  # fmt: skip
    console.print(table)
    console.print()
    if trade.plan is None:
        middle = trade.plans[len(trade.plans) // 2].peak_bytes / profile.peak_bytes
        console.print(
            f"Times are predicted. For one plan in detail, tried out: --budget {math.ceil(100 * middle)}%, or a size "
            f"such as --budget 512MiB."
        )
    else:
        _show_plan(console, trade, trade.plan)


def _show_plan(console: object, trade: Trade, plan: Plan) -> None:
    say = console.print  # type: ignore[attr-defined]
    extra = _measured(trade)
    say(f"budget     {as_size(plan.budget_bytes)}")
    say(f"predicted  {as_size(plan.peak_bytes)}, {_more_time(plan.extra_time)}, "
        f"{_percent(plan.extra_flops)} more FLOPs")  # fmt: skip
    say(f"measured   {as_size(trade.measured_bytes)}, {_more_time(extra)} (a few passes: other work on this "
        f"machine shows in it)")  # fmt: skip
    say(f"bound      {plan.distance()}")
    for label, other in (("larger", _beside(trade, plan, 1)), ("smaller", _beside(trade, plan, -1))):
        if other is not None:
            say(f"{label:<11}{as_size(other.peak_bytes)} would cost {_more_time(other.extra_time)}")
    say()
    for text, names in plan.groups():
        say(f"{listed(names)}: {text}")


def _beside(trade: Trade, plan: Plan, side: int) -> Plan | None:
    """The nearest plan of the table that takes more, or less."""
    others = [p for p in trade.plans if (p.peak_bytes - plan.peak_bytes) * side > 0]
    return min(others, key=lambda p: abs(p.peak_bytes - plan.peak_bytes), default=None)


def _nearest(trade: Trade) -> int | None:
    """The table's plan that is nearest to the budget's."""
    if trade.plan is None:
        return None
    wanted = trade.plan.peak_bytes
    return min(range(len(trade.plans)), key=lambda place: abs(trade.plans[place].peak_bytes - wanted))


def _in_short(plan: Plan) -> str:
    """How many blocks recompute something."""
    if not plan.checkpointed:
        return "nothing recomputed"
    whole = sum(bool(b.choice.acts) and not b.choice.selective for b in plan.blocks)
    parts = [(plan.checkpointed - whole, "in part"), (whole, "whole")]
    return ", ".join(f"{number} {what}" for number, what in parts if number) + f", of {len(plan.blocks)}"


def check_plot(path: Path) -> None:
    """Raises UsageError where no picture can be drawn into this file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "--plot needs matplotlib, which is in the report extra: pip install 'instep[report]'."
        ) from None
    if path.suffix.removeprefix(".").lower() not in Figure().canvas.get_supported_filetypes():
        raise UsageError(f"--plot {shown(str(path))} has no format that can be drawn; name a .png, .svg or .pdf.")
    check_new_file(path, "--plot")


def draw(trade: Trade, path: Path) -> None:
    """The trade as a picture, in the format that the file's name ends with, see `check_plot`. Raises ResourceError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    plans = sorted(trade.plans, key=lambda plan: plan.peak_bytes)
    axes.plot(  # between two plans a budget buys the smaller one
        [p.peak_bytes / 2**20 for p in plans], [100 * p.extra_time for p in plans], "o-", drawstyle="steps-post",
        label="plans, predicted",
    )  # fmt: skip
    ylabel = "more time for a step, predicted (%)"
    if trade.plan is not None:
        axes.axvline(trade.plan.budget_bytes / 2**20, linestyle=":", color="gray", label="budget")
        axes.plot(trade.plan.peak_bytes / 2**20, 100 * trade.plan.extra_time, "s", label="the plan, predicted")
        axes.plot(trade.measured_bytes / 2**20, 100 * _measured(trade), "D", label="the plan, measured")
        ylabel = "more time for a step (%)"
    axes.set(xlabel="peak of activations for a microbatch (MiB)", ylabel=ylabel)
    name = f"{trade.name}: " if trade.name else ""
    axes.set_title(f"{name}memory against time by gradient checkpointing", loc="left")
    axes.grid(alpha=0.25)
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}.") from None


def _measured(trade: Trade) -> float:
    """The share of a step's time that the plan was measured to take more."""
    return trade.measured_s / trade.bare_s - 1 if trade.bare_s else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _more_time(share: float) -> str:
    return f"{_percent(abs(share))} {'less' if share < 0 else 'more'} time"

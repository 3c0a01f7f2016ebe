"""What is tried once, at the start of a run: whether its optimizer makes a step, and its checkpoints can be loaded.

All is done in a copy of the process, which leaves no trace: a run's bits are as without it.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from instep.descendants import die_with_parent
from instep.errors import CheckpointError, ComponentError, InstepError, by_name, described, killed_by
from instep.randomness import key, seed_all
from instep.record import checkpoint
from instep.restore import kept_random_state
from instep.turns import Turns
from instep.worker.optimizer import needs_closure
from instep.worker.optimizer_state import bytes_in, copied, difference, on_cpu
from instep.worker.replica import Replica

MOST_BYTES = 2 * 10**9
"""Of the state, beside the model's, up to which a checkpoint is tried."""


FEW = 250_000
"""Weights up to which several steps are tried, not one: what changes with every few steps shows then too."""

SEVERAL = 3

MOST_TURNS = 32
"""Steps at most, so that each of several objectives has its turn in them."""


def try_optimizer(build: Callable[[], Replica], *, resume: bool = True) -> str | None:
    """Tries steps with random gradients, before anything is trained; `build` gives the replica to do it with.

    With `resume`, a state up to MOST_BYTES is loaded into an optimizer that is built again, and both go on: they must
    stay the same, bit for bit. Returns a sentence to warn with where that could not be tried. Raises ComponentError
    where the optimizer cannot make a step or would go on otherwise after a resume, and what `try_checkpoint` raises.
    """
    try:
        in_a_copy(lambda: _try_steps(build(), resume))
    except CopyLost as lost:
        return f"a first step of the optimizer could not be tried aside: {lost.why}; the run goes on all the same."
    return None


def _try_steps(replica: Replica, resume: bool) -> None:
    count = SEVERAL if replica.size <= FEW else 1
    if isinstance(replica.recipe.objective, Turns):  # each of the optimizers makes a step
        count = max(count, min(MOST_TURNS, 1 + max(replica.recipe.objective.firsts(0))))
    for step in range(count):
        _step(replica, step)
    training_state = replica.training_state()
    if not resume or bytes_in(training_state) > MOST_BYTES:
        return
    before = copied(training_state)
    again = _there_and_back(replica, replica.device, replica.saved_state(), training_state)
    where = difference(before, replica.training_state())
    if where is not None:
        raise ComponentError(
            f"the optimizer {replica.optimizer.kind} does not come back to its own '{where}' when 'eval' is called and "
            f"then 'train', as around each evaluation; these may change the parameters alone."
        )
    for step in range(count, 2 * count):
        for each in (replica, again):
            _step(each, step)
    one, other = ({"weights": dict(each.module.state_dict()), **each.training_state()} for each in (replica, again))
    where = difference(one, other)
    if where is not None:
        raise ComponentError(
            f"the optimizer {replica.optimizer.kind} goes on otherwise after a resume: tried on random gradients, it "
            f"comes to another '{where}'; it must keep all that its steps change in its 'state', or in what its own "
            f"'state_dict' gives and 'load_state_dict' takes."
        )


def _step(replica: Replica, step: int) -> None:
    """One update, with other gradients in each step. Raises ComponentError for what the optimizer raises."""
    seed_all(key(replica.recipe.seed, "trial", step))
    # Drawn anew each time: an optimizer may write on them, and kept ones would take memory beside a large model.
    gradients: list[Tensor | None] = [torch.randn(p.shape, device=p.device).mul_(0.01) for p in replica.parameters]
    for index in replica.trainable.frozen_at(step):
        gradients[index] = None
    try:
        replica.update(step, gradients)
    except InstepError:
        raise
    except Exception as error:
        raise _refused(replica.optimizer.kind, error) from error


def _refused(kind: str, error: Exception) -> ComponentError:
    told = f"{type(error).__name__}: {error}".strip()
    words = told.lower()
    if "closure" in words:
        return needs_closure(kind)
    if "create_graph" in words or "grad_fn" in words:
        return ComponentError(
            f"the optimizer {kind} needs gradients of gradients (create_graph=True), and Instep's are sums over "
            f"microbatches, without a graph; take an optimizer that needs the gradient alone."
        )
    if "sparse" in words and "dense" in words:
        return ComponentError(
            f"the optimizer {kind} takes sparse gradients alone, and Instep adds up dense ones; take an optimizer for "
            f"these, such as Adam in place of SparseAdam."
        )
    return ComponentError(
        f"the optimizer {kind} cannot make a step, tried on random gradients ({told}); it must update the parameters "
        f"it was given from their 'grad' alone.",
        detail="".join(traceback.format_exception(error)),
    )


def try_checkpoint(
    replica: Replica, model_state: Mapping[str, Tensor], training_state: Mapping[str, Any]
) -> str | None:
    """Saves the state of a run, builds all again, loads it, and compares bit by bit; aside, so that no trace is left.

    Returns a sentence to warn with where it could not be tried. Raises CheckpointError where what came back is not what
    was saved, and RecordError where it cannot be saved.
    """
    size = bytes_in(training_state)
    if size > MOST_BYTES:
        return (
            f"whether a checkpoint can be loaded was not tried: the optimizer's state takes {size / 1e9:.1f} GB, and "
            f"up to {MOST_BYTES / 1e9:.0f} GB it is tried."
        )
    replica.doing = "trying whether its checkpoint can be loaded"

    def there_and_back() -> None:
        _there_and_back(replica, torch.device("cpu"), model_state, training_state)

    if replica.device.type != "cpu":  # a GPU is not for a copy of this process
        try:
            with kept_random_state():
                there_and_back()
        except InstepError:
            raise
        except Exception as error:  # what is built on a CPU need not be built there
            return f"whether a checkpoint can be loaded could not be tried on a CPU: {type(error).__name__}: {error}."
        return None
    try:
        in_a_copy(there_and_back)
    except CopyLost as lost:
        return f"whether a checkpoint can be loaded could not be tried: {lost.why}; the run goes on all the same."
    return None


def _there_and_back(
    replica: Replica, device: torch.device, model_state: Mapping[str, Tensor], training_state: Mapping[str, Any]
) -> Replica:
    """A replica on `device` that is built again and loads what was saved, compared with that."""
    again = replica.again(device)
    again.load(model_state, checkpoint.repacked(training_state))
    expected = {"model": model_state, **training_state}
    found = {**again.training_state(), "model": again.saved_state()}
    for part, value in found.items():
        where = difference(on_cpu(expected[part]), on_cpu(value))
        if where is not None:
            what = f"the optimizer {replica.optimizer.kind}" if part == "optimizer" else "the model"
            raise CheckpointError(
                f"a checkpoint of this run could not be resumed: {what} that is built again, and loads what was saved, "
                f"has another '{where}'; keep all that a step changes in tensors and numbers that the state_dict holds "
                f"and load_state_dict takes."
            )
    return again


def in_a_copy(function: Callable[[], Any], within_s: float | None = None) -> Any:
    """What `function` gives in a copy of this process, which ends with it. The copy has one thread, and no GPU.

    Raises the InstepError that it raises, and `CopyLost` where the copy gives no answer, or none in so many seconds.
    """
    context = multiprocessing.get_context("fork")
    try:
        ours, theirs = context.Pipe(duplex=False)
        with theirs:
            # No daemon: these may have no children, and what the user's code does there may take some.
            process = context.Process(target=_main, args=(function, theirs, os.getpid()))
            process.start()
    except OSError as error:  # no memory, process or descriptor is left for it
        raise CopyLost(f"the process could not be copied ({described(error)})") from error
    try:
        if not ours.poll(within_s):
            raise CopyLost(f"it did not end within {within_s:g} s")
        kind, *content = ours.recv()
    except EOFError:
        process.join()
        status = process.exitcode or 0
        raise CopyLost(f"it was {killed_by(status)}" if status < 0 else f"it ended with exit status {status}") from None
    except BaseException:
        process.kill()
        process.join()
        raise
    finally:
        ours.close()
    process.join()
    if kind == "failed":
        raise by_name(content[0])(content[1], detail=content[2])
    if kind == "raised":
        raise CopyLost(content[0], content[1])
    return content[0]


class CopyLost(Exception):
    """The copy gave no answer; `why`, as a clause, and perhaps a traceback."""

    def __init__(self, why: str, detail: str = ""):
        super().__init__(why)
        self.why, self.detail = why, detail


def _main(function: Callable[[], Any], line: Connection, parent: int) -> None:
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    torch.set_num_threads(1)  # a copy has none of the threads that its original computes with
    try:
        line.send(("done", function()))
    except InstepError as error:
        line.send(("failed", type(error).__name__, error.message, error.detail))
    except Exception as error:
        line.send(("raised", described(error), traceback.format_exc()))
    os._exit(0)

"""A successor in step has its model compiled before it takes its place, and nothing is left of what that computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from instep.worker.gradients import compile_first
from instep.worker.replica import Replica
from support import workloads


def test_what_is_computed_to_compile_a_model_leaves_no_gradient_and_changes_no_weight() -> None:
    replica, calls = Replica(workloads.gpt(), "cpu"), list[Any]()
    replica.learn_terms(0)
    before = {name: value.clone() for name, value in replica.module.state_dict().items()}

    def forward(*args: Any) -> Any:
        calls.append(args)
        return replica.module(*args)

    replica._forward = forward
    compile_first(replica)
    assert not calls, "nothing is compiled"
    replica.recipe = dataclasses.replace(replica.recipe, compile=True)
    compile_first(replica)
    assert len(calls) == 1
    assert all(parameter.grad is None for parameter in replica.parameters)
    assert all(torch.equal(value, before[name]) for name, value in replica.module.state_dict().items())

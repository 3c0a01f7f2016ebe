"""A finished run as agents see it that do not have its folder."""

import pytest

from instep.errors import RecordError
from instep.run import RunElsewhere
from support.workloads import gpt

RESULT = {"digest": "abc", "objective_last": 0.5, "held_out": None}


def test_a_run_whose_folder_another_agent_has_can_be_printed_and_compared() -> None:
    recipe = gpt()
    run = RunElsewhere(2, RESULT, recipe, ())
    assert repr(run).startswith("Run(agent=2, result={'digest': 'abc'")
    assert run == RunElsewhere(2, dict(RESULT), recipe, ())
    assert run != RunElsewhere(1, RESULT, recipe, ())
    assert (run.digest, run.objective, run.held_out) == ("abc", 0.5, None)


@pytest.mark.parametrize("what", [lambda run: run.path, lambda run: run.model(), lambda run: run.state_dict(best=True)])
def test_what_needs_the_folder_says_which_agent_has_it(what) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(
        RecordError, match=r"agent 0 has the run folder, and this is agent 2; .* where run.agent is 0\."
    ):
        what(RunElsewhere(2, RESULT, gpt(), ()))

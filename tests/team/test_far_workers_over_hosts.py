"""Rules with a server over hosts of their own network: a link that is cut and healed."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.hosts import Hosts
from support.over_hosts import trained
from support.patience import LONG_S
from support.processes import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def events_of(tape: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in tape.read_text().splitlines()]


def test_a_link_that_is_cut_and_healed_before_the_lease_loses_and_repeats_nothing(tmp_path: Path) -> None:
    with Hosts(2, tmp_path / "outputs") as hosts:
        rule = ["--rule", "asynchronous", "--steps", "40", "--team.lease_s", "60"]
        commands = trained(hosts, "--workers", "3", "--out", "run", *rule)
        tape = hosts[0].path() / "run" / "tape.jsonl"
        wait_until(lambda: tape.exists() and '"merged"' in tape.read_text(), LONG_S, "an update")
        hosts.cut(1)
        time.sleep(2)
        hosts.heal(1)
        assert [command.ends() for command in commands] == [0, 0], commands[0].err
        events = events_of(tape)
        assert not [event for event in events if event["kind"] == "left"]
        pieces = Counter(
            each["piece"] for event in events if event["kind"] == "merged" for each in event["contributions"]
        )
        assert set(pieces.values()) == {1}
        assert "the replay is exact" in hosts[0].run(sys.executable, "-m", "instep", "replay", "run")

"""Which of a run's agents this process is, as torchrun or srun tell it by the environment. No torch."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from instep.errors import RecipeError, RecordError, cut, shown
from instep.record.folder import RunFolder

Launcher = Literal["auto", "local", "torchrun", "srun", "ray"]
"""What starts the agents: `local` for one agent, whatever the environment says; `ray` is told by no environment."""

MOST_AGENTS = 1 << 16

_ANCESTORS = 8
"""Processes, from this one's parent upwards, among which torchrun is looked for: a script may stand between."""


@dataclass(frozen=True)
class Place:
    """One agent's. All count from 0; agent 0, of host 0, has the run folder. local: among the agents of its host, which
    follow each other.

    agents_by_host: how many each host has; 0 where the launcher does not tell, as it does of this one's. stores:
    addresses of torchrun's stores, one of which every agent reaches. head: under srun the name of agent 0's host, under
    Ray the address where agent 0 listens. port: where it does, 0 for any. secret: the run's, where the launcher gives
    it with the place.
    """

    agent: int
    agents: int
    host: int
    hosts: int
    local: int
    launcher: str
    agents_by_host: tuple[int, ...]
    run: str = ""
    """The launcher's own name of the run."""
    stores: tuple[tuple[str, int], ...] = ()
    head: str = ""
    others: tuple[str, ...] = ()
    """Names of the other hosts, where the launcher tells them."""
    port: int = 0
    secret: bytes = field(default=b"", repr=False)
    room: int = 0
    """For how many workers its host has room, where the launcher tells that."""

    @property
    def here(self) -> int:
        """How many agents this one's host has."""
        return self.agents_by_host[self.host]


def from_environment(environ: Mapping[str, str], launcher: str = "auto") -> Place | None:
    """This agent's place; None where it is the only one. Raises RecipeError where the environment is not complete."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in environ
    by_srun = "SLURM_STEP_NUM_TASKS" in environ or "SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ
    if launcher in ("local", "ray") or (launcher == "auto" and not by_torchrun and not by_srun):
        return None  # where Ray starts them, this is who asks it to
    if launcher == "torchrun" or (launcher == "auto" and by_torchrun):
        return _by_torchrun(environ, _arguments_of_torchrun())
    return _by_srun(environ)


def place_of(launcher: str) -> Place | None:
    """This process's place, see `from_environment`."""
    return from_environment(os.environ, launcher)


def begun_before(out: str | os.PathLike[str] | None) -> Path | None:
    """The folder of the run that is to go on, where torchrun has started agent 0 once more: `out`, or else the newest
    below ``runs`` that this torchrun's agent 0 has begun. None where there is none.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or os.environ.get("RANK") != "0":
        return None
    if out is not None:
        return Path(out) if RunFolder(Path(out)).recipe_path.exists() else None
    begun: list[tuple[int, Path]] = []
    own = launch()
    for path in Path("runs").glob("*/run.json") if own else ():
        with contextlib.suppress(OSError, RecordError):
            about, recipe = RunFolder(path.parent).about(), RunFolder(path.parent).recipe_path
            if about is not None and about.launch == own and recipe.exists():
                begun.append((path.stat().st_mtime_ns, path.parent))
    return max(begun)[1] if begun else None


def launch() -> str:
    """What tells this torchrun from every other, whatever it starts again; "" where there is none."""
    run, parent = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.getppid()
    if not run:
        return ""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
        return f"{run} {parent} {fields[19]}"  # when it was started, since the machine was
    return ""


def _number(environ: Mapping[str, str], launcher: str, *names: str, most: int = MOST_AGENTS) -> int:
    """That of the first of these variables that is set."""
    for name in names:
        if name in environ:
            text = environ[name]
            if text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= most:
                return int(text)
            raise RecipeError(
                f"the environment's {name} is {shown(text)}, which is no number from 0 to {most}; {launcher} sets it, "
                f"so let nobody else do so."
            )
    raise RecipeError(
        f"{names[0]} is missing in the environment, which {launcher} sets; start the run by {launcher}, or set "
        f'team.launcher to "local" for a run of one agent.'
    )


# -------------------------------------------------------------------------------------------------------- torchrun


def _by_torchrun(environ: Mapping[str, str], arguments: Sequence[str]) -> Place | None:
    def number(name: str, most: int = MOST_AGENTS) -> int:
        return _number(environ, "torchrun", name, most=most)

    agents = number("WORLD_SIZE")
    if agents == 1:
        return None
    agent, local, host, hosts = number("RANK"), number("LOCAL_RANK"), number("GROUP_RANK"), number("GROUP_WORLD_SIZE")
    here = number("LOCAL_WORLD_SIZE")
    first, others = agent - local, agents - here
    fits = local < here and host < hosts and 0 <= first <= others and (first == 0) == (host == 0)
    if not fits or others < hosts - 1 or (hosts == 1 and others):
        raise RecipeError(
            f"the environment's RANK {agent} of {agents}, GROUP_RANK {host} of {hosts} and LOCAL_RANK {local} don't go "
            f"together with LOCAL_WORLD_SIZE {here}; torchrun sets them, so let nobody else do so."
        )
    address = environ.get("MASTER_ADDR", "")
    if not address:
        raise RecipeError("MASTER_ADDR is missing in the environment, which torchrun sets; let nobody take it away.")
    stores = [(address, number("MASTER_PORT", 65535))]
    if (endpoint := _endpoint(environ, arguments)) is not None and endpoint not in stores:
        stores.insert(0, endpoint)
    return Place(
        agent=agent,
        agents=agents,
        host=host,
        hosts=hosts,
        local=local,
        launcher="torchrun",
        agents_by_host=tuple(here if each == host else 0 for each in range(hosts)),
        run=environ.get("TORCHELASTIC_RUN_ID", ""),
        stores=tuple(stores),
    )


def _endpoint(environ: Mapping[str, str], arguments: Sequence[str]) -> tuple[str, int] | None:
    """Where torchruns with the backend c10d meet, which they all reach.

    It is not in the environment. What is, MASTER_ADDR, is the name that the first host gives itself (torch 2.13), which
    the others need not know.
    """
    given = {name.removeprefix("PET_").lower(): value for name, value in environ.items() if name.startswith("PET_")}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if name in ("rdzv_backend", "rdzv_endpoint"):
            given[name] = value if equals else next(words, "")
    host, _, port = given.get("rdzv_endpoint", "").rpartition(":")
    if given.get("rdzv_backend") != "c10d" or not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        return None
    return host.strip("[]"), int(port)


def _arguments_of_torchrun() -> list[str]:
    """The command line of the torchrun that this process descends from, without the program's own; empty if unknown."""
    pid = os.getppid()
    for _ in range(_ANCESTORS):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
        if any(word.lstrip("-").replace("-", "_").startswith("rdzv_endpoint") for word in words):
            return words
    return []


# ------------------------------------------------------------------------------------------------------------ srun


def _by_srun(environ: Mapping[str, str]) -> Place | None:
    def number(*names: str, most: int = MOST_AGENTS) -> int:
        return _number(environ, "srun", *names, most=most)

    agents = number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if agents == 1:
        return None
    agent, host, local = number("SLURM_PROCID"), number("SLURM_NODEID"), number("SLURM_LOCALID")
    job = number("SLURM_JOB_ID", "SLURM_JOBID", most=999_999_999)
    step = number("SLURM_STEP_ID", "SLURM_STEPID", most=999_999_999)  # a job may have several at a time
    names = nodes_of(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "")
    if not names:
        raise RecipeError(
            "SLURM_JOB_NODELIST is missing in the environment, which srun sets; start the run by srun, or set "
            'team.launcher to "local" for a run of one agent.'
        )
    counts = _tasks_of(environ, agents, len(names))
    host_of = tuple(itertools.chain.from_iterable([node] * count for node, count in enumerate(counts)))
    if len(host_of) != agents or agent >= agents or host_of[agent] != host or agent - host_of.index(host) != local:
        raise RecipeError(
            f"task {agent} of {agents} is number {local} of host {host}, so that the tasks of a host don't follow each "
            f"other; let srun lay them out so: --distribution=block."
        )
    return Place(
        agent=agent,
        agents=agents,
        host=host,
        hosts=len(names),
        local=local,
        launcher="srun",
        agents_by_host=tuple(counts),
        run=f"{job}.{step}.{environ.get('SLURM_RESTART_COUNT', '0')[:9]}",
        head=names[0],
        others=tuple(name for node, name in enumerate(names) if node != host),
        port=_number(environ, "you", "INSTEP_PORT", most=65535)
        if "INSTEP_PORT" in environ
        else 16384 + (job + 257 * step) % 16384,
    )


def _tasks_of(environ: Mapping[str, str], agents: int, hosts: int) -> list[int]:
    """Tasks by host."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for part in text.split(",") if text else ():
        if (found := re.fullmatch(r"(\d{1,5})(?:\(x(\d{1,5})\))?", part)) is None:
            raise RecipeError(f"the environment's SLURM_TASKS_PER_NODE is {shown(text)}, which Instep does not read.")
        counts += [int(found[1])] * int(found[2] or 1)
    if counts:
        return counts
    return [agents // hosts + (node < agents % hosts) for node in range(hosts)]


def nodes_of(text: str) -> list[str]:
    """The hosts of a list as Slurm writes it, ``n[01-03,7],m4``. Raises RecipeError."""
    found: list[str] = []
    for word in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        pieces = re.findall(r"([^\[\]]*)(?:\[([^\[\]]*)\])?", word)
        choices = [[f"{before}{each}" for each in _numbers(inside, text)] for before, inside in pieces]
        parts = itertools.islice(itertools.product(*choices), MOST_AGENTS + 1 - len(found))
        found += ["".join(each) for each in parts]
        if len(found) > MOST_AGENTS:
            break
    if len(found) > MOST_AGENTS or ("[" in text) != ("]" in text):
        raise RecipeError(f"the environment's list of hosts is {cut(text)}, which Instep does not read.")
    return found


def _numbers(text: str, whole: str) -> list[str]:
    """``01-03,7``: their numbers, with the leading zeros."""
    if not text:
        return [""]
    found: list[str] = []
    for part in text.split(","):
        if (span := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)) is None:
            raise RecipeError(f"the environment's list of hosts is {cut(whole)}, which Instep does not read.")
        first, last = int(span[1]), int(span[2] or span[1])
        if last - first >= MOST_AGENTS:
            raise RecipeError(f"the environment's list of hosts is {cut(whole)}, which are more than {MOST_AGENTS}.")
        found += [f"{number:0{len(span[1])}}" for number in range(first, last + 1)]
    return found

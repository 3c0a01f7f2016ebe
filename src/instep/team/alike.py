"""What all agents of a run must have in common, and what takes the promise of its bits away. No torch."""

from __future__ import annotations

from instep.differences import differences, without_contents
from instep.errors import InstepError, RecipeError, WorkerError
from instep.team.wire_messages import HelloAgent


class Alike:
    """own: what agent 0 tells of itself. mixed_processors: as in `Team`."""

    def __init__(self, own: HelloAgent, *, mixed_processors: bool):
        self._own, self._may_mix = own, mixed_processors
        self._mixed: dict[int, str] = {}  # what the tape has not told yet of hosts with other processors

    def different(self, hello: HelloAgent) -> InstepError | None:
        """What it must have in common with agent 0, and has not."""
        who, own = f"host {hello.host} ({hello.name}), agent {hello.agent},", self._own
        # Steps and evaluations, say, are in no fingerprint. What objects hold may differ: a path that is a host's own.
        found = differences(without_contents(own.recipe), without_contents(hello.recipe))
        if found or (hello.fingerprint and hello.fingerprint != own.fingerprint):
            found = found or ["something that its table does not show differs"]
            return RecipeError(f"{who} has another recipe: {found[0]}; give all agents the same command and files.")
        for name, version in own.versions.items():
            if hello.versions.get(name) != version:
                return WorkerError(
                    f"{who} has {name} {hello.versions.get(name)}, and agent 0 has {version}, which may give other "
                    f"bits; install the same version on all hosts."
                )
        if hello.processor != own.processor and self._may_mix:
            self._mixed[hello.host] = (
                f"host {hello.host} ({hello.name}) has a processor of another kind, {hello.processor} instead of "
                f"{own.processor}: the bits of this run are not promised (team.mixed_processors)."
            )
        elif hello.processor != own.processor:
            return WorkerError(
                f"{who} has a processor of another kind, {hello.processor} instead of {own.processor}, which gives "
                f"other bits; take hosts of one kind, or set team.mixed_processors to true and do without that promise."
            )
        return None

    def warnings(self) -> list[str]:
        """Sentences on what takes the promise of the run's bits away; each once."""
        found = [why for _, why in sorted(self._mixed.items())]
        self._mixed.clear()
        return found

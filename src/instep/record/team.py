"""What a tape tells of a team and its hosts, as tables. No torch."""

from __future__ import annotations

from typing import Annotated, NotRequired, TypedDict

from msgspec import Meta


class TeamAsRead(TypedDict, total=False):
    """What readers ask of a team."""

    device: str
    workers: Annotated[int, Meta(ge=1)]
    restarts: Annotated[int, Meta(ge=0)]


class BytesOfHost(TypedDict):
    """Bytes that a run's processes on a host have sent to other hosts and received from them."""

    host: int
    sent: int
    received: int


class HardwareOfHost(TypedDict):
    """processor: its model. cores: that Instep may use. gpus: the name of each."""

    processor: str
    cores: Annotated[int, Meta(ge=0)]
    memory_bytes: Annotated[int, Meta(ge=0)]
    gpus: list[str]


class HostInTeam(TypedDict):
    """clock_error_s: by how much the times of its workers' events may be off the run's clock. hardware: see
    ``run_started``; not on tapes of before.
    """

    host: int
    name: str
    workers: int
    clock_error_s: float
    hardware: NotRequired[HardwareOfHost]

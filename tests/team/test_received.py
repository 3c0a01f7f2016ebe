"""A checkpoint that comes in parts is what was sent, or is refused; files of any size are hashed as they come."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from instep.errors import ResourceError, WorkerError
from instep.team.received import Received
from instep.team.wire_messages import CheckpointPart

pytestmark = pytest.mark.pure

CONTENT = bytes(range(250)) * 4


def parts(name: str = "step-2", file: str = "weights", each: int = 300) -> list[CheckpointPart]:
    offsets = range(0, len(CONTENT), each)
    last = hashlib.sha256(CONTENT).hexdigest()
    return [
        CheckpointPart(name, file, offset, CONTENT[offset : offset + each], offset == offsets[-1], last)
        for offset in offsets
    ]


def receive(folder: Path, those: Sequence[CheckpointPart]) -> None:
    received = Received(folder)
    for part in those:
        received.write(part)


def test_files_are_whole_and_the_checkpoint_of_before_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read again, however large it is"))
    receive(tmp_path / "checkpoints", [*parts("step-1"), *parts(file="weights"), *parts(file="more/state", each=1000)])
    monkeypatch.undo()
    found = {path.relative_to(tmp_path / "checkpoints").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"step-2/weights", "step-2/more/state"}
    assert all((tmp_path / "checkpoints" / name).read_bytes() == CONTENT for name in found)


def test_one_that_is_sent_again_is_whole(tmp_path: Path) -> None:
    receive(tmp_path, [*parts()[:2], *parts()])
    assert (tmp_path / "step-2" / "weights").read_bytes() == CONTENT


@pytest.mark.parametrize("leave_out", [1, 2])
def test_a_part_that_is_missing_or_changed_is_refused(leave_out: int, tmp_path: Path) -> None:
    sent = parts()
    missing = [part for number, part in enumerate(sent) if number != leave_out]
    changed = [CheckpointPart(p.name, p.file, p.offset, p.content[::-1], p.last, p.sha256) for p in sent]
    for those in (missing, changed, sent[1:]):
        with pytest.raises(WorkerError, match="was damaged on its way here"):
            receive(tmp_path, those)


def test_a_file_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="which no checkpoint has"):
        Received(tmp_path).write(parts(file="../../elsewhere")[0])


def test_a_disk_that_refuses_it_is_told_of_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "full").write_text("no folder")
    with pytest.raises(ResourceError, match=r"the checkpoint step-2 from agent 0 cannot be kept in .*full.*TMPDIR"):
        Received(tmp_path / "full").write(parts()[0])

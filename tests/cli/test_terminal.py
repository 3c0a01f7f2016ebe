"""What a terminal, a shell or a machine does to a command: a sentence or no matter, never a traceback."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from instep import errors
from instep.errors import InstepError, RecordError, WorkerError, cut, described, shown
from instep.record.folder import RunFolder, remove
from instep.record.held import identity_of
from support.kinds import quick
from support.patience import LONG_S
from support.processes import INSTEP, write_project

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not Path("/dev/full").exists(), reason="the devices and shells of Linux are used"),
]

SHELL = shlex.join(INSTEP)


def ran(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", script.replace("instep ", f"{SHELL} ")]
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
        env={**os.environ, **environment},
    )


# ------------------------------------------------------------------------------------------------------- foreign text


def test_a_sentence_has_no_control_characters() -> None:
    sentence = InstepError("a \x1b[2Jname\x07 of\nlines\tand \u202eturned \udc80.").message
    assert sentence == r"a \x1b[2Jname\x07 of lines and \u202eturned \udc80."
    assert InstepError("naïve → 数").message == "naïve → 数"


def test_what_others_wrote_is_cut() -> None:
    long = "x" * 10**6
    assert cut(long) == "x" * 197 + "..."
    assert len(shown([long])) == errors.LONGEST
    assert described(ValueError(long)) == f"ValueError: {'x' * 197}..."
    assert described(ValueError("two\nlines\x1b")) == r"ValueError: two lines\x1b"
    assert described(KeyError()) == "KeyError"
    assert cut("short") == "short"


def test_an_exception_of_the_user_s_comes_out_clean(tmp_path: Path) -> None:
    from instep.recipe import Team
    from support.harness import train_here
    from support.regression import regression

    def objective(model: Any, batch: Any) -> Any:
        raise ValueError("\x1b]0;title\x07" + "much " * 1000)

    with pytest.raises(WorkerError) as caught:
        train_here(regression(objective=objective), Team(), tmp_path / "run")
    assert r"raised ValueError: \x1b]0;title\x07much much" in caught.value.message
    assert len(caught.value.message) < 400


def test_a_detail_is_printed_clean(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from instep import cli

    def run(argv: list[str]) -> None:
        raise WorkerError("it raised.", detail="a\n\tb \x1b[31m\n")

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main([]) == 1
    assert capsys.readouterr().err == "instep: it raised.\na\n\tb \\x1b[31m\n"


# --------------------------------------------------------------------------------------------------- output and files


@pytest.mark.parametrize("command", ["recipes", "--help", "train --help"])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_full_output_is_a_sentence(command: str, buffered: str, tmp_path: Path) -> None:
    done = ran(f"instep {command} > /dev/full", tmp_path, PYTHONUNBUFFERED=buffered)
    assert done.returncode == 1
    assert done.stderr == (
        "instep: the output cannot be written: No space left on device; check the file, its disk and the limits of the "
        "system.\n"
    )


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-", "2>&-"])
def test_closed_standard_files_are_no_matter(closed: str, tmp_path: Path) -> None:
    assert ran(f"instep recipes {closed}", tmp_path).returncode == 0
    done = ran(f"instep digest nowhere {closed}", tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "command", quick(["tape run | head -n 1", "recipes | true", "train --help | true"], "tape run | head -n 1")
)
def test_a_reader_that_leaves_is_quiet_as_for_cat(command: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").touch()
    lines = [{"t_s": 0.0, "clock": "wall", "kind": "run_started", "schema": 2, "version": 0}]
    lines += [{"t_s": 1.0, "clock": "wall", "kind": "warned", "why": "slow"}] * 10_000
    (tmp_path / "run" / "tape.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = ran(f"instep {command}; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("output", quick(["> /dev/full", "<&- >&- 2>&-", "| head -c 1 > /dev/null"], "<&- >&- 2>&-"))
def test_a_run_goes_on_whatever_becomes_of_its_output(output: str, tmp_path: Path) -> None:
    write_project(tmp_path)
    assert ran(f"instep train my.toml --steps 2 --out run {output}", tmp_path).stderr == ""
    assert RunFolder(tmp_path / "run").read_result()["steps"] == 2


def test_a_working_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    done = ran("mkdir gone; cd gone; rmdir ../gone; instep train gpt; instep memory gpt; instep recipes", tmp_path)
    assert done.stderr == 2 * (
        "instep: the working folder is not there any more (No such file or directory); change to one that is, with "
        "cd.\n"
    )
    assert "gpt" in done.stdout


def test_a_program_trains_though_its_working_folder_is_gone(tmp_path: Path) -> None:
    write_project(tmp_path)
    program = f"""
import instep
recipe = instep.Recipe(model="mymodel:Net", objective="mymodel:squares", data="mymodel:numbers", batch=8, steps=2)
run = instep.train(recipe, out={str(tmp_path / "run")!r}, import_paths=[{str(tmp_path)!r}])
for more in ({{"out": "x"}}, {{"out": {str(tmp_path / "y")!r}, "import_paths": ["."]}}, {{}}):
    try:
        instep.train(recipe, **more)
    except instep.InstepError as error:
        print(error)
"""
    (tmp_path / "program.py").write_text(program)
    done = ran(f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} {tmp_path}/program.py", tmp_path)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("the run folder x is in the working folder, which is not there any more")
    assert lines[1].startswith("'import_paths' cannot be found from the working folder")
    assert len(lines) == 3
    assert RunFolder(tmp_path / "run").read_result()["steps"] == 2


def test_a_run_folder_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    folder = RunFolder.create(tmp_path / "link", "x = 1\n")
    remove(folder.path, identity_of(folder.path))
    assert (tmp_path / "link").is_symlink()
    assert list((tmp_path / "there").iterdir()) == []
    RunFolder.create(tmp_path / "link")
    (tmp_path / "nowhere").symlink_to("never")
    with pytest.raises(RecordError, match="choose another one with --out"):
        RunFolder.create(tmp_path / "nowhere")


FEW = {8: "the supervisor of the run", 14: "a team of 12 workers", 40: "process "}
"""Who cannot be started with so many descriptors."""


@pytest.mark.slow  # a new Python each
@pytest.mark.parametrize("most", FEW)
def test_few_descriptors_are_a_sentence(most: int, tmp_path: Path) -> None:
    write_project(tmp_path)
    line = "instep train my.toml --workers 12 --recipe.microbatches 16 --recipe.batch 16 --rule asynchronous --out run"
    (sentence,) = ran(f"ulimit -n {most}; {line}", tmp_path).stderr.splitlines()
    assert sentence.startswith(f"instep: {FEW[most]}"), sentence
    assert "cannot be started: Too many open files; take fewer workers, or raise the limits" in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # as few descriptors
@pytest.mark.parametrize("then", ["true", "instep replay /media/run"])
def test_a_run_needs_no_temporary_folder(then: str, tmp_path: Path) -> None:
    if any(
        Path(place).is_relative_to(hidden) for place in (sys.executable, __file__) for hidden in ("/tmp", "/var/tmp")
    ):
        pytest.skip("the project lies in a temporary folder, which this test takes away")
    write_project(tmp_path)
    script = f"""
mount -t tmpfs none /mnt && cp {tmp_path}/my* /mnt && cd /mnt && mount -o remount,ro /mnt || exit 77
mount -t tmpfs none /media && mount -t tmpfs -o ro none /tmp && mount -t tmpfs -o ro none /var/tmp || exit 77
instep train my.toml --steps 2 --out /media/run && {then}
"""
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script.replace("instep ", f"{SHELL} ")],
        capture_output=True, text=True, timeout=LONG_S, check=False, env={**os.environ, "TMPDIR": "/nowhere"},
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("folders cannot be mounted here")
    assert done.stderr == ""
    assert done.returncode == 0
    assert ("the replay is exact" in done.stdout) == ("replay" in then)

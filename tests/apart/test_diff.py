"""`instep.diff`: equal runs raise no alarm, others part at a named operation, and a fault at the run that has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import instep
from instep.apart.exported import export
from instep.apart.found import Diffed
from instep.errors import RecordError
from instep.ranges import owners
from instep.recipe import Recipe
from instep.worker.replica import Replica
from support import parted
from support.parted import Flip, recipe, trained

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("forked_pythons")]


def of_two(one: Recipe, other: Recipe, tmp_path: Path, **kw: Any) -> Diffed:
    a, b = trained(one, tmp_path / "a"), trained(other, tmp_path / "b", workers=1)
    return instep.diff(a.path, b.path, recipes=(one, other), **kw)


def test_runs_by_other_teams_are_the_same_with_a_count(tmp_path: Path) -> None:
    found = of_two(recipe(clip_norm=0.5), recipe(clip_norm=0.5), tmp_path)
    assert found.verdict == "the same"
    assert found.sentence == "The runs are the same: 32 tensors in 2 versions, 8 updates, 4 digests compared."


def test_a_run_is_what_its_recipe_comes_to(tmp_path: Path) -> None:
    one = recipe()
    found = instep.diff(trained(one, tmp_path / "a").path, recipes=(one, None))
    assert found.sentence == "The run is what its recipe comes to here: 32 tensors in 2 versions, 8 updates compared."
    assert found.again is not None
    assert found.again.updates == (8,)


def test_another_kernel_is_named_with_its_module_and_both_inputs(tmp_path: Path) -> None:
    other = recipe({"activation": lambda x: F.gelu(x, approximate="tanh")})
    told: list[dict[str, Any]] = []
    found = of_two(recipe(), other, tmp_path, monitors=[told.append])
    assert found.place is not None
    assert (found.place.step, found.place.microbatch) == (1, 0)
    assert found.place.operation == "aten.gelu.default"
    assert 0 < (found.place.ulps or 0) < 1e5
    saved = safetensors.torch.load_file(found.saved)
    assert torch.equal(saved["a.input.0"], saved["b.input.0"])
    assert torch.equal(saved["a.output.0"], F.gelu(saved["a.input.0"]))
    assert torch.equal(saved["b.output.0"], F.gelu(saved["a.input.0"], approximate="tanh"))
    kinds = [event["kind"] for event in told]
    assert kinds[:2] == ["told", "computing"]
    assert told[1]["updates"] == list(found.again.updates)
    assert set(kinds[2:]) == {"computed_again"}
    json.dumps(found.document())


def test_the_search_begins_at_the_last_checkpoint_that_is_alike(tmp_path: Path) -> None:
    """One microbatch counts a little more; that the objective looks at others changes nothing."""

    def later(model: Any, batch: Any) -> torch.Tensor:
        loss = parted.entropy(model, batch)
        return loss * (1 + 1e-6) if float(batch[0].sum()) in late else loss

    one = recipe()
    late = {float(Replica(one, "cpu").batch(6, 2)[0].sum())}
    found = of_two(one, recipe(objective=later), tmp_path)
    assert found.again is not None
    assert found.again.start == (6, 6)
    assert found.place is not None
    assert (found.place.step, found.place.microbatch, found.place.operation) == (7, 2, "aten.mul.Tensor")


@pytest.mark.parametrize("microbatch", [0, 3])
def test_one_bit_of_a_gradient_is_found_with_update_tensor_and_worker(microbatch: int, tmp_path: Path) -> None:
    """Of two workers, the second has microbatches 2 and 3; the run computed again has no such fault."""
    one = Flip("second.weight", 5, microbatch).recipe(tmp_path / "once", checksum_every=1)
    a, b = trained(one, tmp_path / "a"), trained(recipe(checksum_every=1), tmp_path / "b", workers=3)
    found = instep.diff(a.path, b.path, recipes=(one, recipe()))
    gone = found.departed
    assert found.verdict == "not reproducible", found
    assert gone is not None
    assert (gone.run, gone.update, gone.since) == ("A", 5, 4)
    assert {name.split(".exp")[0] for name in gone.tensors} == {"second.weight"}
    assert gone.worker == microbatch // 2
    assert f"worker {gone.worker}" in found.sentence


def test_one_bit_of_an_optimizers_state_is_found(tmp_path: Path) -> None:
    one = Flip("first.weight", 3, moment="exp_avg").recipe(tmp_path / "once", checksum_every=1)
    found = instep.diff(trained(one, tmp_path / "a", workers=1).path, recipes=(one, None))
    assert found.departed is not None
    assert (found.departed.update, found.departed.tensors) == (3, ("first.weight.exp_avg",))
    assert found.departed.worker == 0


def test_where_contributions_are_right_it_is_the_worker_whose_share_of_the_update_it_is(tmp_path: Path) -> None:
    one = recipe(checksum_every=1)
    path = trained(one, tmp_path / "a").path
    whose = owners([parameter.numel() for parameter in one.model.build().parameters()], 2)
    for tensor, worker in (("first.weight", whose[0]), ("last.bias", whose[5])):
        parted.changed_checksum(path, 3, f"{tensor}.exp_avg")
        found = instep.diff(path, recipes=(one, None))
        assert found.departed is not None
        assert (found.departed.update, found.departed.tensors) == (3, (f"{tensor}.exp_avg",))
        assert found.departed.worker == worker
        assert "its share of the update is not" in found.sentence
        parted.changed_checksum(path, 3, f"{tensor}.exp_avg")


def test_between_checksums_a_fault_is_known_to_lie_there(tmp_path: Path) -> None:
    one = Flip("second.weight", 5, bit=2).recipe(tmp_path / "once")
    found = instep.diff(trained(one, tmp_path / "a").path, recipes=(one, None))
    assert found.departed is not None
    assert found.departed.since == 4
    assert 5 <= found.departed.update <= 8


def test_a_run_that_departs_from_its_own_tape_is_named_beside_a_file_too(tmp_path: Path) -> None:
    one = recipe()
    a, b = trained(one, tmp_path / "a", workers=1).path, trained(one, tmp_path / "b", workers=1).path
    export(b, tmp_path / "file", recipe=one)
    parted.changed_checksum(a, 4, "first.weight")
    found = instep.diff(a, tmp_path / "file", recipes=(one, None))
    assert found.verdict == "not reproducible"
    assert found.departed is not None
    assert (found.departed.run, found.departed.update) == ("A", 4)


def test_what_cannot_be_saved_does_not_lose_what_was_found(tmp_path: Path) -> None:
    found = of_two(recipe(), recipe({"activation": F.relu}), tmp_path, save=tmp_path / "none" / "file")
    assert found.place is not None
    assert (found.place.operation, found.saved) == ("aten.gelu.default", "")
    assert "cannot be saved" in found.remarks[-1]


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    """One that is named is refused before anything is computed; beside it another name is taken."""
    one, other = recipe(), recipe({"activation": F.relu})
    mine = tmp_path / "a-b.safetensors"
    mine.write_text("mine")
    found = of_two(one, other, tmp_path)
    assert found.saved == str(tmp_path / "a-b-1.safetensors")
    with pytest.raises(RecordError, match="is there already, and nothing is written over it"):
        instep.diff(tmp_path / "a", tmp_path / "b", recipes=(one, other), save=mine)
    assert mine.read_text() == "mine"


def test_of_tensors_that_nobody_asked_for_so_many_bytes_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = recipe(), recipe({"activation": F.relu})
    monkeypatch.setattr("instep.apart.diffing._MOST_SAVED", 100)
    found = of_two(one, other, tmp_path)
    assert found.place is not None
    assert (found.place.operation, found.saved) == ("aten.gelu.default", "")
    assert found.remarks[-1] == (
        "The tensors of that operation have 768 bytes, and unless a file is named for them (--save FILE) at most 100 "
        "are saved."
    )
    assert not list(tmp_path.glob("*.safetensors"))
    found = instep.diff(tmp_path / "a", tmp_path / "b", recipes=(one, other), save=tmp_path / "named")
    assert found.saved == str(tmp_path / "named")


def test_a_run_of_another_machine_is_compared_by_a_file_from_there(tmp_path: Path) -> None:
    """To the update and the tensor; without the file it says how to come by it."""
    one, other = recipe(), recipe({"activation": F.relu})
    a, b = trained(one, tmp_path / "a").path, trained(other, tmp_path / "b").path
    assert export(b, tmp_path / "file", (1, 6), recipe=other) == 6
    found = instep.diff(a, tmp_path / "file", recipes=(one, None))
    assert found.place is not None
    assert (found.place.step, found.verdict) == (1, "reproducibly different")
    assert found.place.tensor in dict(one.model.build().named_parameters())
    assert instep.diff(a, tmp_path / "file", recipes=(one, None)).again.updates == (1,)
    with pytest.raises(RecordError, match="neither the folder of a run nor a file"):
        instep.diff(a, a / "recipe.toml", recipes=(one, None))
    lines = (b / "tape.jsonl").read_text().splitlines()
    started = json.loads(lines[0])
    started["libraries"]["torch"] = "2.0.0"
    (b / "tape.jsonl").write_text("\n".join([json.dumps(started), *lines[1:]]) + "\n")
    found = instep.diff(a, b, recipes=(one, other))
    assert found.verdict == "undecided"
    assert f"instep diff {b} --export FILE --updates 1:" in found.goes_on
    with pytest.raises(RecordError, match=r"made with torch 2\.0\.0"):
        export(b, tmp_path / "again", recipe=other)

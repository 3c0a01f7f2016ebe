"""What goes to another host is whole there, without what lies on this one."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch

from instep.team.pickling import pack


def test_what_is_packed_for_another_host_is_whole_there_without_the_files(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "data", dtype=np.int64, mode="w+", shape=(5000,))
    mapped[:] = np.arange(5000)
    mapped.flush()
    packed = pickle.loads(pickle.dumps(pack([mapped, torch.arange(3000.0), ["plain", 7], np.ones(2)])))
    (tmp_path / "data").unlink()
    found = packed.unpacked().load()
    assert found[0].tolist() == list(range(5000))
    assert torch.equal(found[1], torch.arange(3000.0))
    assert found[2] == ["plain", 7]
    assert found[3].tolist() == [1.0, 1.0]

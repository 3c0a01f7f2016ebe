"""What every group promises, over all: alone, in memory that is shared, by gloo, in machines too, and for GPUs."""

from __future__ import annotations

import gc
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from instep.reduce.levels import Shares, levels_of
from instep.transport import distributed, shared_memory
from instep.transport.group import Group, PeerLost, PeerRaised, Pending, Piece
from support.groups import ALL, APART, DISTRIBUTED, ON_GPUS, SHARED, SOLO, Kind, Ranks, run, sizes_of

pytestmark = pytest.mark.processes

Make = Callable[..., Group]

apart = [pytest.param(kind, marks=pytest.mark.slow) for kind in APART]
every_kind = pytest.mark.parametrize("kind", [*ALL, *apart], ids=lambda kind: kind.name)
over_gloo = [kind for kind in (*DISTRIBUTED[1:], *ON_GPUS) if kind.gloo]
of_several = [SHARED[1], *DISTRIBUTED[1:3], *ON_GPUS]
by_gloo = pytest.mark.parametrize("kind", [*over_gloo, apart[1]], ids=lambda kind: kind.name)
several = pytest.mark.parametrize("kind", [*of_several, apart[1]], ids=lambda kind: kind.name)

TYPES = [torch.bool, torch.int16, torch.uint16, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64]


def fact_of(rank: int, turn: int) -> Tensor:
    """Of a type and a length that only the turn decides."""
    generator = torch.Generator().manual_seed(100 * turn + rank)
    values = torch.randint(0, 2, ((0, 1, 3, 64)[turn % 4],), generator=generator)
    return values.to(TYPES[turn % len(TYPES)])


def row_of(rank: int, row: int, turn: int, width: int) -> Tensor:
    """Whole numbers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(9999 * turn + 99 * rank + row)
    return torch.randint(-99, 99, (width,), generator=generator).float()


def pieces_of(turn: int, width: int, kind: Kind) -> list[Piece]:
    """The row in pieces, and each in cuts; of any sizes, many of them empty."""
    draw = random.Random(turn)
    order = Shares(levels_of(kind.machines)).order
    ends = sorted(draw.choices(range(0, width + 1, 4), k=draw.randint(0, 3)))
    pieces = []
    for start, stop in zip([0, *ends], [*ends, width], strict=True):
        bounds = [start, *sorted(draw.choices(range(start, stop + 1), k=kind.size - 1)), stop]
        cuts = {rank: slice(bounds[place], bounds[place + 1]) for place, rank in enumerate(order)}
        pieces.append([cuts[rank] for rank in range(kind.size)])
    return pieces


@every_kind
def test_a_gather_gives_every_rank_all_facts_in_rank_order(kind: Kind) -> None:
    def body(make: Make, rank: int) -> int:
        group = make(sizes_of(kind))
        assert (group.rank, group.size) == (rank, kind.size)
        for turn in range(60):
            found = group.gather(fact_of(rank, turn))
            expected = torch.stack([fact_of(other, turn) for other in range(kind.size)])
            assert found.dtype == expected.dtype
            assert found.tolist() == expected.tolist(), turn
        group.close()
        return turn

    assert run(kind, sizes_of(kind), body) == [59] * kind.size


@every_kind
def test_a_gather_is_a_barrier_and_orders_what_is_written_in_common(kind: Kind) -> None:
    def body(make: Make, rank: int) -> tuple[float, float]:
        group = make(sizes_of(kind))
        assert group.common.nbytes == 64
        assert not group.common.any()
        group.gather(torch.empty(0))
        here = next(team for team in kind.teams if rank in team)
        for turn in range(1, 100):
            group.common[rank] = turn
            group.gather(torch.empty(0))
            assert group.common[here.start : here.stop].tolist() == [turn] * len(here)
            group.meet()
            group.common[rank] = turn + 100
            group.meet()
            assert group.common[here.start : here.stop].tolist() == [turn + 100] * len(here)
            group.gather(torch.empty(0))
        time.sleep(0.2 * (rank == kind.size - 1))
        began = time.monotonic()
        group.gather(torch.empty(0))
        return began, time.monotonic()

    times_s = run(kind, sizes_of(kind), body)
    assert min(ended for _, ended in times_s) >= max(began for began, _ in times_s), "nobody leaves before all came"


def add(rows: Sequence[Tensor]) -> list[Tensor]:
    """All rows into the first one, in place."""
    for row in rows[1:]:
        rows[0].add_(row)
    return list(rows[:1])


@every_kind
def test_cuts_of_any_sizes_come_level_by_level_and_go_back_to_all(kind: Kind) -> None:
    """Several pieces on their way at once, waited for in another order at each rank, and expected in half of the turns;
    ranks have 1 to 3 rows.
    """
    width, counts = 64, [1 + rank % 3 for rank in range(kind.size)]
    sizes = sizes_of(kind, counts, width)

    def body(make: Make, rank: int) -> None:
        group = make(sizes)
        for turn in range(25):
            for row, values in enumerate(group.rows):
                values.copy_(row_of(rank, row, turn, width))
            rows = [row_of(r, i, turn, width) for r in range(kind.size) for i in range(counts[r])]
            pieces, shared = pieces_of(turn, width, kind), turn % 2 == 0
            if turn % 4 < 2:
                group.expect(pieces, shared=shared)
            pending = [group.exchange(piece) for piece in pieces]
            sums: dict[int, list[Tensor]] = {}
            for place in random.Random(turn + rank).sample(range(len(pieces)), len(pieces)):
                while turn % 3 == 0 and not pending[place].ready():
                    time.sleep(0.001)
                came = pending[place].wait()
                if len(group.levels) == 1:
                    cut = pieces[place][rank]
                    assert [each.tolist() for each in came] == [row[cut].tolist() for row in rows]
                sums[place] = add(came)
            for _ in group.levels[1:]:
                pending = [group.exchange(piece, sums[place]) for place, piece in enumerate(pieces)]
                for place in reversed(range(len(pieces))):
                    sums[place] = add(pending[place].wait())
            putting = [group.assemble(sums[place][0], piece, shared=shared) for place, piece in enumerate(pieces)]
            group.gather(torch.empty(0))
            for place in random.Random(turn - rank).sample(range(len(pieces)), len(pieces)):
                (whole,) = putting[place].wait()
            if len(group.levels) > 1:
                group.meet()
            assert whole.tolist() == torch.stack(rows).sum(0).tolist(), turn
            if not shared:
                whole.zero_()  # it is this rank's own
            group.gather(torch.empty(0))

    run(kind, sizes, body)


def test_what_is_expected_comes_though_the_receiver_does_something_else() -> None:
    """Without the word before, the others' bytes would wait until it comes to the exchange."""
    kind = DISTRIBUTED[1]
    sizes = sizes_of(kind, width=16 * kind.size)

    def body(make: Make, rank: int) -> list[float]:
        group: Any = make(sizes)
        group.rows[0].fill_(rank)
        group.expect([even(kind)], shared=False)
        if rank == 0:
            came = group._awaited[distributed.ROWS][0].came
            assert [post.ended(60) for post in came] == [True] * 2
        pending = group.exchange(even(kind))
        return [float(row[0]) for row in pending.wait()]

    assert run(kind, sizes, body) == [[0.0, 1.0, 2.0]] * 3


def test_memory_for_pieces_that_are_no_more_is_given_back() -> None:
    kind = DISTRIBUTED[1]
    sizes = sizes_of(kind, width=16 * kind.size)

    def body(make: Make, rank: int) -> list[int]:
        group: Any = make(sizes)
        found = []
        for turn in range(2 * distributed.KEPT):
            for piece in pieces_of(1 if turn < 9 else 2, 16 * kind.size, kind):
                group.exchange(piece).wait()
            group.gather(torch.empty(0))
            found.append(sum(room.nbytes for room in group._rooms.values()))
        return found

    for found in run(kind, sizes, body):
        assert found[8] <= found[9] == found[distributed.KEPT - 2]
        assert found[-1] <= found[9]
    assert any(found[-1] < found[9] for found in run(kind, sizes, body))


@every_kind
def test_bytes_of_any_length_reach_one_rank_or_all(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (shared_memory, distributed):
        monkeypatch.setattr(module, "ROOM", 100)  # in many parts

    def body(make: Make, rank: int) -> None:
        group = make(sizes_of(kind))
        for turn in range(12):
            lengths = [random.Random(10 * turn + other).choice([0, 1, 99, 100, 101, 350]) for other in range(kind.size)]
            blobs = [bytes([turn + other]) * length for other, length in enumerate(lengths)]
            to = [None, 0, kind.size - 1][turn % 3]
            found = group.share(blobs[rank], to)
            assert found == (blobs if to in (None, rank) else [])
        assert group.share(b"", 0) == ([b""] * kind.size if rank == 0 else [])

    run(kind, sizes_of(kind), body)


@several
@pytest.mark.parametrize("raiser", [0, 2])
def test_an_interrupt_reaches_all_wherever_they_are_and_they_can_do_things_together_anew(
    kind: Kind, raiser: int
) -> None:
    sizes = sizes_of(kind)

    def body(make: Make, rank: int) -> list[Any]:
        group = make(sizes)
        came = group.gather(torch.tensor([rank]))
        kept, seen = came.clone(), []
        if rank == raiser:
            group.interrupt()
        else:
            if rank == 1:
                time.sleep(0.1)  # it comes later than the others hear of it
                group.exchange([slice(0, 0)] * kind.size)
            with pytest.raises(PeerRaised):
                group.gather(torch.tensor([7]))
            assert came.tolist() == kept.tolist(), "what is being read stays as it was"
            group.interrupt()
        for turn in range(5):
            seen.append(group.gather(torch.tensor([rank + turn])).flatten().tolist())
        seen.append(group.share(bytes([rank]), 0))
        if rank == raiser:  # again, for good
            group.interrupt()
        else:
            with pytest.raises(PeerRaised):
                group.gather(torch.tensor([7]))
        group.close()
        return seen

    found = run(kind, sizes, body)
    for rank, seen in enumerate(found):
        assert seen[:5] == [[other + turn for other in range(kind.size)] for turn in range(5)]
        assert seen[5] == ([bytes([other]) for other in range(kind.size)] if rank == 0 else [])


WAYS: dict[str, Callable[[Group, Kind], Any]] = {
    "gather": lambda group, kind: group.gather(torch.ones(3)),
    "exchange": lambda group, kind: then_gather(group, group.exchange(even(kind), sums_for(group, kind))),
    "assemble": lambda group, kind: then_gather(group, group.assemble(torch.ones(16), even(kind), shared=False)),
    "expected": lambda group, kind: expected(group, kind),
    "share": lambda group, kind: group.share(b"x" * 100_000, 0),
}


def again_and_again(call: Callable[[], Any]) -> None:
    while True:
        call()


def then_gather(group: Group, pending: Pending) -> None:
    """Who has nothing to do with the one that died is told there."""
    pending.wait()
    group.gather(torch.empty(0))


def expected(group: Group, kind: Kind) -> None:
    group.expect([even(kind)], shared=False)
    then_gather(group, group.exchange(even(kind), sums_for(group, kind)))
    then_gather(group, group.assemble(torch.ones(16), even(kind), shared=False))


def even(kind: Kind) -> Piece:
    order = Shares(levels_of(kind.machines)).order
    return [slice(16 * order.index(rank), 16 * order.index(rank) + 16) for rank in range(kind.size)]


def sums_for(group: Group, kind: Kind) -> list[Tensor] | None:
    """For the level that goes over the wire."""
    if len(group.levels) == 1:
        return None
    region = Shares(group.levels).region(even(kind), group.rank)
    return [torch.ones(region.stop - region.start)]


@by_gloo
@pytest.mark.parametrize("way", WAYS)
def test_who_waits_is_told_of_a_kill_and_nothing_is_left(kind: Kind, way: str, tmp_path: Path) -> None:
    sizes = sizes_of(kind, width=16 * kind.size)

    def body(make: Make, rank: int) -> tuple[float, int]:
        before = held()
        group = make(sizes)
        group.gather(torch.empty(0))
        if rank == kind.size - 1:
            time.sleep(0.2)
            (tmp_path / "died").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(PeerLost, match=r"rank \d of \d has lost another one"):
            again_and_again(lambda: WAYS[way](group, kind))  # a call may be done without the one that died
        told_s = time.monotonic()
        with pytest.raises(PeerLost):
            group.gather(torch.empty(0))
        group.close()
        return told_s, left_of(before)

    *survivors, dead = Ranks(kind, sizes, body).answers()
    died_s = float((tmp_path / "died").read_text())
    assert dead is None
    for told_s, left in survivors:
        assert 0 < told_s - died_s < 60
        assert left == 0


@pytest.mark.parametrize("raises", [True, False], ids=["one raises", "one dies"])
def test_who_waits_in_memory_is_told_too(raises: bool) -> None:
    """Rank 0 waits for rank 1 of its machine, which waits for rank 3 of the other."""
    kind = DISTRIBUTED[2]
    sizes = sizes_of(kind)

    def body(make: Make, rank: int) -> None:
        group = make(sizes)
        group.gather(torch.empty(0))
        if rank == 3:
            group.interrupt() if raises else os.kill(os.getpid(), signal.SIGKILL)
            return
        with pytest.raises(PeerRaised if raises else PeerLost):
            group.meet() if rank == 0 else group.gather(torch.empty(0))
        if raises:
            group.interrupt()

    run(kind, sizes, body)


@pytest.mark.parametrize("kind", [SOLO, SHARED[1], *DISTRIBUTED[1:], *ON_GPUS], ids=lambda kind: kind.name)
def test_a_closed_group_leaves_no_thread_and_no_descriptor(kind: Kind) -> None:
    """Also where something is on its way, and after an interrupt; one group after the other, in a hurry."""

    def body(make: Make, rank: int) -> int:
        before = held()
        turns = 4 if kind.gloo and max(kind.machines) == 1 else 1  # memory is for one group alone
        for turn in range(turns):
            group = make(sizes_of(kind), f"turn {turn}")
            for _ in range(5):
                group.gather(torch.ones(300))
            with suppress(PeerLost):  # the others may have closed theirs
                if turn == 1 and rank == 0:
                    group.exchange(pieces_of(0, 64, kind)[0])
                if turn == 3:
                    group.expect(pieces_of(0, 64, kind), shared=False)
            if turn == 2:
                group.interrupt()
            group.close()
        return left_of(before)

    assert run(kind, sizes_of(kind), body) == [0] * kind.size


def test_who_shares_memory_with_one_that_died_waits_for_whoever_started_them() -> None:
    """Nothing in memory tells of a death: the supervisor sees it, and ends all."""
    kind = SHARED[1]

    def body(make: Make, rank: int) -> None:
        group = make(sizes_of(kind))
        group.gather(torch.empty(0))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        group.gather(torch.empty(0))

    ranks = Ranks(kind, sizes_of(kind), body)
    ranks.processes[1].join(60)
    time.sleep(0.2)
    assert [process.is_alive() for process in ranks.processes] == [True, False, True]
    ranks.end()


def held() -> int:
    """Threads and descriptors of this process."""
    return len(os.listdir("/proc/self/task")) + len(os.listdir("/proc/self/fd"))


def left_of(before: int) -> int:
    """What is still held beside that of `before`; the kernel, and gloo, take a moment."""
    until = time.monotonic() + 60
    gc.collect()
    while (left := held() - before) > 0 and time.monotonic() < until:
        time.sleep(0.01)
    return left

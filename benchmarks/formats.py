"""What other loaders do with the same samples: ``python -m benchmarks.formats``. They are installed beside, see below.

1,234 numbered samples lie in 8 files of unequal size. Each loader reads an epoch with 1, 2, 3 and 5 ranks, 60 samples a
step over all of them; then it is stopped after 9 steps, what it gives as its state is kept for each rank, and the epoch
is read to its end from there by as many ranks, and by others: rank r takes the state of rank r, or of r modulo their
number. Counted are the samples that came never and those that came more than once, and whether each step of n ranks had
the samples of the same step of one. Instep reads them in each of its formats, token files too, and trains a model that
counts what it is trained on, by as many workers, with 0 to 4 loaders each; it is stopped and resumed by others, and a
worker is killed; its bits are compared.

The others are wheels in a folder of their own, without what they ask for, so that no other torch comes with them:

    pip install --no-deps --target OTHERS datasets dill multiprocess grain array-record etils torchdata litdata \\
        lightning-utilities boto3 botocore s3transfer jmespath python-dateutil obstore tifffile webdataset braceexpand
    PYTHONPATH=OTHERS python -m benchmarks.formats [--quick]

With `--quick` Instep alone is run, each format by two teams, and nothing is saved. The result goes to
benchmarks/results/formats.json.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

from benchmarks.lockstep import machine  # noqa: E402
from instep import Recipe, Team  # noqa: E402
from instep.record import checkpoint  # noqa: E402
from instep.record.folder import RunFolder  # noqa: E402
from support.formats import FORMATS, Seen, recipe  # noqa: E402
from support.harness import Client, Outcome, act_on, train_here  # noqa: E402
from support.resuming import begin, go_on  # noqa: E402

SAMPLES, STEP, STOP = 1_234, 60, 9
EDGES = [0, 40, 200, 330, 331, 600, 800, 1_000, SAMPLES]
RANKS = (1, 2, 3, 5)
LOADERS = {1: 4, 2: 2, 3: 0, 4: 3, 5: 1}
"""Of each of Instep's workers, by their number."""

CHANGES = ((1, 1), (2, 2), (4, 2), (2, 3), (3, 1))
RESULT = Path(__file__).parent / "results" / "formats.json"

Stream = Iterator[list[int]]
"""Numbers of the samples of each step, on one rank."""


class Reader:
    """One rank of a loader. `steps` are what it reads; `state` and `load` its own state, where it has one."""

    def __init__(self, steps: Callable[[], Stream], state: Callable[[], Any] | None = None, load: Any = None):
        self.steps, self.state, self.load = steps, state, load


Open = Callable[[int, int], Reader]
"""A reader for a rank of so many."""


class Numbers(Dataset[int]):
    """The samples, map-style."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return index


def by_torch(folder: Path, rank: int, ranks: int) -> Reader:
    """torch's DataLoader with DistributedSampler, which have no state."""
    sampler = DistributedSampler(Numbers(), ranks, rank, seed=0)  # type: ignore[var-annotated]
    return Reader(lambda: map(Tensor.tolist, DataLoader(Numbers(), STEP // ranks, sampler=sampler)))


def by_torchdata(folder: Path, rank: int, ranks: int) -> Reader:
    """torchdata's StatefulDataLoader with its own sampler."""
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    sampler = StatefulDistributedSampler(Numbers(), ranks, rank, seed=0)
    loader = StatefulDataLoader(Numbers(), STEP // ranks, sampler=sampler)
    return Reader(lambda: map(Tensor.tolist, loader), loader.state_dict, loader.load_state_dict)


def by_datasets(folder: Path, rank: int, ranks: int, *, shuffled: bool = True) -> Reader:
    """A stream of Hugging Face datasets over the Parquet files, shuffled in a buffer of 100 or not, split by node."""
    import datasets
    from datasets.distributed import split_dataset_by_node

    files = [str(folder / f"part-{number}.parquet") for number in range(len(EDGES) - 1)]
    stream = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, cache_dir=folder / "cache"
    )
    stream = split_dataset_by_node(stream.shuffle(seed=0, buffer_size=100) if shuffled else stream, rank, ranks)

    def steps() -> Stream:
        held: list[int] = []
        for sample in stream:
            held.append(sample["number"])
            if len(held) == STEP // ranks:
                yield held
                held = []
        if held:
            yield held

    return Reader(steps, stream.state_dict, stream.load_state_dict)


def by_grain(folder: Path, rank: int, ranks: int) -> Reader:
    """A MapDataset of Grain's, shuffled, every so manieth sample for a rank, as an iterator."""
    import grain

    mapped = grain.MapDataset.source(Numbers()).shuffle(seed=0)[rank::ranks]
    iterator = iter(mapped.to_iter_dataset(grain.ReadOptions(num_threads=1)).batch(STEP // ranks))
    return Reader(lambda: ([int(each) for each in batch] for batch in iterator), iterator.get_state, iterator.set_state)


def by_litdata(folder: Path, rank: int, ranks: int) -> Reader:
    """litdata's StreamingDataset over chunks of its own, shuffled, in its StreamingDataLoader."""
    import litdata
    from litdata.utilities.env import _DistributedEnv

    made = litdata.StreamingDataset(str(folder / "litdata"), shuffle=True, drop_last=False, seed=0)
    made.distributed_env = _DistributedEnv(ranks, rank, 1)
    loader = litdata.StreamingDataLoader(made, batch_size=STEP // ranks, num_workers=0)
    return Reader(lambda: map(Tensor.tolist, loader), loader.state_dict, loader.load_state_dict)


def by_webdataset(folder: Path, rank: int, ranks: int) -> Reader:
    """A stream of WebDataset's over the tar files, shuffled, split by node. It has no state."""
    import webdataset

    def split(urls: Any) -> Any:
        return list(urls)[rank::ranks]

    files = [str(folder / f"part-{number}.tar") for number in range(len(EDGES) - 1)]
    stream = webdataset.WebDataset(files, nodesplitter=split, shardshuffle=False, seed=0, empty_check=False)
    shuffled = stream.shuffle(100, seed=0).to_tuple("cls").map_tuple(int)

    def steps() -> Stream:
        for (batch,) in shuffled.batched(STEP // ranks):
            yield [int(each) for each in batch]

    return Reader(steps)


def write(folder: Path) -> None:
    """The samples, in each format."""
    for number, (start, stop) in enumerate(itertools.pairwise(EDGES)):
        table = pa.table({"number": pa.array(range(start, stop), pa.int64())})
        parquet.write_table(table, folder / f"part-{number}.parquet", row_group_size=50)
        with open(folder / f"part-{number}.jsonl", "w") as file:
            file.writelines(f"{json.dumps({'number': each})}\n" for each in range(start, stop))
        with tarfile.open(folder / f"part-{number}.tar", "w") as tar:
            for each in range(start, stop):
                content = str(each).encode()
                member = tarfile.TarInfo(f"{each:06}.cls")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def in_chunks(folder: Path) -> None:
    """litdata's own format."""
    from litdata.streaming import Cache

    cache = Cache(str(folder / "litdata"), chunk_size=50)
    for number in range(SAMPLES):
        cache[number] = number
    cache.done()
    cache.merge()


def steps_of(open_: Open, ranks: int, states: Sequence[Any] | None = None, most: int = 10**9) -> Any:
    """What each step of an epoch has over all ranks, and the states after the last."""
    readers = [open_(rank, ranks) for rank in range(ranks)]
    if states is not None:
        for rank, reader in enumerate(readers):
            reader.load(states[rank % len(states)])
    streams = [iter(reader.steps()) for reader in readers]
    steps: list[list[int]] = []
    while len(steps) < most:
        step = [each for stream in streams for each in next(stream, [])]
        if not step:
            break
        steps.append(step)
    known = None if readers[0].state is None else [reader.state() for reader in readers]  # type: ignore[misc]
    return steps, known


def counted(steps: Sequence[list[int]]) -> dict[str, int]:
    """Samples of an epoch that came never, and more than once."""
    times = Counter(itertools.chain.from_iterable(steps))
    return {"lost": SAMPLES - len(times), "twice": sum(count > 1 for count in times.values())}


def measured(open_: Open) -> dict[str, Any]:
    """All of it for a loader; what it raises in place of figures."""
    found: dict[str, Any] = {"epoch": {}, "resumed": {}}
    alone: list[list[int]] = []
    for ranks in RANKS:
        try:
            steps, _ = steps_of(open_, ranks)
        except Exception as error:
            found["epoch"][str(ranks)] = {"raised": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        alone = alone or steps
        same = sum(sorted(one) == sorted(other) for one, other in zip(alone, steps, strict=False))
        found["epoch"][str(ranks)] = {**counted(steps), "steps_as_one": f"{same} of {len(alone)}"}
    for before, after in CHANGES:
        try:
            steps, states = steps_of(open_, before, most=STOP)
            if states is None:
                found["resumed"] = "it has no state"
                break
            rest, _ = steps_of(open_, after, states)
            found["resumed"][f"{before} to {after}"] = counted(steps + rest)
        except Exception as error:
            found["resumed"][f"{before} to {after}"] = {"raised": f"{type(error).__name__}: {str(error)[:200]}"}
    return found


def by_instep(data: Any, folder: Path, teams: Sequence[int], changes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The same for Instep: trained an epoch by teams, stopped and resumed by others, and with a worker killed."""
    given: Recipe = recipe(data, model=partial(Seen, SAMPLES), batch=STEP, microbatches=15, steps=-(-SAMPLES // STEP))
    found: dict[str, Any] = {"epoch": {}, "resumed": {}}
    digests = []
    for workers in teams:
        run = train_here(given, team_of(workers), folder / f"{workers}")
        digests.append(run.digest)
        found["epoch"][str(workers)] = {**of_seen(run), "bits_as_one": run.digest == digests[0]}
    for before, after in changes:
        path = folder / f"{before} to {after}"
        begin(path, given, team_of(before), STOP)
        run = go_on(path, given, Team(workers=after, loaders=LOADERS[before]))
        found["resumed"][f"{before} to {after}"] = {**of_seen(run), "bits_as_one": run.digest == digests[0]}
    client = Client(act_on("merged", lambda pid: os.kill(pid, signal.SIGKILL), STOP))
    run = train_here(given, team_of(3), folder / "killed", client=client)
    found["killed"] = {**of_seen(run), "bits_as_one": run.digest == digests[0], "deaths": run.result["restarts"]}
    return found


def team_of(workers: int) -> Team:
    """With as many loaders as it is to have."""
    return Team(workers=workers, loaders=LOADERS[workers])


def of_seen(run: Outcome) -> dict[str, int]:
    """As `counted`, of a run."""
    path, _ = RunFolder(run.path).newest_checkpoint()
    assert path is not None
    seen = checkpoint.load(path).model_state["seen"]
    return {"lost": int((seen == 0).sum()), "twice": int((seen > 1).sum())}


CONTENDERS: dict[str, tuple[Callable[[Path, int, int], Reader], str]] = {
    "torch DataLoader": (by_torch, "torch"),
    "torchdata": (by_torchdata, "torchdata"),
    "datasets": (by_datasets, "datasets"),
    "datasets, unshuffled": (partial(by_datasets, shuffled=False), "datasets"),
    "grain": (by_grain, "grain"),
    "litdata": (by_litdata, "litdata"),
    "webdataset": (by_webdataset, "webdataset"),
}


def main() -> None:
    """Measures all, and writes the result after each."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    quick = "--quick" in sys.argv
    result: dict[str, Any] = {
        "machine": machine(), "samples": SAMPLES, "step": STEP, "stopped_after": STOP, "loaders": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(folder)
        for name, found in ours(folder, quick) if quick else itertools.chain(ours(folder), others(folder)):
            result["loaders"][name] = found
            print(name, json.dumps(found), flush=True)
            if not quick:
                RESULT.write_text(json.dumps(result, indent=1) + "\n")


def ours(folder: Path, quick: bool = False) -> Iterator[tuple[str, Any]]:
    """The same of Instep. First, as its teams are forked from here, and other libraries start threads."""
    teams, changes = (RANKS[:2], CHANGES[3:4]) if quick else (RANKS, CHANGES)
    for name, make in FORMATS.items():
        data = make(folder / "instep" / name, tuple(itertools.pairwise(EDGES)))
        yield f"instep, {name}", by_instep(data, folder / "runs" / name, teams, changes)
    for name, package, data in (("grain", "grain", of_grain), ("litdata", "litdata", partial(of_litdata, folder))):
        try:
            known = f"instep, {name} {metadata.version(package)}"
            data()
        except Exception as error:
            yield f"instep, {name}", {"left out": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        yield known, by_instep(data, folder / "runs" / name, teams, changes)


def of_grain() -> Any:
    """A MapDataset."""
    import grain

    return grain.MapDataset.source(Numbers())


def of_litdata(folder: Path) -> Any:
    """A StreamingDataset, which says that it is iterable."""
    import litdata

    if not (folder / "litdata").exists():
        in_chunks(folder)
    return litdata.StreamingDataset(str(folder / "litdata"), shuffle=False, drop_last=False)


def others(folder: Path) -> Iterator[tuple[str, Any]]:
    """By name and version, what was measured."""
    for name, (open_, package) in CONTENDERS.items():
        try:
            known = f"{name} {metadata.version(package)}"
            if name == "litdata" and not (folder / "litdata").exists():
                in_chunks(folder)
        except Exception as error:
            yield name, {"left out": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        yield known, measured(partial(open_, folder))


if __name__ == "__main__":
    main()

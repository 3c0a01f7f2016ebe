"""Virtual time: what comes next, how long workers take, and who shares a link with whom."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.clock.link import Link
from instep.clock.loop import Loop
from instep.clock.network import Network, gather_bytes, reduce_bytes
from instep.clock.slow import parse_slow, slow_factors, slowness
from instep.clock.times import Failures, WorkerTimes
from instep.errors import RecipeError
from support.kinds import quick

pytestmark = pytest.mark.pure

TIMES: dict[str, Callable[..., WorkerTimes]] = {
    "normal": lambda **more: WorkerTimes.normal(2.0, 0.3, **more),
    "cut normal": lambda **more: WorkerTimes.normal(1.0, 2.0, **more),
    "lognormal": lambda **more: WorkerTimes.lognormal(2.0, 1.0, **more),
    "bootstrap": lambda **more: WorkerTimes.bootstrap([1.0, 2.0, 2.0, 7.0], **more),
}
_CUT = statistics.NormalDist().pdf(0.5) / statistics.NormalDist().cdf(0.5)
MOMENTS = {  # mean and standard deviation; of the cut normal: Johnson, Kotz and Balakrishnan, 1994, section 13.10.1
    "normal": (2.0, 0.3),
    "cut normal": (1 + 2 * _CUT, 2 * math.sqrt(1 - 0.5 * _CUT - _CUT**2)),
    "lognormal": (2.0, 1.0),
    "bootstrap": (3.0, statistics.pstdev([1.0, 2.0, 2.0, 7.0])),
}


def drawn(times: WorkerTimes, workers: int, count: int) -> np.ndarray[Any, Any]:
    """[W, count]: the first times of each worker."""
    draw = times.draws(workers)
    return np.array([[draw(worker) for _ in range(count)] for worker in range(workers)])


# The loop


def test_calls_come_in_order_of_time_and_at_one_time_in_the_order_they_were_asked_for() -> None:
    loop, seen = Loop(), []
    for time_s, name in [(2.0, "c"), (1.0, "a"), (2.0, "d"), (1.0, "b")]:
        loop.at(time_s, lambda name: seen.append((loop.now_s, name)), name)
    loop.run()
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c"), (2.0, "d")]


def test_a_call_may_ask_for_others_and_cancel_them_and_stop_the_loop() -> None:
    loop, seen = Loop(), []

    def tick(count: int) -> None:
        seen.append(loop.now_s)
        loop.at(loop.now_s + 0.5, tick, count + 1)
        unwanted = loop.at(loop.now_s + 0.25, seen.append, math.nan)
        loop.cancel(unwanted)
        if count == 3:
            loop.stop()

    loop.at(1.0, tick, 0)
    loop.run()
    assert seen == [1.0, 1.5, 2.0, 2.5]


@given(st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=400))
def test_calls_come_in_order_however_many_wait(asked: list[tuple[int, list[int]]]) -> None:
    loop, seen, wanted = Loop(), [], []

    def call(argument: tuple[int, list[int]]) -> None:
        token, more = argument
        seen.append((loop.now_s, token))
        for delay in more:
            ask(loop.now_s + delay, [])

    def ask(time_s: float, more: list[int]) -> None:
        wanted.append((time_s, len(wanted)))
        loop.at(time_s, call, (len(wanted) - 1, more))

    for time_s, more in asked:
        ask(float(time_s), more)
    loop.run()
    assert seen == sorted(wanted)


# Sharing a link


def ends(rate: float, transfers: list[tuple[float, float]], broken: dict[int, float] | None = None) -> list[float]:
    """When each transfer (start, bytes) ends; -1 for one that is broken off before."""
    loop = Loop()
    found = [-1.0] * len(transfers)
    tokens = [0] * len(transfers)

    def end(number: int) -> None:
        found[number] = loop.now_s

    link = Link(loop, rate, end)

    def start(number: int) -> None:
        tokens[number] = link.send(transfers[number][1], number)

    def stop(number: int) -> None:
        if found[number] < 0:
            link.cancel(tokens[number])

    for number, (start_s, _) in enumerate(transfers):
        loop.at(start_s, start, number)
    for number, stop_s in (broken or {}).items():
        loop.at(stop_s, stop, number)
    loop.run()
    return found


def slow_ends(
    rate: float, transfers: list[tuple[float, float]], broken: dict[int, float], step_s: float
) -> list[float]:
    """The same in small steps: in each, every transfer under way gets its share."""
    left = [size for _, size in transfers]
    found = [-1.0] * len(transfers)
    for tick in itertools.count():
        now_s = tick * step_s
        gone = [number for number, stop_s in broken.items() if stop_s <= now_s]
        waiting = [n for n in range(len(left)) if found[n] < 0 and n not in gone]
        if not waiting:
            return found
        active = [number for number in waiting if transfers[number][0] <= now_s]
        for number in active:
            left[number] -= rate * step_s / len(active)
            if left[number] <= 1e-9:
                found[number] = now_s + step_s
    raise AssertionError


def test_a_lone_transfer_has_the_whole_link_and_two_share_it() -> None:
    assert ends(100.0, [(1.0, 50.0)]) == [1.5]
    assert ends(100.0, [(0.0, 100.0), (0.0, 100.0)]) == [2.0, 2.0]
    assert ends(100.0, [(0.0, 100.0), (0.5, 100.0)]) == [1.5, 2.0]
    assert ends(100.0, [(0.0, 300.0), (1.0, 50.0)]) == [3.5, 2.0]
    assert ends(100.0, [(0.0, 100.0), (5.0, 100.0)]) == [1.0, 6.0]
    assert ends(100.0, [(0.0, 0.0), (0.0, 100.0)]) == [0.0, 1.0]


def test_a_transfer_that_is_broken_off_leaves_its_share_to_the_others() -> None:
    assert ends(100.0, [(0.0, 100.0), (0.0, 100.0)], {0: 1.0}) == [-1.0, 1.5]
    assert ends(100.0, [(0.0, 100.0), (0.0, 50.0), (3.0, 100.0)], {0: 0.5, 1: 0.5}) == [-1.0, -1.0, 4.0]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=8),
    st.dictionaries(st.integers(0, 7), st.integers(0, 40), max_size=3),
)
def test_a_link_is_shared_as_in_small_steps(transfers: list[tuple[int, int]], broken: dict[int, int]) -> None:
    given_s = [(start / 10, size / 10) for start, size in transfers]
    # A break is put just after its tick, so that it never coincides with an end.
    broken_s = {n: max(stop / 10, given_s[n][0]) + 0.0371 for n, stop in broken.items() if n < len(transfers)}
    exact, slow = ends(1.0, given_s, broken_s), slow_ends(1.0, given_s, broken_s, 0.001)
    for number, (one, other) in enumerate(zip(exact, slow, strict=True)):
        if number in broken_s and min(abs(broken_s[number] - time) for time in (one, other)) < 0.02:
            continue  # too close to tell
        assert one == pytest.approx(other, abs=0.02)


def test_ten_thousand_equal_transfers_that_start_together_end_together() -> None:
    assert set(ends(10.0, [(0.0, 1.0)] * 10_000)) == {1000.0}


# The network


def test_collectives_take_what_the_formulas_say() -> None:
    network = Network(bandwidth_bytes_per_s=100.0, latency_s=0.5)
    assert network.ring_all_reduce_s(4, 200.0) == 2 * 3 / 4 * 2.0 + 6 * 0.5
    assert network.ring_all_reduce_s(1, 200.0) == 0
    assert Network().ring_all_reduce_s(8, 1e9) == 0
    assert (reduce_bytes(4, 200, 4), reduce_bytes(4, 200, 7), gather_bytes(4, 200)) == (600, 1050, 600)
    assert network.ring_all_reduce_s(4, 200.0, 3) == 4 * 3 / 4 * 2.0 + 6 * 0.5


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("1Gb/s", 1.25e8), ("100MB/s", 1e8), ("8 kbit/s", 1000), ("1GiB/s", 2**30), ("10Gbps", 1.25e9), ("5B/s", 5)],
)
def test_bandwidths_are_read_in_bits_and_bytes(text: str, bytes_per_s: float) -> None:
    assert Network.from_text(text).bandwidth_bytes_per_s == bytes_per_s


@pytest.mark.parametrize(("text", "seconds"), [("1ms", 1e-3), ("20us", 20e-6), ("0", 0), ("1.5 s", 1.5), ("2min", 120)])
def test_latencies_are_read_with_their_units(text: str, seconds: float) -> None:
    assert Network.from_text(latency=text).latency_s == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("bandwidth", "latency", "sentence"),
    [
        ("0Gb/s", None, "the bandwidth is 0 bytes/s, over which nothing would ever arrive"),
        ("-1Gb/s", None, "the bandwidth is -1.25e+08 bytes/s"),
        ("1000", None, "the bandwidth is '1000'; write it in bits, as '1Gb/s', or in bytes"),
        ("1ib/s", None, "the bandwidth is '1ib/s'"),
        (None, "1", "the latency is '1'; write a time from 0 with its unit"),
        (None, "-1ms", "the latency is '-1ms'"),
        (None, "1parsec", "the latency is '1parsec'"),
    ],
)
def test_a_network_that_makes_no_sense_is_refused_in_one_sentence(
    bandwidth: str | None, latency: str | None, sentence: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        Network.from_text(bandwidth, latency)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


# The times of workers


@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize("persistence", quick([0.0, 0.6, 1.0], 0.6))
def test_over_many_workers_times_have_their_mean_and_deviation_whatever_persists(kind: str, persistence: float) -> None:
    found = drawn(TIMES[kind](persistence=persistence, seed=3), 3000, 20)
    mean, deviation = MOMENTS[kind]
    independent = 3000 if persistence else 60_000
    assert found.min() > 0
    assert abs(found.mean() - mean) < 5 * deviation / math.sqrt(independent)
    assert found.std() == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize("persistence", [0.0, 0.6, 0.95])
def test_neighbouring_times_correlate_by_the_persistence(persistence: float) -> None:
    logs = np.log(drawn(TIMES["lognormal"](persistence=persistence), 200, 300))
    logs -= np.log(2.0) - math.log(1.25) / 2
    assert (logs[:, 1:] * logs[:, :-1]).mean() / (logs**2).mean() == pytest.approx(persistence, abs=0.03)


@pytest.mark.parametrize("kind", TIMES)
def test_with_persistence_one_a_worker_keeps_its_time(kind: str) -> None:
    found = drawn(TIMES[kind](persistence=1.0), 50, 300)
    assert (found == found[:, :1]).all()
    assert len(set(found[:, 0])) > 2


@pytest.mark.parametrize("kind", TIMES)
def test_times_depend_on_seed_and_worker_and_on_nothing_else(kind: str) -> None:
    times = TIMES[kind](persistence=0.5, seed=7)
    alone = drawn(times, 3, 300)
    draw = times.draws(5)
    mixed = np.array([[draw(worker) for worker in (4, 2, 1, 0, 3)] for _ in range(300)])
    assert (alone == mixed[:, [3, 2, 1]].T).all()
    assert not (alone[0] == alone[1]).all()
    assert not (drawn(TIMES[kind](persistence=0.5, seed=8), 3, 300) == alone).all()


def test_times_are_those_of_the_series_worked_out_number_by_number() -> None:
    times = WorkerTimes.lognormal(2.0, 1.0, persistence=0.6, seed=3, slow=parse_slow("1:3x"))
    found = drawn(times, 3, 300)
    scale = math.sqrt(math.log1p(0.25))
    for worker, factor in enumerate([1.0, 3.0, 1.0]):
        generator = np.random.default_rng(np.random.SeedSequence(3, spawn_key=(worker, 0)))
        z = generator.standard_normal()
        for time_s in found[worker]:
            assert time_s == np.exp(math.log(2.0) - math.log1p(0.25) / 2 + scale * z) * factor
            z = 0.6 * z + math.sqrt(1 - 0.6**2) * generator.standard_normal()


def test_a_spread_of_nothing_is_constant() -> None:
    for times in (WorkerTimes.constant(2.0), WorkerTimes.normal(2.0, 0.0), WorkerTimes.bootstrap([2.0])):
        assert (drawn(times, 2, 200) == 2.0).all()


def test_times_are_read_from_texts_and_files(tmp_path: Path) -> None:
    assert WorkerTimes.from_text("100ms") == WorkerTimes.constant(0.1)
    assert WorkerTimes.from_text("constant:2s", seed=4) == WorkerTimes.constant(2.0, seed=4)
    assert WorkerTimes.from_text("normal:1s, 20ms", persistence=0.5) == WorkerTimes.normal(1.0, 0.02, persistence=0.5)
    assert WorkerTimes.from_text("lognormal:1s,1s") == WorkerTimes.lognormal(1.0, 1.0)
    file = tmp_path / "times.txt"
    file.write_text("0.1, 0.2\n0.3 4e-1\n")
    assert WorkerTimes.from_text(f"bootstrap:{file}") == WorkerTimes.bootstrap([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: WorkerTimes.constant(0.0), "the mean time of a microbatch is 0 s"),
        (lambda path: WorkerTimes.normal(1.0, -1.0), "the standard deviation of times is -1 s"),
        (lambda path: WorkerTimes.normal(math.nan, 1.0), "the mean time of a microbatch is nan s"),
        (lambda path: WorkerTimes.normal(1.0, 1.0, persistence=1.5), "the persistence is 1.5"),
        (lambda path: WorkerTimes.bootstrap([]), "there are no times to draw from"),
        (lambda path: WorkerTimes.bootstrap([1.0, -2.0]), "-2 s is among the times to draw from"),
        (lambda path: WorkerTimes.from_text("gamma:1s,2s"), "'gamma:1s,2s' are no worker times"),
        (lambda path: WorkerTimes.from_text("normal:1s"), "'normal:1s' are no worker times"),
        (lambda path: WorkerTimes.from_text("fast"), "'fast' in the worker times is 'fast'"),
        (lambda path: WorkerTimes.bootstrap(path / "none"), "the file of times "),
        (lambda path: WorkerTimes.bootstrap(path), "the file of times "),
        (lambda path: Failures(0.0, 1.0), "the mean time between failures is 0 s"),
        (lambda path: Failures(1.0, -1.0), "the restart after a failure takes -1 s"),
    ],
)
def test_times_that_make_no_sense_are_refused_in_one_sentence(
    make: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        make(tmp_path)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_a_file_without_numbers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "times.txt"
    for text, sentence in [("", "is empty"), ("0.1 soon", "'soon' in the file of times")]:
        file.write_text(text)
        with pytest.raises(RecipeError, match=sentence):
            WorkerTimes.bootstrap(file)


def test_failures_come_at_their_mean_rate_and_by_seed_and_worker() -> None:
    times = WorkerTimes.constant(1.0, failures=Failures(50.0, 1.0), seed=5)
    found = list(itertools.islice(times.uptimes(3), 4000))
    assert statistics.mean(found) == pytest.approx(50.0, rel=0.08)
    assert found[:9] == list(itertools.islice(times.uptimes(3), 9)) != list(itertools.islice(times.uptimes(2), 9))
    assert list(WorkerTimes.constant(1.0).uptimes(0)) == []


# Slow workers


@pytest.mark.parametrize(
    ("text", "workers", "factors"),
    [
        ("1:4x", 3, [1, 4, 1]),
        ("1:4", 2, [1, 4]),
        ("0:1.5x, 2:3x", 3, [1.5, 1, 3]),
        ("50%:2x", 4, [1, 1, 2, 2]),
        ("40%:2x", 4, [1, 1, 2, 2]),
        ("5%:4x", 20, [1] * 19 + [4]),
        ("100%:2x", 2, [2, 2]),
        ("0:3x,40%:2x", 5, [3, 1, 1, 2, 2]),
    ],
)
def test_slow_workers_are_named_by_number_or_by_share_of_the_last(
    text: str, workers: int, factors: list[float]
) -> None:
    assert slow_factors(parse_slow(text), workers).tolist() == factors


def test_slow_workers_take_their_factor_longer() -> None:
    for make in (lambda **more: WorkerTimes.constant(2.0, **more), TIMES["lognormal"]):
        plain, slow = drawn(make(), 3, 200), drawn(make(slow=parse_slow("1:4x")), 3, 200)
        assert (slow == plain * [[1], [4], [1]]).all()


def test_workers_may_be_slow_in_some_steps_alone() -> None:
    factor = slowness(parse_slow("1:4x@100..200, 0:2x@200..300, 1:3x@200 .. 201,50%:5x@0..7"), 2)
    assert [factor(0)(step) for step in (0, 199, 200, 299, 300)] == [1, 1, 2, 2, 1]
    assert [factor(1)(step) for step in (0, 6, 7, 99, 100, 199, 200, 201)] == [5, 5, 1, 1, 4, 4, 3, 1]


@pytest.mark.parametrize("text", ["1:4x@5..9,1:2x@8..20", "1:4x,1:2x@8..20", "1:4x@0..9,50%:2x@8..20"])
def test_a_worker_has_one_factor_in_a_step(text: str) -> None:
    with pytest.raises(RecipeError, match="worker 1 is named by both .* in the same steps; name it once"):
        slowness(parse_slow(text), 2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("4:2x", "'4:2x' names no worker of a team of 4 (workers 0 to 3)"),
        ("5%:4x", "'5%:4x' names no worker of a team of 4"),
        ("1:4x,1:2x", "worker 1 is named by both '1:4x' and '1:2x'"),
        ("3:4x,25%:2x", "worker 3 is named by both"),
        ("1:0x", "'0x' in '1:0x' is no factor"),
        ("1:0.5x", "'0.5x' in '1:0.5x' is no factor"),
        ("1:-4x", "'-4x' in '1:-4x' is no factor"),
        ("1:nan", "'nan' in '1:nan' is no factor"),
        ("1:infx", "'infx' in '1:infx' is no factor"),
        ("1:fast", "'fast' in '1:fast' is no factor"),
        ("0%:2x", "'0%' in '0%:2x' is no share"),
        ("101%:2x", "'101%' in '101%:2x' is no share"),
        ("-1:2x", "'-1:2x' does not say who is slow"),
        ("1", "'1' does not say who is slow"),
        ("1:4x,", "'' does not say who is slow"),
        ("1:4x@5", "'5' in '1:4x@5' are no steps; write the first and the one after the last, as in '1:4x@100..200'."),
        ("1:4x@", "'' in '1:4x@' are no steps"),
        ("1:4x@200..100", "'200..100' in '1:4x@200..100' are no steps"),
        ("1:4x@7..7", "'7..7' in '1:4x@7..7' are no steps"),
        ("1:4x@-1..7", "'-1..7' in '1:4x@-1..7' are no steps"),
        ("@1..7", "'@1..7' does not say who is slow"),
        ("1:4x@1..7", "'1:4x@1..7' names steps, which workers on a virtual clock are not slow by; leave '@1..7' out."),
    ],
)
def test_a_slow_spec_that_makes_no_sense_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        slow_factors(parse_slow(text), 4)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)

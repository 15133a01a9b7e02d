"""The time that a run still takes: at every moment close to the truth, whatever sparse levels take."""

from __future__ import annotations

import heapq
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tombola.engine.forecast import Forecast, Speed, Step, Timing, makespan, refine
from tombola.study.chains import Chain, Finished, Progress, Waiting
from tombola.study.planner import Planner
from tombola.study.trainings import Training

FRACTION, LEVELS, ITERATIONS = 0.2, 20, 1000


def planner(levels: int = LEVELS) -> Planner:
    """What a forecast reads of a planner."""
    study = SimpleNamespace(levels=levels, fraction=FRACTION, recipe=SimpleNamespace(rewind=0), score_at="end")
    of_chain = {"levels": lambda _: range(levels + 1), "length": lambda *_: ITERATIONS, "learning_length": lambda _: 0}
    return cast(Planner, SimpleNamespace(study=study, end=ITERATIONS, **of_chain))


def training(key: str, level: int) -> Training:
    mask: Any = SimpleNamespace(density=(1 - FRACTION) ** level)
    return Training(key, {}, cast(Any, None), mask, 0, 0, ITERATIONS)


def kernels(density: float) -> float:
    """Seconds of an iteration: the sparsest take a tenth of the dense, and there is a jump to sparse layers."""
    return 0.01 * (0.1 + 0.65 * density + (0.25 if density > 0.3 else 0.0))


def time_speed(error: float, at: tuple[int, ...] = (0, LEVELS // 2, LEVELS)) -> Speed:
    """What is timed before a run: a few levels, all of them wrong by a factor."""
    known = {(1 - FRACTION) ** level: error * kernels((1 - FRACTION) ** level) for level in at}
    return Speed(known, beside=0.5 * error, start=0.0, source="timed")


class Simulation:
    """A run of made-up trainings on a clock of its own: (time, forecast) after each event, and when it was over.

    Chains of a seed share level 0. Workers take the longest chain first, as a run does; each training tells of itself
    `tells` times, and is in its store `beside` seconds after its last iteration.
    """

    def __init__(self, chains: list[Chain], workers: int, speed: Speed | None, tells: int = 10) -> None:
        self.now = 0.0
        self.said: list[tuple[float, float | None]] = []
        levels = dict.fromkeys(chains, 0)
        running: dict[str, tuple[Training, int]] = {}
        events: list[tuple[float, str, int]] = []
        forecast = Forecast(planner(), workers, speed, clock=lambda: self.now)
        beside = 0.5

        def progress() -> dict[Chain, Progress]:
            return {
                chain: Progress((), (), Waiting(training(self.key(chain, level), level), LEVELS + 1 - level, 1))
                if level <= LEVELS
                else Progress((), (), Finished())
                for chain, level in levels.items()
            }

        self.said.append((0.0, forecast.seconds_left(progress(), running)))
        while True:
            waiting = {p.waits_for.key: p for p in progress().values() if p.waits_for}
            for key, each in sorted(waiting.items(), key=lambda item: -item[1].remaining):
                if key not in running and len(running) < workers:
                    assert each.waits_for is not None
                    running[key] = each.waits_for, 0
                    seconds = ITERATIONS * kernels(each.waits_for.mask.density)
                    for part in range(1, tells + 1):
                        heapq.heappush(events, (self.now + seconds * part / tells, key, ITERATIONS * part // tells))
                    heapq.heappush(events, (self.now + seconds + beside, key, -1))
            if not events:
                break
            self.now, key, iteration = heapq.heappop(events)
            done, _ = running[key]
            if iteration >= 0:
                running[key] = done, iteration
            else:
                del running[key]
                each_iteration = kernels(done.mask.density)
                taken = ITERATIONS * each_iteration + beside
                record = {"seconds_per_iteration": each_iteration, "iterations": ITERATIONS, "seconds": taken}
                forecast.add(done, record)
                levels = {c: level + (self.key(c, level) == key) for c, level in levels.items()}
            self.said.append((self.now, forecast.seconds_left(progress(), running)))

    @staticmethod
    def key(chain: Chain, level: int) -> str:
        return f"{chain.seed} {level} {chain.importance if level else ''}"

    def errors(self, after: float = 0.0, until: float = 0.95) -> list[float]:
        """The relative errors of what was said in this part of the run, given as shares of its time."""
        return [
            abs(said - (self.now - at)) / (self.now - at)
            for at, said in self.said
            if said is not None and after * self.now <= at <= until * self.now
        ]


CHAINS = [Chain(seed, importance) for seed in (0, 1) for importance in ("magnitude", "l1", "l2")]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_forecast_is_within_a_fifth_of_the_truth_at_every_moment(workers: int) -> None:
    every_level = Simulation(CHAINS, workers, time_speed(1.0, tuple(range(LEVELS + 1))))
    assert every_level.said[0][1] == pytest.approx(every_level.now, rel=0.02)
    assert max(every_level.errors()) < 0.05
    three_levels = Simulation(CHAINS, workers, time_speed(1.0))
    assert max(three_levels.errors()) < 0.2


@pytest.mark.parametrize("error", [0.5, 2.0])
def test_a_forecast_from_wrong_timings_is_put_right_by_the_first_trainings(error: float) -> None:
    run = Simulation(CHAINS, 2, time_speed(error))
    assert run.said[0][1] == pytest.approx(error * run.now, rel=0.2)
    assert max(run.errors(after=0.05)) < 0.2


def test_a_run_that_was_never_timed_learns_from_what_it_does() -> None:
    run = Simulation(CHAINS[:1], 1, None)
    assert run.said[0][1] is None
    first = next((at, said) for at, said in run.said if said is not None)
    assert first[0] < 0.05 * run.now  # in the middle of the first training
    assert first[1] == pytest.approx(LEVELS * ITERATIONS * kernels(1.0), rel=0.1)  # as if all were dense
    assert max(run.errors(after=0.9)) < 0.2


def test_between_two_trainings_a_forecast_follows_the_clock() -> None:
    now = 0.0
    forecast = Forecast(planner(0), 1, Speed({1.0: 0.01}, 2.0, 5.0, ""), clock=lambda: now)
    chain = {Chain(0, "l1"): Progress((), (), Waiting(training("a", 0), 1, 1))}
    assert forecast.seconds_left(chain, {}) == pytest.approx(5 + 12)
    running = {"a": (training("a", 0), 0)}
    assert forecast.seconds_left(chain, running) == pytest.approx(12)  # the workers are there
    now = 0.5
    assert forecast.seconds_left(chain, running) == pytest.approx(11.5)
    now = 4.0
    assert forecast.seconds_left(chain, running) == pytest.approx(8)
    now = 40.0
    assert forecast.seconds_left(chain, running) == 0  # late, not less than nothing
    assert forecast.seconds_left({Chain(0, "l1"): Progress((), (), Finished())}, {}) == 0


NAMES = st.integers(0, 5)
SECONDS = st.floats(0.01, 100)


@st.composite
def plans(draw: st.DrawFn) -> list[list[Step]]:
    """Chains of which some share their first step."""
    chains = []
    first = {group: draw(SECONDS) for group in range(3)}
    for number in range(draw(st.integers(1, 6))):
        group = draw(st.integers(0, 2))
        own = draw(st.lists(SECONDS, max_size=5))
        shared = [Step((f"shared {group}", 0), first[group])]
        chains.append(shared + [Step((f"chain {number}", level), each) for level, each in enumerate(own, 1)])
    return chains


@given(plans(), st.integers(1, 4))
def test_a_makespan_lies_between_the_bounds_of_list_scheduling(chains: list[list[Step]], workers: int) -> None:
    """Graham (Bell System Technical Journal 45, 1966): no worker idles while a step is ready."""
    total = sum({step.name: step.seconds for chain in chains for step in chain}.values())
    longest = max(sum(step.seconds for step in chain) for chain in chains)
    found = makespan(chains, workers)
    assert max(total / workers, longest) <= found * (1 + 1e-9)
    assert found <= (total / workers + longest * (1 - 1 / workers)) * (1 + 1e-9)
    assert makespan(chains, 100) == pytest.approx(longest)
    assert makespan(chains, 1) == pytest.approx(total)


@given(plans(), st.integers(1, 4), st.floats(0, 1))
def test_what_has_begun_takes_what_is_left_of_it(chains: list[list[Step]], workers: int, left: float) -> None:
    first = chains[0][0]
    rest = makespan(chains, workers, {first.name: left * first.seconds})
    shortened = [
        [Step(step.name, left * step.seconds if step.name == first.name else step.seconds) for step in chain]
        for chain in chains
    ]
    total = sum({step.name: step.seconds for chain in shortened for step in chain}.values())
    longest = max(sum(step.seconds for step in chain) for chain in shortened)
    assert max(total / workers, longest) <= rest * (1 + 1e-9)
    assert rest <= (total / workers + longest * (1 - 1 / workers)) * (1 + 1e-9)


DENSITIES = st.integers(0, LEVELS).map(lambda level: (1 - FRACTION) ** level)


@given(
    st.dictionaries(DENSITIES, st.floats(1e-4, 1), min_size=1, max_size=5),
    st.dictionaries(DENSITIES, st.floats(1e-4, 1), min_size=1, max_size=5),
    st.floats(0.1, 10),
)
def test_refining(prior: dict[float, float], seen: dict[float, float], factor: float) -> None:
    before = Speed(prior, 1.0, 0.0, "")
    refined = refine(before, [Timing(density, each, 3.0) for density, each in seen.items()])
    for density, each in seen.items():
        assert refined.iteration_at(density) == pytest.approx(each)  # as it was seen
    assert refined.beside == 3.0
    assert refine(before, []) == before
    # where one of the known densities takes `factor` times as long, so do those that were not seen
    density = max(prior)
    slower = refine(before, [Timing(density, factor * prior[density])])
    for other in prior:
        assert slower.iteration_at(other) == pytest.approx(factor * prior[other])
    assert slower.beside == 1.0


def test_a_record_without_times_says_nothing() -> None:
    assert Timing.of(0.5, {"seconds_per_iteration": None, "seconds": 3.0, "iterations": 1}) is None
    assert Timing.of(0.5, {"seconds_per_iteration": 0.2, "seconds": 3.0, "iterations": 10}) == Timing(0.5, 0.2, 1.0)
    assert Timing.of(0.5, {"seconds_per_iteration": 0.4, "seconds": 3.0, "iterations": 10}) == Timing(0.5, 0.4, 0.0)

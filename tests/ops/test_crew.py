"""Threads that share an op's work."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cupy_engine.ops._crew import Crew, crew, even_cuts


def test_every_part_is_done_once_in_several_threads() -> None:
    done: list[tuple[int, str]] = []

    def work(number: int) -> None:
        time.sleep(0.005)
        done.append((number, threading.current_thread().name))

    Crew(3).run(work, [(i,) for i in range(20)])
    assert sorted(number for number, _ in done) == list(range(20))
    assert len({name for _, name in done}) == 3


def test_one_thread_needs_no_helper() -> None:
    before = threading.active_count()
    names: list[str] = []
    for team in (Crew(1), Crew(2)):
        team.run(lambda: names.append(threading.current_thread().name), [()])
    assert names == [threading.current_thread().name] * 2
    assert threading.active_count() == before
    Crew(2).run(names.append, [])


@pytest.mark.parametrize("failing", range(4))
def test_what_a_part_raises_reaches_the_caller_and_the_crew_lives_on(failing: int) -> None:
    team = Crew(2)

    def work(number: int) -> None:
        time.sleep(0.002)
        if number == failing:
            raise ValueError(f"part {number}")

    with pytest.raises(ValueError, match=f"part {failing}"):
        team.run(work, [(i,) for i in range(4)])
    done: list[int] = []
    team.run(done.append, [(i,) for i in range(8)])
    assert sorted(done) == list(range(8))


def test_callers_do_not_mix_up_their_jobs() -> None:
    team = Crew(2)

    def caller(base: int) -> bool:
        for _ in range(50):
            done: list[int] = []
            team.run(done.append, [(base + i,) for i in range(5)])
            if sorted(done) != [base + i for i in range(5)]:
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(caller, range(0, 400, 100)))


def test_one_crew_per_process() -> None:
    assert crew() is crew()
    assert crew().num_threads >= 1


@pytest.mark.parametrize(("length", "num_parts", "sizes"), [(7, 3, [3, 2, 2]), (4, 2, [2, 2]), (1, 2, [1, 0])])
def test_even_cuts(length: int, num_parts: int, sizes: list[int]) -> None:
    cuts = even_cuts(length, num_parts)
    assert [cut.stop - cut.start for cut in cuts] == sizes
    assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(length))

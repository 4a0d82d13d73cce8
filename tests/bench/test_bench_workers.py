"""Tasks in processes of which some die."""

from __future__ import annotations

import multiprocessing
import time

import pytest
from worker_tasks import Unreadable, act

from bench.workers import Finished, run_each


def test_each_task_says_how_it_ended_and_a_death_costs_only_its_own():
    tasks = ["fine 1", "die", "raise", "fine 2", "die", "fine 3", "fine 4"]
    found = list(run_each(act, tasks, jobs=2))
    assert sorted(one.task for one in found) == sorted(tasks)
    for one in found:
        if one.task == "die":
            assert one == Finished("die", "ended its process with exit code 7", died=True)
        elif one.task == "raise":
            assert one == Finished("raise", "ValueError: of no use")
        else:
            assert one == Finished(one.task, None)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_what_is_under_way_at_the_deadline_is_ended():
    begin = time.monotonic()
    found = list(run_each(act, ["sleep", "fine"], 2, deadline=begin + 4))
    assert [one.task for one in found] == ["fine"]
    assert time.monotonic() - begin < 60
    assert not multiprocessing.active_children()


def test_who_stops_listening_leaves_nothing_behind():
    results = run_each(act, ["fine", "sleep"], 2)
    next(results)
    results.close()
    assert not multiprocessing.active_children()


def test_without_tasks_nothing_is_started():
    assert list(run_each(act, [], 4)) == []


def test_processes_that_do_not_start_are_an_error():
    with pytest.raises(RuntimeError, match="exit code 9 before it had anything to do"):
        list(run_each(Unreadable(), ["fine"], 1))
    assert not multiprocessing.active_children()

"""The queue: one at a time, questions in between, cancelling, and people kept apart."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest
import torch

from lmtt.viz.jobs import NICER, BusyError, CancelledError, Worker


@pytest.fixture
def worker():
    made = Worker(most=2)
    yield made
    made.close()


def layers(steps, gate, log):
    """A run that waits for `gate` at each layer."""

    def work(report):
        log.append(0)
        for done in range(1, steps + 1):
            assert gate.wait(5)
            log.append(done)
            report(done, steps)
        return "made"

    return work


def test_a_question_is_answered_between_two_layers(worker):
    gate, log = threading.Event(), []
    run = worker.run(layers(3, gate, log), "a")
    asked = worker.ask(lambda: log.append("asked") or 7)
    gate.set()
    assert run.result.result(5) == "made"
    assert asked.result(5) == 7
    assert log.index("asked") <= 2, "it waited for the whole run"
    assert run.progress == (3, 3)


def test_runs_wait_in_line_and_everybody_has_one(worker):
    gate, log = threading.Event(), []
    first = worker.run(layers(1, gate, log), "a")
    while not log:  # until it has begun
        time.sleep(0.01)
    second, third = (worker.run(layers(1, gate, log), owner) for owner in "bc")
    assert (worker.ahead(second), worker.ahead(third)) == (1, 2)
    with pytest.raises(BusyError, match="your last run is still going"):
        worker.run(layers(1, gate, log), "a")
    with pytest.raises(BusyError, match="2 runs are waiting already"):
        worker.run(layers(1, gate, log), "d")
    gate.set()
    assert [run.result.result(5) for run in (first, second, third)] == ["made"] * 3


def test_cancelling_stops_at_the_next_layer_and_the_next_run_goes(worker):
    gate, log = threading.Event(), []
    run, waiting = worker.run(layers(50, gate, log), "a"), worker.run(layers(1, gate, log), "b")
    run.cancel()
    gate.set()
    with pytest.raises(CancelledError):
        run.result.result(5)
    assert len(log) <= 3
    assert waiting.result.result(5) == "made"


def test_one_that_waits_can_be_cancelled_before_it_begins(worker):
    gate, log = threading.Event(), []
    worker.run(layers(1, gate, log), "a")
    waiting = worker.run(layers(1, gate, []), "b")
    waiting.cancel()
    gate.set()
    with pytest.raises(CancelledError):
        waiting.result.result(5)


def test_errors_reach_who_asked_and_the_thread_lives_on(worker):
    def broken(report):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        worker.run(broken, "a").result.result(5)
    with pytest.raises(KeyError):
        worker.ask(lambda: {}["x"]).result(5)
    assert worker.ask(lambda: 1).result(5) == 1
    assert worker.run(lambda report: 2, "a").result.result(5) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a priority of its own on Linux alone")
def test_a_run_and_its_openmp_threads_give_way_to_the_server(worker):
    def priorities():
        return {
            int(task): os.getpriority(os.PRIO_PROCESS, int(task)) for task in os.listdir("/proc/self/task")
        }

    before = priorities()
    own = before[threading.get_native_id()]

    def work(report):
        threads = torch.get_num_threads()
        torch.set_num_threads(4)
        try:
            torch.rand(500, 500) @ torch.rand(500, 500)
            return threading.get_native_id(), priorities()
        finally:
            torch.set_num_threads(threads)

    thread, during = worker.run(work, "a").result.result(20)
    started = [priority for task, priority in during.items() if task not in before]
    assert started, "the multiplication went through one thread, and nothing was tested"
    assert {during[thread], *started} == {min(19, own + NICER)}
    assert during[threading.get_native_id()] == own, "the server's own thread must stay in front"

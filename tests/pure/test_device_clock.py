"""The clock of a device: the logic with events that a test lets pass, and once the real ones."""

from __future__ import annotations

import pytest
from attention_backends.backends.measure.device_clock import DeviceClock


class Gpu:
    """A device whose work is done when the test says so; each piece of it takes what `work` says."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done = 0.0
        self.capturing = self.faulty = False
        self.made = 0
        self.synchronised = 0

    def clock(self, **options: object) -> DeviceClock:
        return DeviceClock("cuda", new_event=lambda: Event(self), current_stream=lambda device: ("stream", device),
                           is_capturing=lambda: self.capturing, **options)  # fmt: skip

    def work(self, milliseconds: float) -> None:
        self.now += milliseconds

    def finish(self) -> None:
        self.done = self.now


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.at: float | None = None
        self.stream: object = None
        gpu.made += 1

    def record(self, stream: object) -> None:
        if self.gpu.faulty:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        assert self.stream in (None, stream), "an event was taken to another device"
        self.at, self.stream = self.gpu.now, stream

    def query(self) -> bool:
        if self.gpu.faulty:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.at <= self.gpu.done

    def synchronize(self) -> None:
        self.gpu.synchronised += 1
        self.gpu.done = max(self.gpu.done, self.at)

    def elapsed_time(self, other: Event) -> float:
        assert self.query(), "both events must have passed"
        assert other.query(), "both events must have passed"
        return other.at - self.at


def timed(clock: DeviceClock, gpu: Gpu, milliseconds: float, times: list[float], device: object = None) -> None:
    token = clock.start(device)
    gpu.work(milliseconds)
    clock.stop(token, times.append)


def waiting(clock: DeviceClock) -> int:
    """Times and marks that are not delivered yet."""
    return len(clock._pending)


def test_times_come_when_the_work_is_done_and_nothing_waits():
    gpu, times = Gpu(), []
    clock = gpu.clock()
    for milliseconds in (1.5, 2.0, 4.0):
        timed(clock, gpu, milliseconds, times)
    clock.collect()
    assert times == []
    gpu.done = 3.5  # the first two
    clock.collect()
    assert times == [1.5, 2.0]
    assert (waiting(clock), gpu.synchronised) == (1, 0)
    clock.collect(wait=True)
    assert times == [1.5, 2.0, 4.0]
    assert (waiting(clock), gpu.synchronised) == (0, 1)


def test_work_between_two_pieces_is_not_counted():
    gpu, times = Gpu(), []
    clock = gpu.clock()
    timed(clock, gpu, 1.0, times)
    gpu.work(100.0)
    timed(clock, gpu, 2.0, times)
    clock.collect(wait=True)
    assert times == [1.0, 2.0]


def test_events_are_used_again_each_on_its_own_device():
    gpu, times = Gpu(), []
    clock = gpu.clock()
    for turn in range(50):
        timed(clock, gpu, 1.0, times, f"cuda:{turn % 2}")  # Event.record asserts
        gpu.finish()
        clock.collect()
    assert len(times) == 50
    assert gpu.made == 4


def test_a_bound_on_what_waits():
    gpu, times = Gpu(), []
    clock = gpu.clock(most_pending=3)
    for _ in range(5):
        timed(clock, gpu, 1.0, times)
    assert (waiting(clock), times) == (3, [])
    gpu.finish()
    timed(clock, gpu, 7.0, times)  # the full clock looks for those that are done, and has room again
    assert (times, waiting(clock)) == ([1.0] * 3, 1)


def test_nothing_is_recorded_in_a_graph():
    gpu, times = Gpu(), []
    clock = gpu.clock()
    gpu.capturing = True
    timed(clock, gpu, 1.0, times)
    assert (gpu.made, waiting(clock)) == (0, 0)
    gpu.capturing = False
    timed(clock, gpu, 2.0, times)
    clock.collect(wait=True)
    assert times == [2.0]


def test_a_mark_is_reached_behind_the_work_before_it_and_with_its_times():
    gpu, times, reached = Gpu(), [], []
    clock = gpu.clock()
    timed(clock, gpu, 1.0, times)
    clock.mark(lambda: reached.append(list(times)))
    timed(clock, gpu, 2.0, times)
    clock.mark(lambda: reached.append(list(times)))
    gpu.done = 1.0
    clock.collect()
    assert reached == [[1.0]]
    clock.collect(wait=True)
    assert reached == [[1.0], [1.0, 2.0]]
    made = gpu.made
    for _ in range(5):
        clock.mark(lambda: None)
        clock.collect(wait=True)
    assert gpu.made == made, "events of marks are used again too"
    DeviceClock("cpu").mark(lambda: reached.append("at once"))
    assert reached[-1] == "at once"


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_paused_clock_times_nothing_and_asks_nothing_of_the_device(kind):
    gpu, times = Gpu(), []
    clock = gpu.clock() if kind == "cuda" else DeviceClock(kind)
    clock.paused = True
    timed(clock, gpu, 1.0, times)
    clock.collect(wait=True)
    assert (times, gpu.made) == ([], 0)


@pytest.mark.parametrize("when", ["start", "stop", "collect"])
def test_a_fault_of_the_device_ends_the_clock_and_not_the_run(when):
    gpu, times = Gpu(), []
    clock = gpu.clock()
    timed(clock, gpu, 1.0, times)
    gpu.faulty = when == "start"
    token = clock.start()
    gpu.faulty = gpu.faulty or when == "stop"
    clock.stop(token, times.append)
    gpu.faulty = True
    clock.collect(wait=False)
    assert (times, waiting(clock)) == ([], 0)
    gpu.faulty = False
    timed(clock, gpu, 1.0, times)
    clock.collect(wait=True)
    assert (times, waiting(clock)) == ([], 0), "nothing is timed any more"


@pytest.mark.parametrize("kind", ["cpu", "mps", "npu", "xla"])
def test_without_events_the_time_is_the_hosts_and_comes_at_once(kind):
    clock, times = DeviceClock(kind), []
    clock.stop(clock.start(), times.append)
    assert len(times) == 1
    assert 0 < times[0] < 1000
    assert clock.measures_device_time == (kind == "cpu")
    clock.collect(wait=True)
    assert waiting(clock) == 0


@pytest.mark.gpu
def test_real_events_time_work_and_do_not_wait_for_it():
    import torch

    clock, times = DeviceClock("cuda"), []
    matrix = torch.randn(4096, 4096, device="cuda")
    matrix @ matrix  # what the first call loads
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            token = clock.start(matrix.device)
            for _ in range(50):
                matrix @ matrix
            clock.stop(token, times.append)
        clock.collect()
        assert times == [], "the clock waited, or the events are in another stream than the work"
        torch.cuda.synchronize()
        clock.collect()
    assert len(times) == 2
    assert 0.5 < times[0] / times[1] < 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clock.stop(clock.start(matrix.device), times.append)
    assert waiting(clock) == 0

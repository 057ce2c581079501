"""When the guard checks: every step of a run has checks, and each role and block is checked again in time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.observe.guard import BUDGETS, Guard, GuardAlarm, GuardedKernel  # noqa: E402
from attention_backends.backends.observe.guard.turns import FEW_STEPS, LONGEST_GAP, LONGEST_PERIOD, Step, period  # noqa: E402
from attention_backends.backends.report import Row, RunReport  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402
from guarded_runs import LOSSY, int8, sdpa  # noqa: E402

# Blocks and roles of one model call, in the order in which these models call attention.
FAMILIES = {
    "tiny": ["self", "cross"] * 2,
    "sd15": ["self", "cross"] * 16,
    "flux": ["flux.double"] * 19 + ["flux.single"] * 38,
    "wan 14B": ["self", "cross"] * 40,
    "wan i2v": ["self", "cross", "image"] * 40,
    "qwen image": ["joint"] * 60,
    "one block": ["self"],
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """On tensors this small, threads mostly wait for each other."""
    torch.set_num_threads(1)


class Simulated:
    """A run whose kernels compute nothing: which calls the guard looked at, and in which step."""

    def __init__(
        self,
        mode: str = "watch",
        roles: Sequence[str] = FAMILIES["wan 14B"],
        backend: Callable[[int], str] = lambda place: LOSSY,
    ) -> None:
        self.backend = backend
        self.guard = Guard(mode, RunReport(), everything=False)
        self.guard.check = self._check  # type: ignore[method-assign]
        self.roles = roles
        self.step = self.call = 0
        self.seen: list[tuple[int, tuple[str, str], int]] = []
        """Step, place and number of the call in its step, of each check."""
        self.watches: dict[Any, GuardedKernel] = {}

    def _check(self, watch: GuardedKernel, call: Any, number: int) -> Any:
        self.seen.append((self.step, watch.role_and_block, self.call))

    def run(
        self,
        steps: int,
        calls: int = 1,
        *,
        kind: Callable[[int, int], object] = lambda step, place: 0,
        unchanged: Callable[[int], int | None] = lambda step: None,
        ran: Callable[[int, int], bool] = lambda step, place: True,
        index: Callable[[int], int | None] = lambda step: step,
        known: bool = True,
        evaluations: int = 1,
        in_last_step: int | None = None,
    ) -> Simulated:
        """`calls` in each place in one model call, and `evaluations` model calls in a step."""
        call = AttentionCall(*[torch.zeros(1)] * 3)

        def model() -> list[Any]:
            for place, role in enumerate(self.roles):
                if not ran(self.step, place):
                    continue
                key = place, kind(self.step, place)
                if key not in self.watches:
                    row = Row(role, str(place), self.backend(place), "test", "none")
                    self.watches[key] = self.guard.watched(lambda call: None, "quantized", row)  # type: ignore[assignment]
                for _ in range(calls):
                    self.watches[key](call)
                    self.call += 1
                self.call -= calls
            self.call += calls
            return []

        for step in range(steps):
            self.step, self.call = step, 0
            is_last = step == steps - 1 and in_last_step is not None
            for _ in range(in_last_step if is_last else evaluations):  # type: ignore[arg-type]
                at = Step(index(step), steps if known else None, unchanged(step))
                self.guard.model_call(object(), model, model, at)
        return self

    def steps_of(self, place: tuple[str, str]) -> list[int]:
        return [step for step, where, _ in self.seen if where == place]

    def gaps(self, place: tuple[str, str], steps: int, first: int = -1) -> list[int]:
        """From the step before the run to the first check, between checks, and from the last one to the end."""
        at = [first, *self.steps_of(place), steps]
        return [after - before for before, after in itertools.pairwise(at)]


def before(calls: int, number: int) -> int:
    """Checks of a kind of call by the rule of old: at its first call, after 8 to 15 more, then after twice as many."""
    due, gap, count = 0, 8 + number % 8, 0
    for call in range(calls):
        if call >= due:
            due, gap, count = call + gap, 2 * gap, count + 1
    return count


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_has_checks_and_every_block_is_checked_again_in_time(family: str) -> None:
    for steps in range(1, 51):
        run = Simulated(roles=FAMILIES[family]).run(steps)
        assert {step for step, _, _ in run.seen} == set(range(steps)), steps
        bound = min(period(steps), len(FAMILIES[family]))
        for watch in run.watches.values():
            assert max(run.gaps(watch.role_and_block, steps)) <= bound, (steps, watch.role_and_block)
            assert run.steps_of(watch.role_and_block), "each role and block in each run"


def test_the_stated_period() -> None:
    assert [period(steps) for steps in (1, 2, 4, 8, 9, 16, 17, 20, 34, 35, 50, 200)] == [
        1, 2, 4, 8, 8, 8, 9, 10, 17, 17, 17, 17,
    ]  # fmt: skip
    assert period(None) == FEW_STEPS
    assert period(1000) == LONGEST_PERIOD


@pytest.mark.parametrize("family", ["sd15", "flux", "wan 14B", "wan i2v", "qwen image"])
@pytest.mark.parametrize("calls", [1, 2])
def test_no_more_checks_than_before(family: str, calls: int) -> None:
    """Summed over the blocks, to a check or two of the whole run: a run's length is no multiple of the period."""
    roles = FAMILIES[family]
    for steps in range(2, 51):
        checks = len(Simulated(roles=roles).run(steps, calls).seen)
        assert checks <= sum(before(steps * calls, number) for number in range(1, len(roles) + 1)) + len(roles) / 8, (
            steps
        )


@pytest.mark.parametrize("family", ["wan 14B", "wan i2v", "flux", "sd15"])
def test_each_role_has_checks_in_nearly_every_step(family: str) -> None:
    roles = FAMILIES[family]
    for steps in (4, 8, 20, 50):
        run = Simulated(roles=roles).run(steps)
        for role in set(roles):
            if roles.count(role) >= 2 * period(steps):
                assert {step for step, (of, _), _ in run.seen if of == role} == set(range(steps)), (steps, role)


@pytest.mark.parametrize(("calls", "evaluations"), [(2, 1), (1, 2), (3, 1), (2, 2)])
def test_of_several_calls_in_a_step_each_is_looked_at(calls: int, evaluations: int) -> None:
    """Both prompts in calls of their own, two cross calls of one module, both halves of a step of Heun's method."""
    for steps in (2, 4, 8, 20, 50):
        run = Simulated().run(steps, calls, evaluations=evaluations)
        assert {step for step, _, _ in run.seen} == set(range(steps)), steps
        for watch in run.watches.values():
            # One step more: a call that was waited for and did not come.
            assert max(run.gaps(watch.role_and_block, steps)) <= period(steps) + 1, (steps, watch.role_and_block)
        each = calls * evaluations
        looked_at = [sum(at == call for _, _, at in run.seen) for call in range(each)]
        if steps >= 8:
            assert min(looked_at) > 0.4 * len(run.seen) / each, looked_at


def test_enforce_makes_the_checks_of_watch() -> None:
    for steps in (2, 4, 8, 20, 50):
        watched, enforced = (Simulated(mode).run(steps).seen for mode in ("watch", "enforce"))
        assert enforced == watched, steps
        assert len(enforced) <= sum(before(steps, number) for number in range(1, 81)), steps


def test_the_first_call_of_each_backend_is_checked() -> None:
    """Whose kernels may be wrong everywhere, each for itself."""
    for mode in ("watch", "enforce"):
        run = Simulated(mode, backend=lambda place: f"kernel {place % 3}").run(20)
        assert {("self", "0"), ("cross", "1"), ("self", "2")} <= {where for step, where, _ in run.seen if step == 0}
        assert len(run.seen) <= len(Simulated(mode).run(20).seen) + 2, "one check more for each further backend"


def test_a_solver_that_ends_with_one_call_is_checked_in_its_last_step() -> None:
    """Heun's method evaluates the model twice in a step but in the last one."""
    for steps in (2, 4, 8):
        run = Simulated().run(steps, evaluations=2, in_last_step=1)
        assert {where for _, where, _ in run.seen} == {watch.role_and_block for watch in run.watches.values()}


def test_a_window_that_is_shorter_than_the_period_is_checked_whole() -> None:
    """A schedule makes the plans of a window anew, so a kernel may run in two steps of twenty alone."""
    for first, last in ((0, 1), (18, 19), (5, 7), (0, 19)):

        def kind(step: int, place: int, first: int = first, last: int = last) -> bool:
            return first <= step <= last

        def unchanged(step: int, first: int = first, last: int = last) -> int:
            ends = [at for at in (first, last + 1, 20) if at > step]
            return min(ends) - step

        run = Simulated().run(20, kind=kind, unchanged=unchanged)
        inside = [where for step, where, _ in run.seen if first <= step <= last]
        assert {watch.role_and_block for watch in run.watches.values()} == set(inside), (first, last)
        assert {step for step, _, _ in run.seen} >= set(range(first, last + 1))
        assert len(inside) <= len(run.roles) * max(1, (last - first + 1) / period(20)) + len(run.roles) / 8


def test_a_kind_of_call_that_comes_in_the_middle_is_checked_at_once() -> None:
    """Other lengths, a kernel in place of one that failed: nobody knows for how long."""
    run = Simulated().run(20, kind=lambda step, place: step >= 7)
    assert len([1 for step, _, _ in run.seen if step == 7]) == len(run.roles)


def test_calls_that_were_skipped_are_checked_when_they_are_made_again() -> None:
    """Packs that keep the output of a step make no calls in it."""
    source = random.Random(0)
    skipped = {step for step in range(50) if source.random() < 0.5}
    run = Simulated().run(50, ran=lambda step, place: step not in skipped)
    for watch in run.watches.values():
        at = run.steps_of(watch.role_and_block)
        made = [step for step in range(50) if step not in skipped]
        for last, after in itertools.pairwise(at):
            assert not [step for step in made if last + period(50) <= step < after], (last, after)


def test_another_sampler_in_the_same_run_goes_on() -> None:
    run = Simulated().run(20, index=lambda step: step % 10)
    for watch in run.watches.values():
        assert max(run.gaps(watch.role_and_block, 20)) <= period(20)


@pytest.mark.parametrize("index", [lambda step: step, lambda step: None], ids=["told", "counted"])
def test_without_a_number_of_steps(index: Any) -> None:
    run = Simulated().run(40, known=False, index=index)
    assert {step for step, _, _ in run.seen} == set(range(40))
    for watch in run.watches.values():
        assert run.steps_of(watch.role_and_block)[0] == 0, "at its first call, since nobody knows how long this goes on"
        assert max(run.gaps(watch.role_and_block, 40)) <= FEW_STEPS


def test_without_steps_the_gap_between_checks_has_a_limit() -> None:
    """The Python API: no model calls, and one kind of call for all blocks."""
    guard = Guard("watch", RunReport(), everything=False)
    seen: list[int] = []
    guard.check = lambda watch, call, number: seen.append(number)  # type: ignore[assignment, method-assign]
    watch = guard.watched(lambda call: None, "quantized", Row("self", "", LOSSY, "test", "none"))  # type: ignore[arg-type, return-value]
    call = AttentionCall(*[torch.zeros(1)] * 3)
    for _ in range(3000):
        watch(call)
    gaps = [after - last for last, after in itertools.pairwise(seen)]
    assert seen[0] == 0
    assert max(gaps) == LONGEST_GAP
    assert gaps == sorted(gaps)


# Errors that are planted


def planted_call(source: random.Random) -> AttentionCall:
    draw = torch.Generator().manual_seed(source.randrange(1 << 30))
    return AttentionCall(*(torch.randn(1, 4, 24, 32, generator=draw) for _ in range(3)))


def plantings(count: int) -> Iterator[tuple[int, int, int, str, int | None, int | None]]:
    """Number of steps, blocks, first bad step, mode, bad block (None: all), bad head (None: all)."""
    source = random.Random(7)
    for number in range(count):
        steps, blocks = (2, 4, 8, 20, 50)[number % 5], source.choice((1, 3, 8, 30))
        block = source.choice((None, source.randrange(blocks)))
        head = source.choice((None, source.randrange(4)))
        yield steps, blocks, source.randrange(steps), source.choice(("watch", "enforce")), block, head


class Planted:
    """A run of a kernel that is wrong in some blocks from some step on: which blocks were caught when, what passed."""

    def __init__(
        self, mode: str, steps: int, is_wrong: Callable[[int, int], bool], head: int | None, seed: int
    ) -> None:
        """`is_wrong` takes step and block."""
        self.guard = Guard(mode, RunReport(), everything=False, seed=seed)
        self.steps, self.is_wrong = steps, is_wrong
        self.call = planted_call(random.Random(seed))
        self.right = int8(self.call)
        self.wrong = self.right.clone()
        self.wrong[:, slice(None) if head is None else head] *= 1.5
        self.seen: dict[int, int] = {}
        """Block -> the step in which it was caught."""
        self.passed: list[tuple[int, int]] = []
        """Block and step of each wrong output that the model got."""
        self.passed_late: list[tuple[int, int]] = []
        """Those after the first alarm."""
        self.checked = 0

    def run(self, blocks: int, backend: Callable[[int], str] = lambda block: LOSSY) -> Planted:
        now = {"step": 0, "block": 0}

        def kernel(call: AttentionCall) -> torch.Tensor:
            return self.wrong if self.is_wrong(now["step"], now["block"]) else self.right

        rows = [Row("self" if at % 2 else "cross", str(at), backend(at), "test", "none") for at in range(blocks)]
        watches: list[Any] = [None] * blocks

        def model() -> list[Any]:
            for at in range(blocks):
                now["block"] = at
                watches[at] = watches[at] or self.guard.watched(kernel, "quantized", rows[at])
                try:
                    output = watches[at](self.call)
                except GuardAlarm:
                    self.seen.setdefault(at, now["step"])
                    continue
                if output is self.wrong:
                    self.passed.append((at, now["step"]))
                    self.passed_late += self.passed[-1:] if self.seen else []
                if rows[at].guard is not None and rows[at].guard.alarms:
                    self.seen.setdefault(at, now["step"])
            return []

        for step in range(self.steps):
            now["step"] = step
            self.guard.model_call(object(), model, model, Step(step, self.steps))
        self.checked = sum(row.guard.checked for row in rows if row.guard is not None)
        return self


def plant(steps: int, blocks: int, begin: int, mode: str, block: int | None, head: int | None, seed: int) -> None:
    """One run: the error is seen within the period, and under `enforce` nothing wrong is passed on from there on."""
    run = Planted(mode, steps, lambda step, at: step >= begin and block in (None, at), head, seed).run(blocks)
    length = min(period(steps), blocks)
    bad = range(blocks) if block is None else [block]
    assert all(at in bad for at in run.seen)
    for at in bad:
        if begin + length <= steps or begin == 0:
            assert begin <= run.seen[at] < begin + length, (at, run.seen)
    if block is None:
        assert min(run.seen.values()) == begin, "wrong everywhere: seen in the very step"
    if mode == "enforce":
        assert run.passed_late == []
        if block is None and begin == 0:
            assert run.passed == []


@pytest.mark.parametrize("steps", [2, 4, 8, 20, 50])
def test_enforce_checks_all_blocks_of_a_backend_after_its_first_alarm(steps: int) -> None:
    healthy = Planted("enforce", steps, lambda step, at: False, None, 0).run(30)
    assert healthy.seen == {}
    for begin in (0, 1, steps // 2):
        run = Planted("enforce", steps, lambda step, at, begin=begin: step >= begin, None, 0).run(30)
        assert run.passed_late == []
        assert {step for _, step in run.passed} <= {begin}, "what stands before the first block that is caught"
        assert begin or run.passed == []
    # Two backends, of which one is wrong: the other one's blocks are left to their turns.
    run = Planted("enforce", steps, lambda step, at: at % 2 == 1, None, 0).run(30, lambda at: f"kernel {at % 2}")
    assert run.passed == []
    assert set(run.seen) == set(range(1, 30, 2))
    assert run.checked <= 15 + (healthy.checked + 15) / 2


@pytest.mark.parametrize("steps", [4, 20])
def test_one_alarm_has_each_other_block_checked_once(steps: int) -> None:
    healthy = Planted("enforce", steps, lambda step, at: False, None, 0).run(30)
    run = Planted("enforce", steps, lambda step, at: at == 5, None, 0).run(30)
    assert list(run.seen) == [5]
    assert run.seen[5] < period(steps)
    assert run.passed == [(5, step) for step in range(run.seen[5])]
    assert healthy.checked < run.checked <= healthy.checked + 29


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_planted_error_is_seen_within_the_stated_steps(count: int) -> None:
    for seed, planting in enumerate(plantings(count)):
        plant(*planting, seed)


@pytest.mark.parametrize("runs", [40, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kernel", "accuracy"), [(int8, "quantized"), (sdpa, "exact")])
def test_honest_kernels_give_no_alarm_in_whole_runs(runs: int, kernel: Any, accuracy: str) -> None:
    alarms = 0
    for seed in range(runs):
        guard, source = Guard("watch", RunReport(), everything=True, seed=seed), random.Random(seed)
        rows = [Row("self", str(at), LOSSY, "test", "none") for at in range(4)]
        watches = [guard.watched(kernel, accuracy, row) for row in rows]

        def model(watches: Any = watches, source: random.Random = source) -> list[Any]:
            for watch in watches:
                watch(planted_call(source))
            return []

        for step in range(8):
            guard.model_call(object(), model, model, Step(step, 8))
        alarms += any(row.guard is not None and row.guard.alarms for row in rows)
        assert sum(row.guard.checked for row in rows if row.guard is not None) >= 8
    assert alarms <= runs // 1000
    assert accuracy in BUDGETS

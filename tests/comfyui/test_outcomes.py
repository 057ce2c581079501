"""What became of a run: one sentence for each state and cause, the same on node, tab, report, HTTP and in the log."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.report.outcome import STOPPED, WORDS, first_line, merged  # noqa: E402
from hook_side import (  # noqa: E402
    HEADS,
    PLACES,
    Q,
    model_call,
    nodes_module,
    override,
    plain_comfyui,
    sampling,
    stand_in,
    wrappers,
)
from test_audit import forgetful  # noqa: E402
from test_web import node_with_types, words  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
runs = nodes_module("history.runs")
CLASS_NAME = re.compile(r"\b[A-Z]\w*(Error|Exception|Interrupt)\b|<locals>|\bpartial\b")


def answers(func: Any, *args: Any, **kwargs: Any) -> Any:
    return torch.zeros_like(args[0])


def answers_self(func: Any, q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
    return torch.zeros_like(q) if q.shape == k.shape else func(q, k, *args, **kwargs)


def chosen(func: Any, *args: Any, **kwargs: Any) -> Any:
    return torch.zeros_like(args[0])


chosen.__qualname__ = "Loader.patch.<locals>.attention_override_sage"


class Case:
    """One run of a stand-in Wan: self attention, then cross attention, then maybe an error."""

    def __init__(
        self, kind: str, text: str, *, backend: str = "sdpa_math", strict: bool = False, foreign: Any = None,
        installed: Any = None, error: Any = None, reaches: bool = True, before: bool = False,
    ) -> None:  # fmt: skip
        self.kind, self.text, self.error, self.reaches, self.before = kind, text, error, reaches, before
        self.installed = installed
        self.strict = strict
        self.given = {"backend": backend, "foreign": foreign, "strict": strict, "cross": backend}

    def run(self) -> None:
        ours = override(**self.given)
        model = stand_in(["WanModel"], PLACES)
        options = {sampling.KEY: ours, sampling.OVERRIDE: self.installed or ours}
        error = self.error() if self.error else None

        def body() -> None:
            if error is not None and self.before:
                raise error
            own = options if self.reaches else {}
            for path, length in zip(PLACES, (6, 9), strict=True):
                keys = torch.zeros(1, length, HEADS * 16)
                calls = [((Q, keys, keys, HEADS), {"transformer_options": own})]
                model.get_submodule(path)(calls)
            if error is not None:
                raise error

        class Executor:
            class_obj = SimpleNamespace(model_options={"transformer_options": options})

            def __call__(self) -> Any:
                return model_call(model, options, body)

        wrappers.outer_sample_wrapper(Executor())


def interrupted() -> BaseException:
    import comfy.model_management

    return comfy.model_management.InterruptProcessingException()


ME = "the Python module test_outcomes"
NO_BACKEND = (
    "no attention backend for this call (asked for cudnn_attn via node.default): "
    "cudnn_attn: needs an NVIDIA GPU (this is a CPU)"
)
CASES = {
    "good": Case("done", ""),
    "cancelled": Case("cancelled", "Cancelled", error=interrupted),
    "cancelled before": Case("cancelled", "Cancelled", error=interrupted, before=True),
    "cancelled on the keyboard": Case("cancelled", "Cancelled", error=KeyboardInterrupt),
    "refused": Case("refused", f"Stopped by strict: {NO_BACKEND}", backend="cudnn_attn", strict=True),
    "failed": Case("failed", "Failed: sizes 3 and 4 differ", error=lambda: ValueError("sizes 3 and 4 differ\n  at 2")),
    "failed before": Case("failed", "Failed: no weights", error=lambda: RuntimeError("no weights"), before=True),
    "failed without words": Case("failed", "Failed: an error without a message", error=AssertionError),
    "failed under strict": Case("failed", "Failed: no weights", error=lambda: RuntimeError("no weights"), strict=True),
    "out of memory": Case(
        "out_of_memory", "Out of memory: CUDA out of memory. Tried to allocate 2 GiB",
        error=lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
    ),
    "patch replaced": Case("not_used", f"Not used: {ME} after this node took over attention", installed=chosen),
    "replaced, strict": Case(
        "refused", f"Stopped by strict: {ME} computed attention of role self by itself, but sdpa_math was asked for"
        " strictly via node.default", installed=chosen, strict=True,
    ),
    "answered below": Case("not_used", f"Not used: {ME} before this node took over attention", foreign=answers),
    "partly": Case("partly", f"Partly used: {ME} computed 1 of 2 attention calls", foreign=answers_self),
    "bypassed": Case(
        "not_used", "Not used: the patch was never invoked: this model does not use ComfyUI's attention hook",
        reaches=False,
    ),
    "bypassed, strict": Case(
        "refused", "Stopped by strict: the patch was never invoked: this model does not use ComfyUI's attention hook",
        reaches=False, strict=True,
    ),
    "unexplained": Case(
        "refused", "Stopped by strict: another attention backend ran than the one that was asked for, and nothing says"
        " why", backend="reference", strict=True,
    ),
}  # fmt: skip


def account_of(name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> tuple[Any, Any, str]:
    """Account, short entry and log of one case."""
    case = CASES[name]
    if name == "unexplained":
        monkeypatch.setattr(Router, "select", forgetful)
    with caplog.at_level(logging.INFO, "attention_backends"):
        if case.kind in STOPPED:
            with pytest.raises(BaseException):  # noqa: B017  # each case has its own
                case.run()
        else:
            case.run()
    return runs.recent()[0], runs.summaries()[0], caplog.text


@pytest.mark.comfy
@pytest.mark.parametrize("name", CASES)
def test_every_place_says_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain_comfyui(monkeypatch)
    report = nodes_module("report.report")
    case = CASES[name]
    account, summary, log = account_of(name, monkeypatch, caplog)
    assert (account["outcome"]["kind"], account["outcome"]["text"]) == (case.kind, case.text)
    assert summary["outcome"] == runs.find(account["number"])["outcome"] == account["outcome"]
    assert summary["state"] == ("stopped" if case.kind in STOPPED else "done")
    text = report.as_text({"run": account})
    assert case.text in text
    assert case.text in report.remarks({"run": account}) or not case.text
    assert case.text in log
    if name not in ("good", "unexplained"):
        verdicts = {finding["verdict"] for finding in account["audit"]}
        assert not verdicts & {"role never called", "unexplained"}
    said = json.dumps([account["outcome"], account["audit"], account["notes"]]) + text
    assert not CLASS_NAME.search(said)


@cache
def on_the_page() -> dict[str, str]:
    """The line of a node and of the tab for each case, from the page's own code with the English words."""
    cases = {
        name: {"kind": case.kind, "cause": case.text.partition(": ")[2] if case.kind != "done" else ""}
        for name, case in CASES.items()
    }
    script = """
        import { outcomeText, shortLine, worst } from ACCOUNT
        import { loadWords } from WORDS
        const [book, cases] = JSON.parse(process.argv[1])
        const answer = { ok: true, json: async () => ({ en: { attentionBackends: book } }) }
        const say = await loadWords({ fetchApi: async () => answer }, 'en')
        const totals = [{ role: 'self', backend: 'sdpa_math', calls: 2 }]
        const found = {}
        for (const [name, outcome] of Object.entries(cases)) {
          found[name] = [outcomeText(outcome, say), shortLine([], 0, outcome, say), shortLine(totals, 0, outcome, say)]
        }
        const [good, bad] = [{ kind: 'done', cause: '' }, { kind: 'failed', cause: 'x' }]
        found.worst = [worst([good, undefined, bad, good]).kind]
        found.state = Object.values(cases).map(({ kind }) => say(`state.${kind}`))
        console.log(JSON.stringify(found))
    """
    for name in ("account", "words"):
        script = script.replace(f"from {name.upper()}", f"from {json.dumps(str(ROOT / 'web' / f'{name}.js'))}")
    node = node_with_types("tsconfig.json")[0]
    given = json.dumps([words(), cases])
    command = [node, "--experimental-default-type=module", "--input-type=module", "--eval", script, given]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_the_page_says_the_same() -> None:
    page = on_the_page()
    for name, case in CASES.items():
        nothing = words()["line"]["nothing"]
        figures = "self sdpa_math 2 calls"
        together = f"{case.text}; {figures}" if case.text else figures
        assert page[name] == [case.text, case.text or nothing, together], name
    assert page["worst"] == ["failed"]
    assert set(page["state"]) == {words()["state"][case.kind] for case in CASES.values()}


def test_every_kind_has_its_case_words_and_colour() -> None:
    assert {case.kind for case in CASES.values()} | {"running"} == set(WORDS)
    english = words()["outcome"]
    assert english == {kind: text for kind, text in WORDS.items() if text}
    css = (ROOT / "web" / "panel.css").read_text(encoding="utf-8")
    colours = {kind: re.findall(rf"\.ab-{kind}\b[^{{]*\{{[^}}]*color: var\((--ab-\w+)\)", css)[-1] for kind in WORDS}
    assert colours["done"] == "--ab-good"
    assert colours["cancelled"] == "--ab-soft"
    assert {colours[kind] for kind in ("refused", "failed", "out_of_memory", "not_used")} == {"--ab-bad"}


def test_while_a_run_goes_on_nothing_is_said_of_roles_that_may_still_come() -> None:
    ours = override("sdpa_math", cross="sdpa_math")
    model = stand_in(["WanModel"], PLACES)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours}
    seen = []

    class Executor:
        class_obj = SimpleNamespace(model_options={"transformer_options": options})

        def __call__(self) -> None:
            def body() -> None:
                model.get_submodule("blocks.0.self_attn")([((Q, Q, Q, HEADS), {"transformer_options": options})])

            model_call(model, options, body)
            (live,) = [one for one in runs.summaries() if one["state"] == "running"][:1]
            seen.append(runs.find(live["number"]))

    wrappers.outer_sample_wrapper(Executor())
    (live,) = seen
    assert live["outcome"]["kind"] == "running"
    assert {one["role"]: one["verdict"] for one in live["audit"]} == {"self": "as asked", "cross": "not reached"}
    over = runs.recent()[0]  # it never came
    assert {one["role"]: one["verdict"] for one in over["audit"]} == {"self": "as asked", "cross": "role never called"}


def test_first_line(snapshot: SnapshotAssertion) -> None:
    assert first_line(RuntimeError("\n  \n  here \nthere")) == "here"
    assert first_line(RuntimeError()) == snapshot


def test_of_several_stages_the_one_that_says_most() -> None:
    stages = [{"kind": kind, "cause": "", "text": kind} for kind in ("done", "partly", "done")]
    assert merged(stages)["kind"] == "partly"

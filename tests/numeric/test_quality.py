"""`quality`: clips of the embedded model on several backends, at tiny sizes; what is compared, timed and refused."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from attention_backends.backends import account, attention  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.sparse.method import SparseMethod  # noqa: E402
from attention_backends.backends.values.grid import TokenGrid  # noqa: E402
from attention_backends.cli import main  # noqa: E402
from attention_backends.comparison import quality, quality_command, quality_runs  # noqa: E402
from attention_backends.comparison.contenders import Routed, router_for, split_backends  # noqa: E402
from attention_backends.comparison.quality_backends import choose  # noqa: E402
from attention_backends.comparison.quality_chart import draw_frames, draw_quality  # noqa: E402
from attention_backends.comparison.quality_report import (  # noqa: E402
    EQUAL,
    ClipScore,
    QualityReport,
    QualityRow,
    summary,
)
from attention_backends.comparison.quality_tables import cells, markdown, notes  # noqa: E402
from attention_backends.comparison.report import ComparisonError  # noqa: E402
from attention_backends.demo import judge_motion  # noqa: E402
from attention_backends.demo.model import VIDEO_WEIGHTS, WEIGHTS  # noqa: E402
from syrupy.assertion import SnapshotAssertion  # noqa: E402

TINY = ["--weights", str(WEIGHTS), "--size", "16", "--frames", "4", "--steps", "2", "--device", "cpu"]
GRID = TokenGrid(8, 16, 16)


def test_a_run_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backends = "subblock_attn topk=0.5 min_seq_len=0,sparge_attn topk=0.25 dense_steps=1,cudnn"
    arguments = ["quality", *TINY, "--prompts", "1", "--backends", backends, "--output", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(quality_command.FILES)
    for name in ("quality.png", "frames.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "quality.json").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    data = json.loads(text, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    dense, whole, sparse, absent = data["rows"]
    assert [row["name"].split()[0] for row in data["rows"]] == [
        "torch_sdpa",
        "subblock_attn",
        "sparge_attn",
        "cudnn_attn",
    ]
    assert dense["summary"]["psnr"] is None
    assert whole["summary"]["identical"], "all of its 4 blocks are kept"
    assert (whole["kept"], whole["computed"], sum(whole["whole"].values())) == (None, 1.0, 8)
    assert sparse["kept"] == pytest.approx(0.25)
    assert sparse["computed"] == pytest.approx((1 + 0.25) / 2), "one of two steps is dense"
    assert 5 < sparse["summary"]["psnr_worst"] <= sparse["summary"]["psnr"] < 60
    assert len(sparse["clips"][0]["psnr"]) == len(sparse["clips"][0]["ssim"]) == 4
    assert len(sparse["clips"][0]["step_ms"]) == 2
    assert 0 < sparse["clips"][0]["attention_ms"] < sum(sparse["clips"][0]["step_ms"])
    assert sparse["clips"][0]["temporal"] != dense["clips"][0]["temporal"]
    assert (absent["failed"], absent["clips"]) == ("needs an NVIDIA GPU (this is a CPU)", [])
    words = shlex.split(data["command"])
    assert words[words.index("--backends") + 1] == backends
    assert words[words.index("--dense-steps") + 1] == "0"
    page = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert page.isascii()
    assert f"    {data['command']}\n" in page
    assert all(f"| {row['name']} |" in page for row in data["rows"])


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--weights", "nowhere.safetensors"], id="no weights"),
        pytest.param(["--weights", __file__], id="no model"),
        pytest.param(["--backends", " "], id="no backends"),
        pytest.param(["--backends", "sgae"], id="no such backend"),
        pytest.param(["--backends", "sparge_attn topk=2"], id="option"),
        pytest.param(["--prompts", "0"], id="prompts"),
        pytest.param(["--frames", "1"], id="frames"),
        pytest.param(["--size", "15"], id="size"),
        pytest.param(["--dense-steps", "2"], id="dense steps"),
        pytest.param(["--guidance", "nan"], id="guidance"),
        pytest.param(["--device", "toaster"], id="device"),
    ],
)
def test_bad_input_ends_with_2_and_a_sentence(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    assert main(["quality", *TINY, "--output", str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr()
    said = captured.err.replace(__file__, "FILE").partition(" names are: ")[0].partition(": Expected one of ")[0]
    assert said.partition(" (SafetensorError")[0] == snapshot
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_the_default_weights_are_those_of_the_video_model() -> None:
    assert quality_command.VIDEO_WEIGHTS.resolve() == VIDEO_WEIGHTS.resolve()


def asked(**more: Any) -> quality.Asked:
    return quality.Asked(WEIGHTS, **{"size": 16, "frames": 4, "steps": 3, "prompts": 2, "device": "cpu", **more})


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Steps in the order in which backends took them; no model runs."""
    taken: list[tuple[str, int]] = []

    def step(runner: quality_runs.Runner, scene: object, index: int) -> None:
        taken.append((runner.row.name, index))
        runner.step_ms.append(float(len(runner.row.name)))

    monkeypatch.setattr(quality_runs, "_step", step)
    return taken


def test_backends_take_turns_at_each_step(turns: list[tuple[str, int]]) -> None:
    backends = ["torch_sdpa", "sdpa_math", "emulated_int8", "reference"]
    quality.measure(asked(backends=",".join(backends), prompts=3))
    measured = [turns[at : at + 4] for at in range(8, len(turns), 4)]
    assert [{index for _, index in round_} for round_ in measured] == 3 * [{0}, {1}, {2}]
    orders = [tuple(name for name, _ in round_) for round_ in measured]
    assert all(sorted(order) == sorted(backends) for order in orders)
    assert len(set(orders)) > 3, "in an order that is drawn anew"


def test_a_clip_is_judged_and_its_neighbouring_frames_compared(turns: list[tuple[str, int]]) -> None:
    what = asked(backends="sdpa_math", prompts=2)
    found = quality.measure(what)
    for shown, result in zip(found.clips, found.report.rows, strict=True):
        assert shown is not None
        first, second = result.clips
        differences = [float((shown[at + 1] - shown[at]).abs().mean()) for at in range(len(shown) - 1)]
        assert first.temporal == pytest.approx(sum(differences) / 3)
        assert first.right == judge_motion.score(what.clips()[0], shown)
        assert [one.prompt for one in result.clips] == [clip.caption() for clip in what.clips()]
        assert (first.seed, second.seed) == (0, 1)
        assert first.temporal != second.temporal, "each prompt has its own noise"


def test_a_backend_that_fails_keeps_its_finished_prompts(
    turns: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    step = quality_runs._step

    def fails(runner: quality_runs.Runner, scene: Any, index: int) -> None:
        step(runner, scene, index)
        if runner.row.name == "sdpa_math" and len(runner.row.clips) == 1 and index == 1:
            raise RuntimeError("broke")

    monkeypatch.setattr(quality_runs, "_step", fails)
    report = quality.measure(asked(backends="sdpa_math,emulated_int8", prompts=3)).report
    assert [len(row.clips) for row in report.rows] == [3, 1, 3]
    assert notes(report) == snapshot


def test_without_the_reference_there_is_nothing(monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    def fails(runner: quality_runs.Runner, scene: object, index: int) -> None:
        if runner.row.name == "torch_sdpa":
            raise RuntimeError("broke")

    monkeypatch.setattr(quality_runs, "_step", fails)
    with pytest.raises(ComparisonError) as refused:
        quality.measure(asked(backends="sdpa_math"))
    assert str(refused.value) == snapshot


def test_an_interruption_keeps_the_prompts_that_all_finished(turns: list[tuple[str, int]]) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("prompt 2 of 2, step 3 of 3"):
            raise KeyboardInterrupt

    report = quality.measure(asked(backends="sdpa_math"), progress=stop).report
    assert report.ended == quality.INTERRUPTED.format(finished=1, prompts=2)
    assert [len(row.clips) for row in report.rows] == [1, 1]

    def at_once(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quality.measure(asked(backends="sdpa_math"), progress=at_once)


def test_a_prompt_that_only_some_were_judged_on_is_left_out(
    turns: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[bool] = []

    def stop(clip: object, rgb: object) -> dict[str, bool]:
        judged.append(True)
        if len(judged) == 4:
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(judge_motion, "score", stop)
    report = quality.measure(asked(backends="sdpa_math")).report
    assert [len(row.clips) for row in report.rows] == [1, 1]


def row(name: str, *clips: ClipScore) -> QualityRow:
    return QualityRow(name, name, clips=list(clips))


def clip(ms: float, attention: float, temporal: float, *psnr: float, right: bool = True) -> ClipScore:
    found = {"shape": right, "direction": True}
    return ClipScore("a red ring", 0, [ms, ms], attention, temporal, list(psnr), [1.0 for _ in psnr], found)


def report_of(*rows: QualityRow) -> QualityReport:
    return QualityReport("m", 2, 2, 16, 4, 0, 4.0, "float32", 0, "a machine", {}, [1.0, 2.0], list(rows))


def test_what_follows_from_clips() -> None:
    dense = row("torch_sdpa", clip(10, 8, 0.02), clip(30, 12, 0.04))
    sparse = row("sparge_attn", clip(5, 2, 0.01, 20, 30), clip(10, 4, 0.05, 40, math.inf, right=False))
    report = report_of(dense, sparse)
    found = summary(sparse, report)
    assert found.speedup == {"median": 2.5, "low": 2.0, "high": 3.0}
    assert found.attention_speedup == {"median": 3.5, "low": 3.0, "high": 4.0}
    assert (found.attention_ms, found.psnr, found.psnr_worst) == (1.5, (20 + 30 + 40 + EQUAL) / 4, 20)
    assert found.temporal_ratio == pytest.approx(1.0)
    assert (found.right, found.count, found.identical) == (1, 2, False)
    assert summary(dense, report).speedup is None
    heading, first, second = cells(report)
    assert "peak MB" not in heading, "nothing was counted"
    assert first[heading.index("speed-up")] == "-"
    assert second[heading.index("speed-up")] == "2.50x (2.00-3.00)"
    assert second[heading.index("right")] == "1 of 2"


def test_memory_is_compared_where_it_was_counted() -> None:
    report = report_of(row("torch_sdpa", clip(10, 8, 0.02)), row("sparge_attn", clip(9, 8, 0.02, 30)))
    report.rows[0].peak_memory, report.rows[1].peak_memory = 200_000_000, 150_000_000
    heading, *lines = cells(report)
    assert [line[heading.index("peak MB")] for line in lines] == ["200.0", "150.0 (-25 %)"]
    assert notes(report) == []


def test_a_broken_clip_is_a_finding(snapshot: SnapshotAssertion) -> None:
    broken = clip(5, 2, math.nan, 20, math.nan)
    broken.broken, broken.right = "NaN in all values", {}
    report = report_of(row("torch_sdpa", clip(10, 8, 0.02)), row("sparge_attn", broken))
    found = summary(report.rows[1], report)
    assert math.isnan(found.psnr_worst or 0)
    assert found.right == 0
    assert json.loads(report.to_json())["rows"][1]["summary"]["psnr"] is None
    assert notes(report) == snapshot
    draw_quality(report)
    assert "NaN" in markdown(report)


def test_a_chance_difference_is_marked() -> None:
    report = report_of(
        row("torch_sdpa", clip(10, 8, 0.02), clip(10, 8, 0.02)),
        row("sparge_attn", clip(9, 8, 0.02, 30), clip(11, 8, 0.02, 30)),
    )
    heading, _, line = cells(report)
    assert line[heading.index("speed-up")].startswith("~1.01x")


def test_frames_are_drawn_for_each_row() -> None:
    report = report_of(row("torch_sdpa", clip(10, 8, 0.02)), QualityRow("cudnn_attn", "cudnn_attn", failed="no card"))
    draw_frames(report, [torch.rand(4, 16, 16, 3), None])
    with pytest.raises(ValueError, match="1 clips for 2 rows"):
        draw_frames(report, [None])


def test_labels_of_the_chart_do_not_lie_on_each_other() -> None:
    rows = [row("torch_sdpa", clip(10, 8, 0.02))]
    for name, ms, psnr in (("sparge_attn", 4.0, 20.0), ("cube_attn", 4.01, 20.1), ("sol_attn", 6.0, 40.0)):
        rows.append(row(name, clip(9, ms, 0.02, psnr)))
        rows[-1].computed = 0.4
    (axes,) = draw_quality(report_of(*rows)).axes[-1:]
    assert [text.get_text() for text in axes.texts].count("40 %") == 2


def test_a_long_name_leaves_room_for_the_figures_beside_the_frames() -> None:
    long = row("vmoba_attn " + " ".join(f"spatial_chunk_size_{at}=[4,4]" for at in range(9)), clip(9, 8, 0.02, 30.0))
    figure = draw_frames(report_of(row("torch_sdpa", clip(10, 8, 0.02)), long), [torch.rand(4, 16, 16, 3)] * 2)
    assert any("PSNR 30.0 dB" in text.get_text() for text in figure.texts)


def test_sparse_methods_without_options_run_at_shares() -> None:
    router = router_for("cpu")
    default = choose("", router, GRID, 4)
    names = {found.asked.partition(" ")[0] for found in default}
    methods = {name: method for name, method in BACKENDS.items() if isinstance(method, SparseMethod)}
    assert names == {
        "torch_sdpa",
        *(name for name, method in methods.items() if method.candidate and not method.trained),
    }
    assert default[0] == ("torch_sdpa", "torch_sdpa")
    assert [found.name for found in default if found.name.startswith("sol")] == [
        "sol_attn 50 %",
        "sol_attn 25 %",
        "sol_attn 12.5 %",
    ]
    named = choose("nabla_attn,sparge_attn topk=0.3,video_sparse_attn", router, GRID, 2)
    assert [found.asked for found in named[:3]] == ["torch_sdpa", "nabla_attn dense_steps=2", "sparge_attn topk=0.3"]
    assert len(named) == 6
    written = ['sol_attn keep_percent=25.0 dense_layers="" dense_steps=2', "sol_attn keep_percent=25.0 dense_steps=2"]
    assert [found.name for found in choose(",".join(written), router, GRID, 2)[1:]] == ["sol_attn 25 %", written[1]]


@pytest.mark.parametrize("name", [name for name, one in BACKENDS.items() if isinstance(one, SparseMethod)])
def test_options_for_a_share_keep_about_so_much(name: str) -> None:
    method = BACKENDS[name]
    assert isinstance(method, SparseMethod)
    torch.manual_seed(0)
    query = torch.randn(1, 1, GRID.cells, 8)
    for share in (0.5, 0.25):
        options = method.keeping(share, GRID)
        if options is None:
            assert not {"topk", "sparsity"} & {option.name for option in method.options}
            return
        config = {"default": {"backend": name, "extra": {**options, "dense_steps": 0}}, "guard": "off"}
        with account() as run_report:
            attention(query, query, query, backend=config, grid=GRID.shape)
        (kept,) = [found.kept for found in run_report.rows.values() if found.kept is not None]
        assert kept.fraction == pytest.approx(share, abs=0.07)  # of eight tiles one more is its own


def test_names_are_divided_at_commas_outside_brackets() -> None:
    text = 'sdpa_math,vmoba_attn spatial_chunk_size=[4,4] temporal_topk=2, cube_attn topk={"from": 1, "to": 0.5}'
    assert split_backends(text) == [
        "sdpa_math",
        "vmoba_attn spatial_chunk_size=[4,4] temporal_topk=2",
        ' cube_attn topk={"from": 1, "to": 0.5}',
    ]


@pytest.mark.parametrize(
    "options",
    [
        'moba_config={"temporal_topk":2,"st_chunk_size":[4,4,4]}',
        'dense_layers="0,1"',
        "dense_layers=0-3,38 tau=1.3",
        "window_size=[3,1,1]",
        "topk=[0.5,0.25] dense_steps=2",
    ],
)
def test_commas_of_a_value_divide_no_names(options: str) -> None:
    assert split_backends(f"sdpa_math,first {options},second {options}") == [
        "sdpa_math",
        f"first {options}",
        f"second {options}",
    ]


def test_commas_may_stand_between_options() -> None:
    assert split_backends("sparge_attn topk=0.5, dense_steps=2,sol_attn,dense_steps=1") == [
        "sparge_attn topk=0.5 dense_steps=2",
        "sol_attn dense_steps=1",
    ]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--frames", "100000"], "100000 frames of 32x32 are 25600000 tokens > 131072"),
        (["--size", "100000"], "tokens > 131072"),
        (["--prompts", "99999999999"], "prompts 99999999999 > 1000"),
    ],
)
def test_what_no_memory_holds_is_refused(wrong: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", *wrong]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "quality", "bench"])
def test_every_command_reads_lists_in_its_backends(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backends = "sliding_tile_attn window_size=[3,1,1],no_such_backend"
    assert main([command, "--backends", backends, "--device", "cpu", "--output", str(tmp_path)]) == 2
    assert "no_such_backend" in capsys.readouterr().err


def test_a_new_run_begins_without_what_methods_kept() -> None:
    routed = Routed(router_for("cpu"), "sparse_video_gen_2_attn svg2_num_q_centroids=4", TokenGrid(2, 4, 4))
    query = torch.randn(2, 1, 32, 8)

    def run() -> Any:
        return routed(query, query, query, role="self", block=0)

    kept = routed.session.progress.kept
    run()
    assert not kept, "nothing is known of the samples"
    routed.begin(("a", "b"))
    first = run()
    assert len(kept) == 4
    run()
    routed.begin(("a", "b"))
    assert not kept
    assert torch.equal(run(), first)

"""`blocks` on the command line: its numbers are those of the map, and wrong options are refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

import literal_sparse as literal  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.sparse.block_map import Dense  # noqa: E402
from attention_backends.backends.sparse.methods.radial import radial_map  # noqa: E402
from attention_backends.cli import main  # noqa: E402
from attention_backends.comparison import blocks_command  # noqa: E402
from attention_backends.comparison.blocks_picture import draw_blocks  # noqa: E402
from attention_backends.comparison.contenders import router_for  # noqa: E402
from picture_texts import check_readable  # noqa: E402

CPU = ["--device", "cpu", "--head-dim", "16", "--dtype", "float32"]


def blocks(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["blocks", "--json", *CPU, *arguments]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_the_numbers_are_those_of_the_map_with_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "new" / "radial.png"
    answer = blocks(capsys, "--method", "radial_attn", "--grid", "33+9x16x20+7", "--options",
                    "decay_factor=0.2, block_size=64", "--output", str(picture))  # fmt: skip
    seen, _ = radial_map(9, 320, 64, 0.2, "hunyuan")
    tokens = torch.repeat_interleave(torch.arange(45), 64)
    kept = literal.with_text(seen[:, :, tokens][..., tokens], 33, 7).double().mean().item()
    assert answer["kept"] == answer["kept_of_head"] == pytest.approx(kept, abs=1e-4)
    assert (answer["executor"], answer["dense"]) == ("gather", None)
    assert (answer["query_blocks"], answer["key_blocks"]) == (45 + 2, 45 + 2)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_head_step_and_layer_have_their_own_map(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "strategy.json"
    windows = {"0_0_0": [1, 1, 1], "0_0_1": [1, 3, 1], "0_1_0": [3, 3, 3], "0_1_1": [1, 1, 3]}
    file.write_text(json.dumps(windows))
    common = ["--method", "sliding_tile_attn", "--grid", "12x24x24", "--heads", "2", "--options",
              json.dumps({"mask_strategy_file_path": str(file), "skip_time_steps": 1})]  # fmt: skip
    kept = [
        blocks(capsys, *common, "--head", head, "--layer", layer, "--step", "5")["kept_of_head"]
        for head, layer in (("0", "0"), ("1", "0"), ("1", "1"))
    ]
    assert kept == pytest.approx([1 / 18, 3 / 18, 3 / 18], abs=1e-4)
    whole = blocks(capsys, *common, "--step", "0", "--output", str(tmp_path / "none.png"))
    assert (whole["dense"], whole["kept"]) == ("the first 1 steps", 1.0)
    assert not (tmp_path / "none.png").exists()


def test_every_method_has_a_picture_that_can_be_read() -> None:
    parser = argparse.ArgumentParser()
    blocks_command.add_arguments(parser)
    router = router_for("cpu")
    for method, by_scores in blocks_command.METHODS.items():
        options = {"subblock_attn": "min_seq_len=0, sparsity=0.75", "ssta_attn": "topk=0.05 win_size=[1,1,1]",
                   "cube_attn": "topk=0.25", "video_sparse_attn": "sparsity=0.5", "sol_attn": "dense_layers=9",
                   "sliding_tile_attn": "window_size=[1,1,1]"}.get(method, "")  # fmt: skip
        if "[" in options:
            options = (
                '{"win_size": [1, 1, 1], "ssta_topk": 2}' if method == "ssta_attn" else '{"window_size": [1, 1, 1]}'
            )
        asked = blocks_command.parse(
            parser.parse_args(["--method", method, "--grid", "9x24x24", "--options", options, *CPU])
        )
        found = blocks_command.blocks_of(asked, router)
        assert not isinstance(found, Dense), method
        answer = blocks_command.described(asked, found, router)
        texts = check_readable(draw_blocks(answer, found, asked, by_scores=by_scores))
        assert f"{100 * answer['kept_of_head']:.1f} %" in " ".join(texts)
        executor = BACKENDS[method].only_executor or "gather"
        assert f"Computed by: {executor}" in blocks_command.sentences(answer)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "torch_sdpa"], "sparge_attn"),
        (["--method", "no_such"], "no_such"),
        (["--grid", "9x24"], "21x30x52"),
        (["--grid", "99x999x999"], "not 1 to 262144"),
        (["--options", "topk=2"], "topk 2 > 1"),
        (["--head", "3", "--heads", "2"], "2 heads"),
        (["--step", "9", "--steps", "9"], "9 steps"),
        (["--steps", "9"], "--steps needs --step"),
        (["--dtype", "int8"], "bfloat16"),
        (["--output", "map.jpg"], ".png"),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["blocks", "--method", "sparge_attn", "--grid", "9x24x24", *CPU, *arguments]) == 2
    assert said in capsys.readouterr().err

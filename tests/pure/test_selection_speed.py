"""Selection is fast and needs no torch: 12 machines x 200 requests in a process where torch cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = r"""
import importlib.util, itertools, json, pathlib, sys

sys.modules["torch"] = None  # any import of it raises
root = pathlib.Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("attention_backends", root / "__init__.py",
                                              submodule_search_locations=[str(root)])
package = importlib.util.module_from_spec(spec)
sys.modules["attention_backends"] = package
spec.loader.exec_module(package)

from attention_backends.backends.config.layers import Choice
from attention_backends.backends.values.platform import parse_platform
from attention_backends.backends.values.request import AttentionRequest
from attention_backends.backends.engine.router import Router

packages = "packages=flash-attn==2.8.3;flashinfer-python==0.7.2;sageattention==2.2.0;xformers==0.0.35;triton==3.6.0"
machines = ["cuda:7.5", "cuda:8.0", "cuda:8.6", "cuda:8.9", "cuda:9.0", "cuda:10.0", "cuda:10.3", "cuda:12.0",
            "cuda:12.1", "rocm:gfx942", "cpu", "mps"]
requests = [
    AttentionRequest(1, 24, q_len, kv_len, head_dim, dtype, mask=mask)
    for head_dim, q_len, kv_len, dtype, mask in itertools.product(
        (40, 64, 72, 128, 256), (1024, 14336), (77, 4096, 14336, 226, 1000), ("bfloat16", "float32"), ("none", "bias"))
]
names = [None, "sage_attn", "flash_attn", "cudnn_attn", "torch_sdpa"]
calls = 0
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
sys.setprofile(count)
chosen = {}
for machine in machines:
    router = Router(parse_platform(f"{machine},{packages}"))
    for index, request in enumerate(requests):
        name = names[index % len(names)]
        decision = router.select(request, Choice(name, "test"))
        chosen[decision.backend] = chosen.get(decision.backend, 0) + 1
sys.setprofile(None)
print(json.dumps({"calls": calls, "requests": len(set(requests)), "machines": len(machines),
                  "chosen": chosen, "torch": sys.modules["torch"] is not None}))
"""


def test_two_thousand_selections_without_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["machines"], report["requests"]) == (12, 200)
    assert sum(report["chosen"].values()) == 2400
    assert not report["torch"]
    assert len(report["chosen"]) >= 2  # it does choose
    assert report["calls"] < 2400 * 500

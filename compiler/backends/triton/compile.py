"""Compile Triton kernels to machine code for NVIDIA GPUs on hosts without GPU or driver, and check the machine code.

python -m belle_compile.compiler.backends.triton.compile ARCH    # a worker: pickled kernels on stdin, pickled code on stdout
"""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

from belle_compile.compiler.backends.triton.installed import require_triton
from belle_compile.compiler.backends.triton.kernels.base import OVERLAP, Kernel
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime import host
from belle_compile.runtime.host import SHARED_BYTES
from belle_compile.runtime.program import CUBIN, Launch

Compiled = tuple[bytes, Launch]

_TYPES = {"int8": "*i8", "int32": "*i32", "float16": "*fp16", "float32": "*fp32"}
_ALIGNED = [["tt.divisibility", 16]]
_TENSOR_CORES = re.compile(r"^(?:[IH]MMA|[IHQ]GMMA|WGMMA)\b")
_USAGE = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
# The code contains no paths of this host and nothing from a cache of another version; multiply-adds are fused (one rounding).
_SETTINGS = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_ALWAYS_COMPILE": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
_OVERLAPPING = 90  # compute capability from which on a kernel may start before the previous one has ended
_FEW = 4  # the least number of kernels for which a further process is started


def compile_kernels(
    needed: Iterable[Kernel],
    arch: str,
    others: Iterable[Kernel] = (),
    on_kernels: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Compiled]:
    """Compile kernels for `arch` ("sm_80") in as many processes as there are cores; returns machine code and launch by name.

    Raises CompileError if a needed kernel spills registers, or does not use tensor cores though it must. Kernels of `others`
    that do not compile or have such a fault are left out. `on_kernels` is called with the numbers of kernels that were tried
    and of all of them, by several threads in turn.
    """
    toolchain()  # raises CompileError if a tool is missing
    named = {kernel.name: (kernel, False) for kernel in others} | {kernel.name: (kernel, True) for kernel in needed}
    # Neighbours in this order are alike and take equally long to compile, so each process gets every n-th kernel.
    ordered = [named[name] for name in sorted(named)]
    workers = max(1, min(len(host.usable_cores()), -(-len(ordered) // _FEW)))
    with tempfile.TemporaryDirectory(prefix="belle-triton-") as folder, ThreadPoolExecutor(workers) as threads:
        compile_share = partial(_compile_share, arch=arch, folder=folder, on_kernel=_Count(len(ordered), on_kernels).add)
        results = list(threads.map(compile_share, (ordered[number::workers] for number in range(workers))))
    compiled: dict[str, Compiled] = {}
    for result in results:
        if isinstance(result, CompileError):
            raise result
        compiled |= result
    return dict(sorted(compiled.items()))


class _Count:
    """Counts kernels for a progress callback (done, total), on several threads."""

    def __init__(self, total: int, on_kernels: Callable[[int, int], None]) -> None:
        self._lock, self._done, self._total, self._on_kernels = Lock(), 0, total, on_kernels
        on_kernels(0, total)

    def add(self) -> None:
        with self._lock:
            self._done += 1
            self._on_kernels(self._done, self._total)


def _compile_share(
    kernels: list[tuple[Kernel, bool]], arch: str, folder: str, on_kernel: Callable[[], None]
) -> dict[str, Compiled] | CompileError:
    """Compile pairs (kernel, whether it is needed) in a new process; an error is returned, not raised."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    # For architectures from 9.0 on, Triton would use a newer assembler, whose code needs a newer driver; this one suits all.
    assembler = {"TRITON_PTXAS_PATH": str(_tool("ptxas")), "TRITON_PTXAS_BLACKWELL_PATH": str(_tool("ptxas"))}
    environment |= _SETTINGS | assembler | {"TRITON_CACHE_DIR": folder, "PYTHONPATH": path}
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, arch]
    compiled: dict[str, Compiled] = {}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as worker,
    ):
        assert worker.stdin is not None and worker.stdout is not None
        with suppress(BrokenPipeError), worker.stdin:
            pickle.dump(kernels, worker.stdin)
        with suppress(EOFError):
            while True:
                name, code, failure = pickle.load(worker.stdout)
                if failure:
                    return CompileError(**failure)
                if code is not None:
                    compiled[name] = code
                on_kernel()
        if worker.wait():
            errors.seek(0)
            last_line = errors.read().decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {worker.returncode}"]
            return CompileError("triton", "a process that compiles kernels ended", found=last_line[0])
    return compiled


def compile_kernel(kernel: Kernel, arch: str) -> Compiled:
    """Compile one kernel in this process, whose environment must contain `_SETTINGS`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = kernel.start()
    names = [f"{name}_ptr" for name, _ in kernel.pointers()]
    signature = {name: _TYPES[dtype] for name, (_, dtype) in zip(names, kernel.pointers(), strict=True)}
    overlap = int(arch.removeprefix("sm_")) >= _OVERLAPPING
    constants = {**kernel.constants(), OVERLAP: overlap}
    parameters = kernel.function.arg_names
    assert set(parameters) == signature.keys() | constants.keys(), f"{kernel.name}: {parameters}"
    assert [name for name in parameters if name in signature] == names, f"{kernel.name}: {names}"
    source = ASTSource(
        kernel.function,
        {name: signature.get(name, "constexpr") for name in parameters},
        {(parameters.index(name),): value for name, value in constants.items()},
        {(parameters.index(name),): _ALIGNED for name in names},
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": start.warps, "num_stages": start.stages})
    code: bytes = compiled.asm["cubin"]
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise CompileError("triton", f"kernel {kernel.name}", found="scratch memory of Triton", expected="none")
    if metadata.shared > SHARED_BYTES[arch]:
        found, expected = f"{metadata.shared} bytes of shared memory on {arch}", f"at most {SHARED_BYTES[arch]}"
        raise CompileError("triton", f"kernel {kernel.name}", found=found, expected=expected, remedy="make its tile smaller")
    registers, local, instructions = _usage(code, metadata.name)
    if local > kernel.stack():
        found, expected = f"{local} bytes of local memory on {arch}", f"{kernel.stack()}: registers spill"
        raise CompileError("triton", f"kernel {kernel.name}", found=found, expected=expected, remedy="make its tile smaller")
    used = tuple(sorted({name.partition(".")[0] for name in instructions if _TENSOR_CORES.match(name)}))
    if kernel.tensor_cores() and not used:
        raise CompileError("triton", f"kernel {kernel.name}", found=f"no tensor-core instruction on {arch}", expected="some")
    threads, shared = 32 * metadata.num_warps, metadata.shared
    launch = Launch(metadata.name, threads, shared, start.grid, start.rows, registers, local, used, overlap)
    return code, launch


def _usage(code: bytes, symbol: str) -> tuple[int, int, list[str]]:
    """Registers, bytes of local memory and instructions of a function, as NVIDIA's cuobjdump reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        text = _run("cuobjdump", "-sass", file.name)
    line = next((match for match in _USAGE.finditer(usage) if match[1] == symbol), None)
    if line is None:
        raise CompileError("triton", f"cuobjdump on {symbol}", found=usage.strip()[-200:], expected="its registers")
    return int(line[2]), int(line[3]) + int(line[5]), _INSTRUCTION.findall(text)


def _tool(name: str) -> Path:
    require_triton()
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name


def _run(tool: str, *arguments: str) -> str:
    try:
        done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise CompileError("triton", tool, found=error.strerror or str(error), remedy="install triton again") from None
    if done.returncode:
        raise CompileError("triton", tool, found=(done.stderr or done.stdout).strip()[-200:], remedy="install triton again")
    return done.stdout


@cache
def toolchain() -> dict[str, str]:
    """The versions that the machine code depends on. Raises CompileError if Triton or its tools are missing."""
    from importlib.metadata import version

    ptxas = _run("ptxas", "--version").strip().splitlines()[-1]
    return {"triton": version("triton"), "ptxas": ptxas}


def archive(modules: Mapping[str, bytes], seal: bytes) -> bytes:
    """A zip file of machine code, one member per kernel name, with a program's seal as its comment, which ends the file. Equal
    modules and seals give equal bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as written:
        for name, code in sorted(modules.items()):
            written.writestr(zipfile.ZipInfo(name + CUBIN), code)
        written.comment = seal
    return file.getvalue()


def _work(arch: str) -> None:
    """Write for each kernel in turn its name, its code or None, and the parts of the error that ends the work, or None."""
    kernels: list[tuple[Kernel, bool]] = pickle.load(sys.stdin.buffer)
    output, sys.stdout = sys.stdout.buffer, sys.stderr
    for kernel, needed in kernels:
        code, failure = None, None
        try:
            code = compile_kernel(kernel, arch)
        except CompileError as error:
            if needed:
                failure = {name: getattr(error, name) for name in ("stage", "what", "found", "expected", "remedy", "node")}
        except Exception as error:
            if needed:  # a bug of this module or of Triton
                raise RuntimeError(f"kernel {kernel.name}: {type(error).__name__}: {error}") from error
        pickle.dump((kernel.name, code, failure), output)
        output.flush()
        if failure:
            break


if __name__ == "__main__":
    _work(sys.argv[1])

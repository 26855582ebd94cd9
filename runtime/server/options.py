"""The options of the server, each stated once: command line, environment, file and their checks are derived from the fields.

The field `drain_timeout_s` is `--drain-timeout` on the command line, `BELLE_SERVE_DRAIN_TIMEOUT` in the environment and
`drain-timeout` in the file. Names are those of vLLM where it has the option.
"""

# ruff: noqa: RUF009 (`option` returns a field)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from belle_compile.runtime.capacity.slo import Slo
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.prompt import parse_variables
from belle_compile.runtime.serving.adapters import parse_named
from belle_compile.runtime.serving.result_cache.options import ResultCacheOptions

STAGE = "server options"
NO_RESULT_CACHE = "none"


def option(
    default: Any, help: str, *, name: str = "", metavar: str = "", least: float = -math.inf, most: float = math.inf,
    above: float = -math.inf, shown: bool = True,
) -> Any:  # fmt: skip
    """Declare an option. `least` and `most` are the smallest and the largest value, `above` is too small.

    `name` is that of the command line where it is not derived from the field's. Values that are not `shown` are secrets.
    """
    metadata = {"help": help, "name": name, "metavar": metavar, "least": least, "most": most, "above": above}
    return field(default=default, metadata=metadata, repr=shown)


def option_name(declared: Field[Any]) -> str:
    """The option's name in the file, and on the command line behind two dashes."""
    return declared.metadata["name"] or declared.name.removesuffix("_s").replace("_", "-")


@dataclass(frozen=True)
class EngineOptions:
    """What the engine is loaded with; None leaves the choice to it."""

    max_num_seqs: int | None = option(None, "Answers that are generated at the same time, at most.", least=1)
    kv_cache_memory: str | None = option(
        None, "Memory of the KV cache: bytes, such as 8GiB, or the share of what is free, such as 0.5.", metavar="SIZE"
    )
    kv_tokens: int | None = option(None, "Tokens the KV cache holds, in place of --kv-cache-memory.", least=1)
    max_queue: int | None = option(None, "Requests that wait, at most; those beyond it are refused with 429.", least=0)
    slo_ttft_s: float | None = option(
        None, "Seconds to a request's first token; one that would wait longer is refused with 429.", metavar="S", above=0
    )
    slo_tpot_s: float | None = option(
        None, "Seconds between tokens of an answer; so many answers are generated at a time as keep it.", metavar="S", above=0
    )
    capacity: Path | None = option(
        None,
        "What belle-run benchmark measured, for --slo-ttft and --slo-tpot. By default ENGINE/capacity.json.",
        metavar="FILE",
    )
    prefix_cache: bool = option(True, "Reuse keys and values of prompts that begin alike.")
    result_cache: str = option(
        "memory", "Where answers to greedy and seeded requests are stored: memory, sqlite:FILE, redis://HOST or none.",
        metavar="STORE",
    )  # fmt: skip
    result_cache_bytes: int = option(256 << 20, "Bytes of stored answers, at most.", least=1)
    result_cache_ttl_s: float | None = option(None, "Seconds that an answer stays stored.", metavar="S", above=0)
    audit_cache: float = option(0.0, "Share of the hits that idle steps recompute and compare.", least=0, most=1)
    threads: int | None = option(None, "Threads of the kernels of a rank.", least=1)
    isa: str | None = option(None, "Instruction set: amx, avx512vnni or avx2.")
    lora: tuple[str, ...] = option(
        (), "LoRA adapter that requests choose as their model by NAME; may be given several times.", metavar="NAME=DIR"
    )
    max_loras: int | None = option(None, "Adapters that can be loaded at the same time. By default those of --lora.", least=1)
    draft: Path | None = option(
        None, "Smaller engine of the same vocabulary, which guesses tokens for this one to verify.", metavar="DIR"
    )
    draft_tokens: int | None = option(
        None, "Tokens that it guesses a step. By default as many as pay, by measured times.", metavar="N", least=1
    )
    verify: bool = option(False, "Check the digest of every file, weights included, before loading.")

    def __post_init__(self) -> None:
        """Raise `EngineError` for a value outside of its range, or for options that do not go together."""
        check_ranges(self)
        KvMemory.parse(self.kv_tokens, self.kv_cache_memory)
        self.cache_options()
        parse_named(self.lora)
        if self.capacity and self.slo_ttft_s is None and self.slo_tpot_s is None:
            raise EngineError(STAGE, "capacity", found="no limit", expected="slo-ttft or slo-tpot too")

    def cache_options(self) -> ResultCacheOptions | None:
        """The result cache; None without one."""
        if self.result_cache == NO_RESULT_CACHE:
            return None
        return ResultCacheOptions(self.result_cache, self.result_cache_bytes, self.result_cache_ttl_s, self.audit_cache)

    def arguments(self) -> dict[str, Any]:
        """The arguments of `Engine.load`."""
        names = ("max_num_seqs", "kv_cache_memory", "kv_tokens", "max_queue", "prefix_cache", "threads", "isa", "draft",
                 "draft_tokens")  # fmt: skip
        passed = {name: getattr(self, name) for name in names}
        passed |= {"lora": parse_named(self.lora), "max_loras": self.max_loras}
        if self.slo_ttft_s is not None or self.slo_tpot_s is not None:
            passed["slo"] = Slo(self.slo_ttft_s, self.slo_tpot_s, self.capacity)
        return passed | {"verify": "full" if self.verify else "header", "result_cache": self.cache_options()}


@dataclass(frozen=True)
class ServerOptions:
    """How the engine is served."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 lets the system choose.", least=0, most=65535)
    uds: Path | None = option(None, "Unix socket to listen on, in place of host and port.", metavar="PATH")
    root_path: str = option("", "Path under which a proxy offers the server.", metavar="PATH")
    forwarded_allow_ips: tuple[str, ...] = option(
        (), "Address of a proxy whose X-Forwarded-For and -Proto are believed, or *; may be given several times.",
        metavar="IP",
    )  # fmt: skip
    ssl_certfile: Path | None = option(None, "Certificate chain for HTTPS, in PEM.", metavar="FILE")
    ssl_keyfile: Path | None = option(None, "The certificate's private key, in PEM.", metavar="FILE")
    allowed_origins: tuple[str, ...] = option(
        (), "Origin whose pages may call the server, or *; may be given several times. None by default.", metavar="ORIGIN"
    )
    served_model_names: tuple[str, ...] = option(
        (), "Name of the model in the API; may be given several times. By default that of the engine.",
        name="served-model-name", metavar="NAME",
    )  # fmt: skip
    default_chat_template_kwargs: str | None = option(
        None, "Variables of the prompt template, as a JSON object, that chats have unless they set them otherwise.",
        metavar="JSON",
    )  # fmt: skip

    api_keys: tuple[str, ...] = option(
        (), "Key that clients must send; may be given several times.", name="api-key", metavar="KEY", shown=False
    )
    api_key_file: Path | None = option(
        None, "TOML or JSON file of keys with names, limits and priorities; read again on SIGHUP.", metavar="FILE"
    )
    admin_key: str | None = option(
        None, "Key of administrators, who may replace the engine (POST /admin/engine); no other key opens /admin/.",
        metavar="KEY", shown=False,
    )  # fmt: skip
    allow_lora_updates: bool = option(
        False, "Let clients load adapters from the server's disk, and unload them (POST /v1/load_lora_adapter)."
    )  # fmt: skip
    metrics_auth: bool = option(False, "Let /metrics need a key too.")

    request_timeout_s: float | None = option(
        600.0, "Seconds from a request's arrival to its last token; requests may ask for less.", metavar="S", above=0
    )
    drain_timeout_s: float = option(
        120.0, "Seconds that requests under way have to end after SIGTERM or SIGINT.", metavar="S", least=0
    )
    header_timeout_s: float = option(
        10.0, "Seconds in which a request's headers must arrive, and its body must go on.", metavar="S", above=0
    )
    keep_alive_timeout_s: float = option(75.0, "Seconds that a connection without requests is kept.", metavar="S", above=0)
    max_connections: int = option(4096, "Open connections; those beyond it are refused with 503.", least=1)
    max_body_bytes: int = option(4 << 20, "Bytes of a request's body.", least=1)
    max_messages: int = option(2048, "Messages of a chat.", least=1)
    max_prompts: int = option(512, "Prompts of a completion request.", least=1)
    max_n: int = option(128, "Answers to a prompt.", least=1)

    log_level: Literal["debug", "info", "warning", "error"] = option("info", "Least level of what is logged.")
    log_format: Literal["json", "text"] = option("json", "Form of the log's lines, on stderr.")
    access_log: bool = option(True, "Log each request.")
    log_prompts: bool = option(False, "Log prompts and answers too.")

    def __post_init__(self) -> None:
        """Raise `EngineError` for a value outside of its range, or for options that do not go together."""
        check_ranges(self)
        if self.ssl_keyfile and not self.ssl_certfile:
            raise EngineError(STAGE, "ssl-keyfile", found="a key", expected="its certificate too", remedy="give ssl-certfile")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise EngineError(STAGE, "root-path", found=repr(self.root_path), expected='a path such as "/belle"')
        admin = () if self.admin_key is None else (self.admin_key,)
        texts = {"api-key": self.api_keys, "admin-key": admin, "served-model-name": self.served_model_names}
        for name, values in texts.items():
            if not all(values):
                raise EngineError(STAGE, name, found="an empty text", expected="at least one character")
        self.template_variables()

    def template_variables(self) -> dict[str, Any]:
        """The variables of the prompt template that chats have by default; raises `EngineError` for what is no object."""
        text = self.default_chat_template_kwargs
        return parse_variables(text, "default-chat-template-kwargs", STAGE) if text is not None else {}


def check_ranges(options: Any) -> None:
    """Raise `EngineError` for the first option of a record whose value is outside of its range."""
    for declared in fields(options):
        value, limits = getattr(options, declared.name), declared.metadata
        if not isinstance(value, (int, float)):
            continue
        if not (math.isfinite(value) and limits["least"] <= value <= limits["most"] and value > limits["above"]):
            raise EngineError(STAGE, option_name(declared), found=str(value), expected=_range_text(limits))


def _range_text(limits: Any) -> str:
    if limits["most"] < math.inf:
        return f"{limits['least']} to {limits['most']}"
    return f"more than {limits['above']}" if limits["above"] > -math.inf else f"{limits['least']} or more"


def all_options() -> Sequence[Field[Any]]:
    """The fields of both records, those of the server first."""
    return (*fields(ServerOptions), *fields(EngineOptions))

"""The bodies of POST /v1/load_lora_adapter and POST /v1/unload_lora_adapter, which are vLLM's."""

from __future__ import annotations

from pydantic import Field

from belle_compile.runtime.server.schemas.fields import Body
from belle_compile.runtime.serving.adapters import LONGEST_NAME


class LoadAdapterBody(Body):
    """A directory of the server's disk with an adapter as PEFT saves it, the name that requests choose it by, and what its
    changes are multiplied with."""

    lora_name: str = Field(min_length=1, max_length=LONGEST_NAME)
    lora_path: str = Field(min_length=1, max_length=4096)
    lora_scale: float | None = None


class UnloadAdapterBody(Body):
    """The name of an adapter."""

    lora_name: str = Field(min_length=1, max_length=LONGEST_NAME)

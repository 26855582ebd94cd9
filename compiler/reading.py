"""How a checkpoint is read: what its files do not say, and the user does.

The command line imports this module before it knows that the arguments are right: it needs no package of the extra `build`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

DECRYPT = "decrypt"  # the stage of a command that writes the plaintext of a release
_OPTION = "option"  # the key of a field's metadata that holds the option of the command line


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter to merge: its directory or its name on the Hugging Face Hub, and what its changes are multiplied with."""

    place: str
    scale: float = 1.0

    @property
    def name(self) -> str:
        """The last part of its place."""
        return Path(self.place).expanduser().resolve().name

    @property
    def words(self) -> str:
        """Its name and scale, for a manifest."""
        return self.name if self.scale == 1 else f"{self.name} at {self.scale:g}"


@dataclass(frozen=True)
class Reading:
    """What says how a checkpoint is read, besides its files; every command that opens one takes these options.

    `ignored_config_keys` of config.json, which this compiler does not know, count as absent. With `ignore_adapter`, a LoRA
    adapter beside the weights is passed over, which is refused otherwise; None is for readers of small files, who do not look
    for one. `adapters` are merged in turn. `key` decrypts an XOR-encrypted release while it is read, and `save_decrypted` is a
    new directory for its plaintext, which is written nowhere otherwise.
    """

    ignored_config_keys: tuple[str, ...] = field(default=(), metadata={_OPTION: "--ignore-config-key"})
    ignore_adapter: bool | None = field(default=False, metadata={_OPTION: "--ignore-adapter"})
    adapters: tuple[AdapterChoice, ...] = field(default=(), metadata={_OPTION: "--adapter"})
    key: Path | None = field(default=None, metadata={_OPTION: "--key"})
    save_decrypted: Path | None = field(default=None, metadata={_OPTION: "--save-decrypted"})

    @property
    def options(self) -> list[str]:
        """The options of the command line by which this reading differs from the one without any."""
        return [each.metadata[_OPTION] for each in fields(self) if getattr(self, each.name) != getattr(PLAIN, each.name)]

    @property
    def facts(self) -> dict[str, Any]:
        """What an engine's manifest records of it, as the options of the step that opened the checkpoint."""
        facts: dict[str, Any] = {"ignored_config_keys": list(self.ignored_config_keys)} if self.ignored_config_keys else {}
        facts |= {"ignored_adapter": True} if self.ignore_adapter else {}
        facts |= {"adapters": [adapter.words for adapter in self.adapters]} if self.adapters else {}
        return facts | ({"decrypted_with": self.key.name} if self.key is not None else {})


PLAIN = Reading()

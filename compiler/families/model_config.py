"""The dimensions that the configs of all families have."""

from __future__ import annotations

from dataclasses import dataclass

STAGE = "family"  # of errors


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dimensions of a model, as config.json states or implies them; a family adds fields of its own."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    epsilon: float  # the epsilon of the norms
    tied_head: bool  # the head's weight is the embedding table

    @property
    def metadata(self) -> dict[str, str]:
        """The graph's metadata_props, without the family's name."""
        keys = "num_layers num_heads num_kv_heads head_dim max_position vocab_size hidden_size intermediate_size".split()
        return {key: str(getattr(self, key)) for key in keys}

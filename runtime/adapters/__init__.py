"""Adapters (LoRA, as PEFT saves them) that are applied while an engine runs, and not merged into its weights."""

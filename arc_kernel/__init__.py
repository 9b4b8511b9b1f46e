"""arc-kernel: a LoRA per ARC task at test time, predictions under many views, votes. Read the rooms in README's order."""

__version__ = "0.1.0"

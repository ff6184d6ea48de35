"""What is trained on top of a base: building, loading and saving adapters.

Importing this package makes the methods that PEFT lacks known to PEFT: `PeftModel.from_pretrained` then opens their folders.
"""

from pipeline.adapters import bitfit, hybrid, prefix, reft, soft_prompt

__all__ = ["bitfit", "hybrid", "prefix", "reft", "soft_prompt"]

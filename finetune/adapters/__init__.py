"""LoRA: attach, save, merge, swap."""

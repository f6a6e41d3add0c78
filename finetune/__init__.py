"""Everything done to a base afterwards: SFT, adapters, memory, the demo."""

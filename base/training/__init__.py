"""What the loop (base/train.py) is made of: objectives, one step, a run's history, its checkpoints, signals."""

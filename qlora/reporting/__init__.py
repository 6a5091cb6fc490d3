"""What a run shows: progress in the terminal, tables, and experiment trackers."""

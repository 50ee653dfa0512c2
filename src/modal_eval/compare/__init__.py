"""Is one set of scores worse than another? Baselines on disk, paired differences, and the gate over a suite."""

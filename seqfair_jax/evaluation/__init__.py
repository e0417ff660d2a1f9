"""From scores to figures: ranks, metrics, slices, baselines, significance."""

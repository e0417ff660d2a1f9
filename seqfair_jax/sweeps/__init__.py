"""Many runs: grids, searches, their jobs, and what they cost."""

"""Many runs: grids, searches, the jobs they consist of, and what they cost."""

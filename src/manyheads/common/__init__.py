"""What several layers need and nothing else."""

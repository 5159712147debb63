"""What merging costs: time and memory, side by side with what else one could run."""

"""The study: every merging method on real tasks, over several trainings of the specialists."""

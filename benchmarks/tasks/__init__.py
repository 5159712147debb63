"""What models are asked, and how their answers are judged: one YAML file per task, and the schema of these."""

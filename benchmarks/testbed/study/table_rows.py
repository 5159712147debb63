"""The rows of the table of test scores: merges, what they are compared with, and how they are called."""

from benchmarks.testbed.data import MODALITIES
from benchmarks.testbed.study.jobs import AS_PUBLISHED, BASE, JOINT, TUNED
from benchmarks.testbed.study.rows import ROWS

REFERENCES: dict[str, str] = {BASE: "base", **{m: f"{m} specialist" for m in MODALITIES}}
TRAINED = {TUNED: "average + fine-tuning", JOINT: "jointly trained LoRA"}
TITLES: dict[str, str] = {
    **REFERENCES,
    **{row.name: row.title for row in ROWS},
    AS_PUBLISHED: "ES as published",
    **TRAINED,
}
MERGES = [*(row.name for row in ROWS), AS_PUBLISHED]
SIGNALS = [*(row.name for row in ROWS if row.signals), AS_PUBLISHED]

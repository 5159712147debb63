"""Where the study keeps what: one folder for each thing that is made once."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.testbed.cache import cache_folder


@dataclass(frozen=True)
class Places:
    """The folders of a study.

    Attributes:
        root: of all of them.
    """

    root: Path

    @classmethod
    def usual(cls) -> "Places":
        """In the testbed's cache."""
        return cls(cache_folder() / "study")

    def tasks(self) -> Path:
        """Tasks that ask about validation data or shuffled partners."""
        return self.root / "tasks"

    def model(self, seed: int, name: str) -> Path:
        """A model that was trained: a specialist, `joint`, or `tuned`."""
        return self.root / f"seed-{seed}" / name

    def training(self, seed: int, name: str) -> Path:
        """The record of a training, which stays when its model does not."""
        return self.root / "trainings" / f"seed-{seed}" / f"{name}.yaml"

    def untrained(self, seed: int, name: str) -> Path:
        """What a training starts from."""
        return self.root / f"seed-{seed}" / "untrained" / name

    def recipe(self, seed: int, name: str) -> Path:
        """Of a training."""
        return self.root / f"seed-{seed}" / "recipes" / f"{name}.yaml"

    def probe(self, first: int, samples: int) -> Path:
        """A text file for each modality, of so many training items from number `first` on."""
        return self.root / "probes" / f"{first}-{first + samples}"

    def embeddings(self, seed: int, inputs: str) -> Path:
        """What base and specialists make of the probe; of these inputs."""
        return self.root / f"seed-{seed}" / f"embeddings-{inputs}.safetensors"

    def validation(self, row: str, variant: str = "") -> Path:
        """Results of a setting of a row on validation data; of all of them, and which was chosen."""
        return self.root / "validation" / row / variant

    def probe_size(self, row: str, samples: int) -> Path:
        """Results of a row on validation data, with a probe of so many samples."""
        return self.root / "probe sizes" / row / str(samples)

    def test(self, seed: int, row: str) -> Path:
        """Results of a row on test data."""
        return self.root / "test" / f"seed-{seed}" / row

    def scratch(self, *what: object) -> Path:
        """A merged model while it is evaluated; of nothing, the folder of all of them."""
        return self.root / "scratch" / "-".join(map(str, what))

    def log(self, job: str) -> Path:
        """What a job printed."""
        return self.root / "logs" / f"{job.replace('/', '-')}.log"

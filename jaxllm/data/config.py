"""What to read and how to cut it into rows. Every value is checked here, before a file is opened."""

from collections.abc import Mapping
from dataclasses import dataclass, field

SPLITS = ("document", "tail")
PACKINGS = ("concatenated", "best_fit", "best_fit_whole")


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents.

    path: a file, a folder, a glob, or "embedded".
    field: what holds the text in jsonl and parquet.
    weights: share of the rows in each stage of `DataConfig.stage_steps`, relative to the other sources'.
    validation_path: held-out documents; empty: they are split off `path`.
    """

    path: str
    field: str = "text"
    weights: tuple[float, ...] = (1.0,)
    validation_path: str = ""

    def __post_init__(self):
        object.__setattr__(self, "weights", tuple(self.weights))
        if not self.path:
            raise ValueError("path='' names no source: give a file, a folder, a glob, or 'embedded'")
        if any(not 0 <= weight < float("inf") for weight in self.weights):
            raise ValueError(f"weights={self.weights} of {self.path}: a weight is a finite number, 0 or more")


@dataclass(frozen=True)
class DataConfig:
    """The text of a run.

    sources: name -> SourceConfig, or a mapping of its fields.
    stage_steps: first training step of each stage of the mixture.
    validation: share that is held out.
    split: of what: "document", chosen by a hash of the content; or "tail", the last bytes of the only document.
    sequence_length: targets in a row.
    packing: "concatenated"; or whole documents: "best_fit", longer ones cut, or "best_fit_whole", longer ones dropped.
    cache: directory of the tokens; empty: beside the run.
    workers: loader processes; 0: one thread.
    prefetch: batches made ahead.
    shuffle_seed: decides the order of the rows.
    """

    sources: Mapping[str, SourceConfig] = field(default_factory=lambda: {"embedded": SourceConfig("embedded")})
    stage_steps: tuple[int, ...] = (0,)
    validation: float = 0.05
    split: str = "document"
    sequence_length: int = 256
    packing: str = "concatenated"
    cache: str = ""
    workers: int = 0
    prefetch: int = 4
    shuffle_seed: int = 0

    def __post_init__(self):
        sources = {
            name: source if isinstance(source, SourceConfig) else SourceConfig(**source)
            for name, source in self.sources.items()
        }
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "stage_steps", tuple(self.stage_steps))
        if not sources:
            raise ValueError("sources={} leaves nothing to read: name at least one, such as path='embedded'")
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r} is not one of {SPLITS}")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing={self.packing!r} is not one of {PACKINGS}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation={self.validation} is a share: 0 or more, and less than 1")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length={self.sequence_length} is too short: a row needs at least 2 targets")
        if min(self.workers, self.prefetch, self.shuffle_seed) < 0:
            raise ValueError(
                f"workers={self.workers}, prefetch={self.prefetch} and shuffle_seed={self.shuffle_seed} are 0 or more"
            )
        self._check_stages()

    def _check_stages(self):
        steps = self.stage_steps
        if steps[:1] != (0,) or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"stage_steps={steps} must start at 0 and rise")
        for name, source in self.sources.items():
            if len(source.weights) != len(steps):
                raise ValueError(
                    f"source {name!r} has {len(source.weights)} weights for {len(steps)} stages: "
                    f"weights={source.weights}, stage_steps={steps}"
                )
        for stage, step in enumerate(steps):
            if not any(source.weights[stage] for source in self.sources.values()):
                raise ValueError(f"every weight of the stage that starts at step {step} is 0: raise one")

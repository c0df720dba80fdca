"""What to read and how to cut it into rows. Every value is checked here, before a file is opened."""

from collections.abc import Mapping
from dataclasses import dataclass, field

SPLITS = ("document", "tail")
PACKINGS = ("concatenated", "best_fit", "best_fit_whole", "best_fit_truncated")
WHOLE = ("best_fit_whole", "best_fit_truncated")  # no row continues a document of another: what conversations need
TEXT, AUTO = "text", "auto"
PREFERENCE = "preference"
PREFERENCES = (PREFERENCE, "pairs", "scored", "thumbs")
FORMATS = (TEXT, AUTO, "messages", "alpaca", "sharegpt", "prompt_response", *PREFERENCES)
TURNS = ("all", "last")
PAIRS = ("all", "best_worst")
ANSWERS = ("paired", "alone", "chosen")
ON_ERROR = ("raise", "skip")
SELECTIONS = ("all", "longest", "random", "diverse", "highest", "lowest")


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents: texts, conversations, or preferences between answers.

    path: a file, a folder, a glob, or "embedded".
    field: what holds the text in a record of format "text".
    weights: share of the rows in each stage of `DataConfig.stage_steps`, relative to the other sources'.
    validation_path: held-out documents; empty: they are split off `path`.
    format: "text"; or of conversations: "auto" asks the first record; or of preferences: "preference" asks it.
    turns: "all" of the assistant's turns are supervised, or the "last"; of preferences always the last.
    pairs: of a list of scored answers "all" pairs that differ in score, or "best_worst".
    answers: "paired", two of one preference in a row; or "alone", each with an answer to another prompt beside it; or
      "chosen", conversations with the better ones.
    response_only: response tuning, that is training on the assistant's turns without what they answer.
    on_error: "raise" at a bad record, or "skip" and count it.
    packing: as in `DataConfig`; empty takes its.
    tag: field whose values divide the source into tasks; empty: one task.
    balance: the share of a task is its rows ** balance; 1 leaves them as they are, 0 makes tasks equal.
    select: which training documents to keep: the "longest" (answers), "random" ones, "diverse" ones, or those with the
      "highest" or "lowest" `score_field`.
    keep: how many, or which share where it is below 1.
    score_field: number of a record to select by.
    select_seed: decides which are "random".
    """

    path: str
    field: str = "text"
    weights: tuple[float, ...] = (1.0,)
    validation_path: str = ""
    format: str = TEXT
    turns: str = "all"
    pairs: str = "all"
    answers: str = "paired"
    response_only: bool = False
    on_error: str = "raise"
    packing: str = ""
    tag: str = ""
    balance: float = 1.0
    select: str = "all"
    keep: float = 0.0
    score_field: str = ""
    select_seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "weights", tuple(self.weights))
        if not self.path:
            raise ValueError("path='' names no source: give a file, a folder, a glob, or 'embedded'")
        if any(not 0 <= weight < float("inf") for weight in self.weights):
            raise ValueError(f"weights={self.weights} of {self.path}: a weight is a finite number, 0 or more")
        _check_one_of("format", self.format, FORMATS)
        _check_one_of("turns", self.turns, TURNS)
        _check_one_of("pairs", self.pairs, PAIRS)
        _check_one_of("answers", self.answers, ANSWERS)
        _check_one_of("on_error", self.on_error, ON_ERROR)
        _check_one_of("packing", self.packing, ("", *PACKINGS))
        _check_one_of("select", self.select, SELECTIONS)
        if not self.is_chat and (self.turns != "all" or self.response_only):
            raise ValueError(
                f"turns={self.turns!r} and response_only={self.response_only} of {self.path} are of conversations: set "
                f"format to 'auto' or to what they are in, not {self.format!r}"
            )
        if self.is_preference and self.response_only:
            raise ValueError(
                f"response_only=True of {self.path}: a preference is between answers to a prompt, which stays"
            )
        if self.format not in PREFERENCES and (self.pairs != "all" or self.answers != "paired"):
            raise ValueError(
                f"pairs={self.pairs!r} and answers={self.answers!r} of {self.path} are of preferences: set format to "
                f"'preference' or to what they are in, not {self.format!r}"
            )
        self._check_selection()

    @property
    def is_chat(self) -> bool:
        """Whether it holds conversations, those of preferences included."""
        return self.format != TEXT

    @property
    def is_preference(self) -> bool:
        """Whether its documents are units of preferences, two answers each."""
        return self.format in PREFERENCES and self.answers != "chosen"

    def _check_selection(self):
        if not 0 <= self.balance < float("inf") or (self.balance != 1 and not self.tag):
            raise ValueError(f"balance={self.balance} with tag={self.tag!r} of {self.path}: 0 or more, with a tag")
        if (self.keep > 0) != (self.select != "all") or (self.keep > 1 and self.keep != int(self.keep)):
            raise ValueError(
                f"keep={self.keep} with select={self.select!r} of {self.path}: a whole number, or a share below 1, of "
                "what select keeps; 0 with 'all'"
            )
        if bool(self.score_field) != (self.select in ("highest", "lowest")):
            raise ValueError(
                f"score_field={self.score_field!r} with select={self.select!r} of {self.path}: 'highest' and 'lowest' "
                "need the field of the score, the others need none"
            )


@dataclass(frozen=True)
class DataConfig:
    """The text of a run.

    sources: name -> SourceConfig, or a mapping of its fields.
    stage_steps: first training step of each stage of the mixture.
    validation: share that is held out.
    split: of what: "document", chosen by a hash of the content; or "tail", the last bytes of the only document.
    sequence_length: targets in a row.
    packing: "concatenated"; or whole documents: longer ones are cut into pieces by "best_fit", dropped by
      "best_fit_whole", and lose their end by "best_fit_truncated". Conversations need one of the last two.
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
        _check_one_of("split", self.split, SPLITS)
        _check_one_of("packing", self.packing, PACKINGS)
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation={self.validation} is a share: 0 or more, and less than 1")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length={self.sequence_length} is too short: a row needs at least 2 targets")
        if min(self.workers, self.prefetch, self.shuffle_seed) < 0:
            raise ValueError(
                f"workers={self.workers}, prefetch={self.prefetch} and shuffle_seed={self.shuffle_seed} are 0 or more"
            )
        self._check_stages()
        self._check_conversations()

    def packing_of(self, name: str) -> str:
        """The packing of a source: its own, or the one of all."""
        return self.sources[name].packing or self.packing

    def _check_conversations(self):
        for name, source in self.sources.items():
            if source.is_chat and self.packing_of(name) not in WHOLE:
                raise ValueError(
                    f"source {name!r} holds conversations, which packing={self.packing_of(name)!r} cuts in the middle: "
                    f"set its packing to one of {WHOLE}"
                )
            if source.is_chat and self.split != "document" and not source.validation_path:
                raise ValueError(
                    f"source {name!r} holds conversations, of which split={self.split!r} holds out none: use 'document'"
                )

        kinds = {source.answers if source.is_preference else "no preferences" for source in self.sources.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"sources {list(self.sources)} mix {sorted(kinds)}, whose rows differ: give them to runs of their own"
            )

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


def _check_one_of(name: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise ValueError(f"{name}={value!r} is not one of {values}")

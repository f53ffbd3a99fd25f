"""What a run of the demo came to, as its report shows it and `summary.json` keeps it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from ssl_core.downstream.comparison import Comparison
from ssl_core.downstream.search import SearchResult

CurvePoint: TypeAlias = Sequence[Any]
"""A journal item: [step, ms since the epoch, metrics by name]."""


@dataclass(frozen=True)
class DataFacts:
    """The data set.

    Attributes:
        description: Its name and size.
        simulated: Whether its subjects are simulated.
        text: Where it was published, and its splits.
        notes: Files without a partner or in quarantine.
        facts: Table of facts.
    """

    description: str
    simulated: bool
    text: str
    notes: tuple[str, ...]
    facts: Mapping[str, str | int]


@dataclass(frozen=True)
class PretrainFacts:
    """The pre-training.

    Attributes:
        method: Its method.
        steps: Optimizer steps.
        global_batch: Crops of a step.
        workers: Ray Train workers.
        points: Metrics by step.
        samples_per_s: Median rate after the start.
        wait_share: Median share of the step time in which it waited for data.
        run_id: MLflow run.
        run_url: Its page.
        model: URI of the encoder.
    """

    method: str
    steps: int
    global_batch: int
    workers: int
    points: tuple[CurvePoint, ...]
    samples_per_s: float
    wait_share: float
    run_id: str
    run_url: str
    model: str


@dataclass(frozen=True)
class PredictedCase:
    """A raw file that was segmented.

    Attributes:
        input: The file.
        output: Its mask.
        dice: Mean Dice over labels, as the job scored it.
    """

    input: str
    output: str
    dice: float


@dataclass(frozen=True)
class Predictions:
    """Raw files segmented by the registered model, each mask on its image's grid.

    Attributes:
        model: Model URI.
        cases: `best`, `median` and `worst` test case.
    """

    model: str
    cases: Mapping[str, PredictedCase]

    @property
    def input(self) -> str:
        """File of the median case."""
        return self.cases["median"].input

    @property
    def output(self) -> str:
        """Mask of the median case."""
        return self.cases["median"].output

    def to_json(self) -> dict[str, Any]:
        """The median case, and all three below `cases`."""
        cases = {rank: asdict(case) for rank, case in self.cases.items()}
        return {"model": self.model, "same_geometry": True, **cases["median"], "cases": cases}


@dataclass(frozen=True)
class DemoSummary:
    """One run of the demo.

    Attributes:
        created: When.
        headline: Figures over their names.
        data: The data set.
        pretrain: The pre-training.
        search: The search.
        finetune: The fine-tuning.
        predict: Predictions from the registry.
        timings: Seconds of each stage.
        links: Addresses by name.
        environment: Machine and versions.
        config: Resolved configurations, YAML.
    """

    created: str
    headline: Mapping[str, str | int]
    data: DataFacts
    pretrain: PretrainFacts
    search: SearchResult
    finetune: Comparison
    predict: Predictions
    timings: Mapping[str, float]
    links: Mapping[str, str]
    environment: Mapping[str, str]
    config: str

    def to_json(self) -> dict[str, Any]:
        """As written to `summary.json`; the parts are as the jobs wrote them."""
        return {
            **vars(self),
            "data": asdict(self.data),
            "pretrain": asdict(self.pretrain),
            "search": self.search.to_json(),
            "finetune": self.finetune.to_json(),
            "predict": self.predict.to_json(),
        }

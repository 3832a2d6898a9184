"""Fine-tuning on labels, inside a suite: of a copy of the encoder, through the one loop, with rates by layer.

Four ways, from little to much: the head alone on random crops ("frozen"), the last blocks ("partial"), everything
("full"), and everything from the head of a linear probe on, which keeps features of few or distant data from being
distorted (Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022,
arXiv 2202.10054; "lp_ft"). Defaults are those of MAE's fine-tuning (He et al. 2022), without mixing.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config.durations import Duration
from pipeline.config.schema import Component, Optimizer, Strict, Training
from pipeline.core.evaluation import EvalContext, Evaluation, Features, Output, Uses
from pipeline.dist.group import by_first
from pipeline.evals._classes import in_classes_of
from pipeline.evals._classified import accuracies, classified, guesses
from pipeline.evals._finetuned import Classifier
from pipeline.evals._logistic import LogisticConfig, Regression
from pipeline.evals._probe import check_samples
from pipeline.evals._training import settled

START = 0.01
"""Standard deviation of the initial weights of a head that is drawn."""
TRAINING = Training(
    length=Duration(20, "ep"),
    optimizer=Optimizer(lr=5e-4, lr_scaling="linear", betas=(0.9, 0.999), weight_decay=0.05, layer_decay=0.65),
    schedule=Component.model_validate({"name": "cosine", "warmup": "5%"}),
)


class Config(Strict):
    """Settings of fine-tuning."""

    train: str = "train"
    """Stream that is trained on."""
    test: str = "val"
    """Stream that is classified, in the geometry of the suite."""
    mode: Literal["frozen", "partial", "full", "lp_ft"] = "full"
    blocks: Annotated[int, Field(ge=1)] | None = None
    """Of "partial": how many of the last blocks are trained, with what follows them; left out: 2."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    training: Training = TRAINING
    """Length, batch, optimizer with its groups ("head." and "encoder." begin the names), schedule, precision, crops. If
    ``image`` is left out, random crops of the size of the suite's images; a micro-batch holds no more than a rank's
    share of ``global_batch``."""

    @model_validator(mode="after")
    def _blocks_of_partial(self) -> "Config":
        if self.blocks is not None and self.mode != "partial":
            raise ValueError(f"'blocks' is for mode = \"partial\", not {self.mode!r}; remove it")
        return self

    @property
    def trained(self) -> int | None:
        """Layers of the encoder; None: all."""
        return {"frozen": 0, "partial": self.blocks or 2}.get(self.mode)


class FineTune(Evaluation):
    """Reports "finetune/top1", "top5" with at least five classes, the mean recall of the classes and the table of
    confusions, at the end of the training; of "lp_ft" also "finetune/top1_start", that of the linear probe.
    """

    trains = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """What is trained on and what is classified."""
        return Uses({name: ("image", "label") for name in (self.config.train, self.config.test)})

    def check(self, ctx: EvalContext) -> None:
        """As many layers as are to be trained."""
        Classifier(ctx.encoders["image"], torch.zeros(1, 1), torch.zeros(1), self.config.trained, 0.0)

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Train on all ranks, classify on all ranks.

        Raises:
            DataError: too little to train on, or a test sample of a class that training lacks.
            Mistakes: the batch does not fit the data or the ranks.
            NonFiniteError: the loss is not finite.
        """
        config = self.config
        train, test = (ctx.features("image", name) for name in (config.train, config.test))
        test = in_classes_of(test, train.classes, config.test, f"stream {config.train!r}")
        check_samples(train, test, config.train, config.test)
        weight, bias = self._head(ctx, train)
        if config.mode == "lp_ft":
            start = guesses(test.x @ weight.T + bias)
            yield from accuracies("finetune", start, test.label, len(train.classes), config.test, "_start")
        objective = Classifier(ctx.encoders["image"], weight, bias, config.trained, config.label_smoothing)
        ctx.train(objective, config.train, settled(config.training, ctx, config.test))
        found = ctx.features(f"finetune of {ctx.folder.name}", config.test, module=objective.encoders()["logits"])
        yield from classified("finetune", guesses(found.x), test.label, train.classes, config.test)

    def _head(self, ctx: EvalContext, train: Features) -> tuple[Tensor, Tensor]:
        """Weight [K,D] and bias [K] to start from."""
        if self.config.mode == "lp_ft":
            regression = Regression(LogisticConfig(), "finetune", ctx.place.device)
            return by_first(lambda: regression.head(train))
        generator = torch.Generator().manual_seed(self.config.training.seed)
        shape = (len(train.classes), train.x.shape[1])
        return START * torch.randn(shape, generator=generator), torch.zeros(shape[0])

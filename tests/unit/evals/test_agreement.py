import pytest

from pipeline.core.errors import ConfigError
from pipeline.evals.agreement import Agreement
from pipeline.evals.agreement import Config as AgreementConfig
from tests.unit.evals.generated import encoders, generator, run


def test_agreement_is_what_the_generator_does(lone_group):
    sharp = run(Agreement(AgreementConfig(samples=40)), encoders(), {})
    assert sharp["agreement/top1"].value == 1.0 and sharp["agreement/top1"].n == 40
    deaf = encoders()
    deaf["generator"].sampler = deaf["generator"].sampler.model_copy(update={"guidance": 0.0})
    # without guidance it makes the middle grey, which is class 2 of 5
    assert run(Agreement(AgreementConfig(samples=40)), deaf, {})["agreement/top1"].value == pytest.approx(0.2)
    with pytest.raises(ConfigError, match="trained with condition"):
        run(Agreement(AgreementConfig(samples=4)), encoders() | {"generator": generator(classes=0)}, {})

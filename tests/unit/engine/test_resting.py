"""What is frozen is in eval mode, and only as long as it is."""

import torch

from pipeline.config.schema import Optimizer
from pipeline.core.protocols import Clock, StepContext
from pipeline.engine.resting import Resting
from tests.contracts.components import build_objective, make_batch

NAME = "supervised with batch norm"


def resting(*groups, **frozen):
    objective = build_objective(NAME).train()
    groups = Optimizer.model_validate({"lr": 1.0, "groups": groups}).groups
    return objective, Resting(objective, groups, frozen)


def moves(objective, step):
    """Names of batch norms whose statistics a forward of the step moves."""
    before = {name: value.clone() for name, value in objective.named_buffers() if name.endswith("running_mean")}
    objective(make_batch(objective, NAME), StepContext(1, Clock(step, 0, 10)))
    after = dict(objective.named_buffers())
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_statistics_stand_still_while_an_encoder_is_frozen_and_go_on_after():
    objective, rest = resting({"prefix": "encoder", "frozen_until": "2ba"}, encoder=(0, 2))
    seen = []
    for step in range(4):
        rest.begin(step)
        seen.append(len(moves(objective, step)))
    assert seen[:2] == [0, 0] and seen[2] == seen[3] > 5
    assert objective.training and objective.head.training


def test_the_first_blocks_rest_for_good_and_their_neighbours_do_not():
    frozen = {"encoder.backbone.layer1": (3, 5)}
    stem = ({"prefix": f"encoder.backbone.{part}", "frozen": True} for part in ("conv1", "bn1"))
    objective, rest = resting(*stem, {"prefix": "encoder.backbone.layer1", "frozen_from": "3ba"}, **frozen)
    for step in range(2, 6):
        objective.train()  # as after a survey
        rest.begin(step)
        moved = moves(objective, step)
        assert not any(name.startswith("encoder.backbone.bn1") for name in moved)
        assert any("layer1" in name for name in moved) == (step not in (3, 4))
        assert any("layer2" in name for name in moved)


def test_what_an_objective_holds_in_eval_mode_stays_so_when_others_wake():
    objective, rest = resting({"prefix": "head", "frozen_until": "1ba"}, head=(0, 1))
    teacher = objective.encoder.backbone.layer1
    plain = type(objective).train
    objective.train = lambda mode=True: (plain(objective, mode), teacher.eval())[0]
    objective.train()
    for step in range(3):
        rest.begin(step)
        assert objective.head.training == (step > 0) and not teacher.training

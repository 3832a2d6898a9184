"""What the notes of a run say of a generator and its critic."""

from pipeline.run.rivalry import PATIENCE, RivalryWatch


def told(*lines):
    said, watch = [], RivalryWatch()
    for step, line in enumerate(lines, 1):
        watch.look(step, {f"critic/{name}": value for name, value in line.items()}, said.append)
    return said


def apart(fake, real=2.0):
    return {"unlike_fake": fake, "unlike_real": real}


def test_a_collapse_is_said_once_and_again_after_recovery():
    said = told(apart(1.0), apart(0.09), apart(0.01), apart(0.3), apart(0.02))
    assert [text.split(":")[0] for text in said] == ["step 2", "step 5"]
    assert "unlike_fake 0.09" in said[0] and "critic.spectral" in said[0]
    assert not told(apart(1.0), apart(0.11))


def test_a_generator_that_has_just_begun_is_given_time():
    assert not told(*[apart(0.0)] * (PATIENCE - 1))
    assert len(told(*[apart(0.0)] * (PATIENCE + 5))) == 1


def test_scores_that_grow_are_said():
    said = told({"real": 3.0, "fake": -4.0}, {"real": 900.0, "fake": -1500.0}, {"real": 2e3, "fake": -3e3})
    assert len(said) == 1 and "step 2" in said[0] and "-1.5e+03" in said[0]


def test_other_lines_are_passed_over():
    RivalryWatch().look(1, {"loss": 1.0, "critic/loss": 2.0, "fake": 5e3}, say=lambda text: 1 / 0)

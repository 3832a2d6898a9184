"""Pictures of what found what: images where they belong, texts in their colours."""

import numpy as np
import torch

from pipeline.nn.pictures import GAP, RIGHT, SIDE, TEXT, WRONG, Line, Match, beneath, beside, pairs, verdict


def flat(values: list[int]) -> torch.Tensor:
    """Grey images of 16 pixels, each of one value."""
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(axis=-1).any())


def test_images_stand_beside_their_lines():
    lines = [[Line("0.50  a long caption", verdict(True))], [Line("no", verdict(False)), Line("x", verdict(False))]]
    picture = beside(flat([10, 200]), lines)
    first, second = picture[: SIDE + GAP], picture[SIDE + GAP :]
    assert (first[:SIDE, GAP : GAP + SIDE] == 10).all() and (second[:SIDE, GAP : GAP + SIDE] == 200).all()
    assert has(first, RIGHT) and not has(first, WRONG) and has(second, WRONG) and not has(second, RIGHT)
    assert (picture[:, -1] == 255).all(), "a text is cut"


def test_images_stand_under_their_titles_with_notes_beneath():
    picture = beneath(["first", "second"], [flat([1, 2]), flat([3])], [[Line("a"), Line("b")], [Line("c")]])
    top, row = TEXT + GAP, SIDE + 2 * (TEXT + GAP) + GAP
    assert picture.shape[0] == 2 * row
    found = [picture[y + top + 5, GAP + x * (SIDE + GAP) + 5, 0] for y in (0, row) for x in (0, 1)]
    assert found == [1, 2, 3, 255]


def test_the_hardest_negative_is_the_most_alike_of_the_others():
    cosines = torch.tensor([[0.9, 0.1, 0.95], [0.2, 0.8, 0.3], [0.0, 0.4, 0.7]])
    picture, text = pairs(Match(flat([10, 20, 30]), flat([40, 50, 60]), cosines))
    row = SIDE + 2 * (TEXT + GAP) + GAP
    shown = [[picture[y * row + TEXT + GAP + 5, GAP + x * (SIDE + GAP) + 5, 0] for x in range(3)] for y in range(3)]
    assert shown == [[10, 20, 30], [40, 50, 60], [60, 60, 50]]
    assert "average 0.80;" in text and "images 0.33," in text and "most alike of them 0.55" in text
    assert has(picture[2 * row :], WRONG), "the first image's negative is nearer than its own"
    alone, text = pairs(Match(flat([10]), flat([40]), torch.tensor([[0.5]])))
    assert len(alone) == 2 * row and ";" not in text

"""What the halves of a picture show, by a case by hand."""

from __future__ import annotations

import torch

from hyperdb.metrics.halves import halves, shown


class Colour:
    """The mean colour as the feature of a person; a black picture has no face."""

    name, dim = "colour", 3

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.float().mean((2, 3))
        return mean / mean.norm(dim=1, keepdim=True)


RED, GREEN, BLUE, BLACK = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]]).byte()


def picture(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.cat([side[:, None, None].expand(3, 4, 2) for side in (left, right)], 2)


def test_halves_are_cut_in_the_middle():
    left, right = halves(picture(RED, GREEN)[None])
    assert torch.equal(left, RED.view(1, 3, 1, 1).expand(1, 3, 4, 2))
    assert torch.equal(right, GREEN.view(1, 3, 1, 1).expand(1, 3, 4, 2))


def test_each_half_is_told_among_all_people():
    """Red is meant on the left, green on the right; blue is somebody else."""
    images = [picture(RED, GREEN), picture(GREEN, GREEN), picture(BLUE, BLACK), picture(RED, RED)]
    found = shown(Colour(), torch.stack(images), torch.eye(3))
    assert found["left"] == {"rank1": 0.5, "swapped": 0.25, "detected": 1.0, "cosine": 0.5}
    assert found["right"] == {"rank1": 0.5, "swapped": 0.25, "detected": 0.75, "cosine": 0.5}


def test_a_person_without_features_is_never_the_nearest():
    gallery = torch.eye(3)
    gallery[0] = torch.nan
    found = shown(Colour(), picture(RED, GREEN)[None], gallery)
    assert found["left"]["rank1"] == 0
    assert found["left"]["cosine"] == 0
    assert found["right"]["rank1"] == 1

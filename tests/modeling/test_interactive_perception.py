"""The small functions of the Interactive Perception Network, by hand."""

import math

import pytest
import torch

from transformers_lmeye.modeling.interactive_perception import grid_places, pool_features, sinusoidal_positions


# --- places --------------------------------------------------------------------------------------------------------


def test_places_in_a_square():
    assert grid_places(9).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]


def test_places_of_a_sequence():
    """What forms no square is one row."""
    assert grid_places(5).tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4]]
    assert grid_places(1).tolist() == [[0, 0]]


def test_places_in_pictures_of_their_own_proportions():
    """Row by row in each picture's own width; what lies behind a picture's patches goes on below it."""
    shapes = torch.tensor([[2, 3], [3, 2], [1, 4]])
    assert grid_places(6, shapes).tolist() == [
        [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]],
        [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]],
        [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1]],
    ]
    assert grid_places(6, shapes[None]).shape == (1, 3, 6, 2)
    # Four patches in a row are no square where a shape says so.
    assert grid_places(4, torch.tensor([[1, 4]])).tolist() == [[[0, 0], [0, 1], [0, 2], [0, 3]]]


# --- position codes ------------------------------------------------------------------------------------------------


def test_position_codes():
    """Sines and cosines of the row, then of the column, at wavelengths from 2 pi to 200 pi patches."""
    codes = sinusoidal_positions(torch.tensor([[0, 0], [2, 5]]), 12)
    assert codes.shape == (2, 12) and codes.dtype == torch.float32
    assert codes[0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]
    expected = []
    for place in (2, 5):
        turns = [place, place / 10, place / 100]
        expected += [math.sin(turn) for turn in turns] + [math.cos(turn) for turn in turns]
    torch.testing.assert_close(codes[1], torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_position_codes_are_of_unit_scale_and_tell_patches_apart():
    codes = sinusoidal_positions(grid_places(256), 28)
    assert float(codes.abs().max()) <= 1
    distances = torch.cdist(codes, codes) + 9 * torch.eye(256)
    assert float(distances.min()) > 0.3


# --- averages ------------------------------------------------------------------------------------------------------


def test_averages_over_a_square():
    features = torch.arange(16.0).view(1, 16, 1)
    # 0 1 | 2 3        the means of the four quarters
    # 4 5 | 6 7
    # ----+----
    # 8 9 | 10 11
    assert pool_features(features, 4).tolist() == [[[2.5], [4.5], [10.5], [12.5]]]
    assert pool_features(features, 1).tolist() == [[[7.5]]]
    assert pool_features(features, 16).tolist() == features.tolist()


def test_averages_over_areas_that_do_not_divide_the_grid():
    """Three areas of four columns begin at 0, 1, 2 and end before 2, 3, 4: shared columns, none left out."""
    features = torch.arange(16.0).view(1, 16, 1)
    rows = [[0, 1], [1, 2], [2, 3]]
    expected = [sum(4 * r + c for r in top for c in left) / 4 for top in rows for left in rows]
    assert pool_features(features, 9).flatten().tolist() == expected


def test_averages_over_given_rows_and_columns():
    features = torch.arange(16.0).view(1, 16, 1)
    # 0 1 | 2 3        the means of the four quarters, of halves, and of four columns over two rows
    # 4 5 | 6 7
    # ----+----
    # 8 9 | 10 11
    assert pool_features(features, (2, 2)).tolist() == pool_features(features, 4).tolist()
    assert pool_features(features, (1, 2)).flatten().tolist() == [6.5, 8.5]
    assert pool_features(features, (2, 1)).flatten().tolist() == [3.5, 11.5]
    assert pool_features(features, (2, 4)).flatten().tolist() == [2, 3, 4, 5, 10, 11, 12, 13]
    assert pool_features(features[:, :6], (2, 3)).flatten().tolist() == [0, 1, 2, 3, 4, 5]  # one row stays one


def test_averages_over_a_sequence():
    features = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])[..., None]
    assert pool_features(features, 3).flatten().tolist() == [1.5, 3.5, 5.5]
    assert pool_features(features, 1).flatten().tolist() == [3.5]
    features = torch.arange(7.0).view(1, 7, 1)  # 0-2, 2-4, 4-6
    assert pool_features(features, 3).flatten().tolist() == [1.0, 3.0, 5.0]


def test_averages_keep_batch_and_width_apart():
    features = torch.randn(3, 16, 5)
    got = pool_features(features, 4)
    assert got.shape == (3, 4, 5)
    quarters = features.view(3, 2, 2, 2, 2, 5).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(got, quarters)


def test_averages_over_each_pictures_own_grid():
    """Padding has no part in them."""
    features = torch.full((3, 8, 1), 1e6)
    features[0] = torch.arange(8.0)[:, None]  # 2 x 4
    features[1, :6] = torch.arange(6.0)[:, None]  # 3 x 2
    features[2, :4] = torch.arange(4.0)[:, None]  # 1 x 4
    shapes = torch.tensor([[2, 4], [3, 2], [1, 4]])
    got = pool_features(features, 4, shapes)
    assert got.shape == (3, 4, 1)
    assert got[0].flatten().tolist() == [0.5, 2.5, 4.5, 6.5]
    # Rows 0-1 and 1-2 of three.
    assert got[1].flatten().tolist() == [1.0, 2.0, 3.0, 4.0]
    assert got[2].flatten().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert pool_features(features, 1, shapes).flatten().tolist() == [3.5, 2.5, 1.5]


def test_averages_pass_gradients_to_what_is_shown():
    features = torch.randn(2, 6, 3, requires_grad=True)
    pool_features(features, 1, torch.tensor([[2, 3], [2, 2]])).sum().backward()
    assert features.grad[0].flatten().tolist() == pytest.approx([1 / 6] * 18)
    assert features.grad[1, :4].flatten().tolist() == pytest.approx([1 / 4] * 12)
    assert features.grad[1, 4:].tolist() == [[0.0] * 3] * 2

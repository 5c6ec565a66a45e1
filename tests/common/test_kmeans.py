"""K-means: it finds groups that are there, never gets worse, repeats itself, and takes odd inputs."""

from __future__ import annotations

import pytest
import torch

from manyheads.common.kmeans import kmeans, nearest


def blobs(generator, groups=5, each=20, width=6, far=1000.0):
    """Vectors around far-apart centres, shuffled, and the group of each."""
    centres = far * torch.randn(groups, width, generator=generator, dtype=torch.float64)
    group = torch.arange(groups).repeat_interleave(each)[torch.randperm(groups * each, generator=generator)]
    return centres[group] + torch.randn(groups * each, width, generator=generator, dtype=torch.float64), group


def waste(x, found):
    """The sum of squared distances from the centres."""
    return (x - found.centroids[found.labels]).square().sum()


def test_far_groups_are_found(generator):
    x, group = blobs(generator)
    found = kmeans(x, 5, generator=generator)
    pairs = set(zip(found.labels.tolist(), group.tolist(), strict=True))
    assert len(pairs) == 5 and found.sizes.tolist() == [20] * 5
    torch.testing.assert_close(found.centroids[found.labels], found.means(x)[found.labels])


def test_a_step_never_makes_it_worse(generator):
    x = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    seeds = (torch.Generator().manual_seed(3) for _ in range(8))
    left = [float(waste(x, kmeans(x, 9, steps=steps, generator=g))) for steps, g in enumerate(seeds)]
    assert all(later <= earlier + 1e-9 for earlier, later in zip(left, left[1:], strict=False)) and left[-1] < left[0]


def test_labels_are_the_nearest_centres(generator):
    x = torch.randn(2, 3, 57, 5, generator=generator)
    found = kmeans(x, 7, steps=3, generator=generator)
    gaps = (x[..., None, :] - found.centroids[..., None, :, :]).square().sum(-1)
    torch.testing.assert_close(gaps.gather(-1, found.labels[..., None])[..., 0], gaps.amin(-1))
    assert torch.equal(found.labels, nearest(x, found.centroids)[0])
    torch.testing.assert_close(nearest(x, found.centroids)[1], gaps.amin(-1), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.sizes.sum(-1), torch.full((2, 3), 57))


def test_the_generator_decides(generator):
    x = torch.randn(60, 4, generator=generator)
    first, same, other = (kmeans(x, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first.centroids, same.centroids) and not torch.equal(first.centroids, other.centroids)


def test_leading_axes_are_clustered_by_themselves(generator):
    (one, first), (two, second) = blobs(generator), blobs(generator)
    found = kmeans(torch.stack((one, two)), 5, generator=generator)
    for x, labels, group in ((one, found.labels[0], first), (two, found.labels[1], second)):
        assert len(set(zip(labels.tolist(), group.tolist(), strict=True))) == 5, x


def test_directions_only(generator):
    x, _ = blobs(generator)
    length = torch.rand(x.shape[0], 1, generator=generator, dtype=torch.float64) * 10 + 0.1
    plain, longer = (kmeans(y, 5, normalise=True, generator=torch.Generator().manual_seed(1)) for y in (x, length * x))
    assert torch.equal(plain.labels, longer.labels)
    torch.testing.assert_close(plain.centroids, longer.centroids)
    assert plain.centroids.norm(dim=-1).max() <= 1 + 1e-9


def test_each_vector_may_be_its_own_group(generator):
    x = torch.randn(13, 3, generator=generator, dtype=torch.float64)
    found = kmeans(x, 13, generator=generator)
    assert found.sizes.tolist() == [1] * 13
    torch.testing.assert_close(found.centroids[found.labels], x)


def test_equal_vectors_make_empty_groups_and_no_nan(generator):
    found = kmeans(torch.ones(6, 2), 3, generator=generator)
    assert found.centroids.isfinite().all() and sorted(found.sizes.tolist()) == [0, 0, 6]
    assert not found.means(torch.ones(6, 1))[found.sizes == 0].any()


def test_parts_of_the_distances_change_nothing(generator, monkeypatch):
    x, centres = torch.randn(50, 4, generator=generator), torch.randn(7, 4, generator=generator)
    labels, gaps = nearest(x, centres)
    monkeypatch.setattr("manyheads.common.kmeans._AT_ONCE", 60)
    torch.testing.assert_close(nearest(x, centres)[1], gaps)
    assert torch.equal(nearest(x, centres)[0], labels)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(4, 2), {"clusters": 0}, ValueError, "clusters: expected from 1 to the N=4"),
        (torch.ones(4, 2), {"clusters": 5}, ValueError, "clusters: expected from 1 to the N=4"),
        (torch.ones(4, 2), {"clusters": 2, "steps": -1}, ValueError, "steps: expected at least 0"),
        (torch.ones(4), {"clusters": 2}, ValueError, "x: expected"),
        (torch.ones(4, 2, dtype=torch.int64), {"clusters": 2}, TypeError, "x: expected a floating tensor"),
    ],
)
def test_wrong_input_is_refused(x, options, error, message):
    with pytest.raises(error, match=message):
        kmeans(x, **options)

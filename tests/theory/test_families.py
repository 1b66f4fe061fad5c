import numpy as np
import pytest

from alignpro.errors import AlignProError
from alignpro.theory.families import FAMILIES, draw, random_prompters
from alignpro.theory.instance import KEYS


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2), (5, 2, 3), (2, 6, 4)])
def test_every_draw_is_a_valid_instance_and_repeats(family, shape):
    first, second, other = draw(family, 3, shape, 20), draw(family, 3, shape, 20), draw(family, 4, shape, 20)
    for a, b in zip(first, second, strict=True):
        assert a.shape == shape
        for key in KEYS:
            assert (getattr(a, key) == getattr(b, key)).all()
    if shape != (1, 1, 1):
        assert any(
            (a.reward != b.reward).any() or (a.p != b.p).any() for a, b in zip(first, other, strict=True)
        )


def test_each_family_stresses_what_it_says():
    shape = (3, 4, 5)
    many = {family: draw(family, 0, shape, 50) for family in FAMILIES}
    assert all((i.prior == 0).any() and (i.frozen == 0).any() for i in many["sparse"])
    assert any((i.p == 0).any() for i in many["sparse"])
    assert any((np.asarray(i.prior)[range(3), i.own] == 1).all() for i in many["shared_rewrites"])
    assert all((i.prior.max(-1) > 0.89).all() for i in many["near_deterministic"])
    assert any(i.reward.min() < 0 for i in many["signed"])
    scales = [np.ptp(i.reward) for i in many["scaled"]]
    assert max(scales) / min(scales) > 1e10
    assert min(i.prior.min() for i in many["peaked"]) < 1e-10
    assert any(set(np.unique(i.reward)) <= {0, 0.25, 0.5, 1} for i in many["adversarial"])

    # The low-rank rows lie on a segment; a family without that structure does not pass.
    def rank(family):
        return max(np.linalg.matrix_rank(np.asarray(i.frozen), tol=1e-9) for i in many[family])

    assert rank("low_rank") == 2 < rank("independent")
    for i in many["lm_like"]:
        assert (
            np.take_along_axis(np.asarray(i.prior), np.asarray(i.own)[:, None], -1)[:, 0] == i.prior.max(-1)
        ).all()
        assert ((i.reward >= 0) & (i.reward <= 1)).all()

    def correlation(family):
        return np.mean([np.corrcoef(np.log(np.asarray(i.frozen) + 1e-300))[0, 1] for i in many[family]])

    def ties(family):
        return np.mean([np.unique(i.reward).size < i.reward.size for i in many[family]])

    assert correlation("lm_like") > 0.5 > correlation("independent")
    assert ties("lm_like") > 0.9 > ties("independent")


def test_prompters_keep_the_support():
    rng = np.random.default_rng(0)
    prior = FAMILIES["sparse"](rng, 30, (2, 5, 3)).prior
    rho = random_prompters(rng, prior)
    assert ((rho > 0) == (prior > 0)).all()
    np.testing.assert_allclose(rho.sum(-1), 1, rtol=1e-15)


def test_unknown_family_and_shape():
    with pytest.raises(AlignProError, match=r"^family 'x' is unknown; give one of independent"):
        draw("x", 0, (1, 1, 1))
    with pytest.raises(AlignProError, match="give sizes X, K, Y of at least 1"):
        draw("sparse", 0, (1, 0, 1))

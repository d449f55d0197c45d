import pytest
from made_runs import falling, make_run, make_study

from rslightning.errors import UserError
from rslightning.experiments.claims import CLAIMS, check_claim, decide


@pytest.mark.parametrize("claim", list(CLAIMS))
def test_without_the_runs_nothing_is_shown(claim):
    study = make_study([make_run("quarter_root", 2, losses=falling(3.0))])
    verdict, numbers = decide(claim, study)
    assert verdict == "not shown"
    assert "it takes" in numbers


def test_a_claim_that_is_not_known_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"no claim 'rank_gain'; did you mean rank_gains\?"):
        check_claim("rank_gain")
    with pytest.raises(UserError, match="known are rank_gains, gradient_norms"):
        decide("xyz", make_study([make_run()]))

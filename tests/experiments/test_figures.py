import sys

import pytest
from made_runs import make_run, make_study

from rslightning.errors import UserError
from rslightning.experiments.figures import KINDS, check_kind, draw


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_has_its_painter(kind):
    pytest.importorskip("matplotlib")
    assert draw(make_study([make_run(losses=[4.0], state="unfinished")]), kind) is None


def test_a_kind_that_is_not_known_is_named_with_the_nearest():
    with pytest.raises(
        UserError, match=r"no kind of figure 'perplexty'; did you mean perplexity\?"
    ):
        check_kind("perplexty")
    with pytest.raises(UserError, match="known are perplexity, gradient_norms"):
        check_kind("xyz")


def test_without_matplotlib_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("rslightning.experiments.figures.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rslightning\[figures\]'"):
        draw(make_study([make_run()]), "perplexity")

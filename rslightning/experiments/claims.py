"""What the paper says (D. Kalajdzievski, arXiv:2312.03732), and who decides it."""

import difflib
from collections.abc import Callable
from typing import Final, NamedTuple

from rslightning.errors import UserError
from rslightning.experiments import verdicts
from rslightning.experiments.evidence import Evidence, Verdict
from rslightning.experiments.groups import Study


class Claim(NamedTuple):
    """A statement and the function that decides it.

    Attributes:
        statement: The paper's, in our words.
        source: Where it stands.
        criterion: When it counts as reproduced, and when as confounded.
        decide: The function.
    """

    statement: str
    source: str
    criterion: str
    decide: Callable[[Evidence], Verdict]


def decide(name: str, study: Study) -> Verdict:
    """Return what the runs of a study say about a claim.

    Raises:
        UserError: If there is no such claim.
    """
    check_claim(name)
    return CLAIMS[name].decide(Evidence(study))


def check_claim(name: str) -> None:
    """Raise `UserError` unless `name` is one of the claims."""
    if str(name) not in CLAIMS:
        close = difflib.get_close_matches(str(name), CLAIMS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(CLAIMS)}."
        raise UserError(f"There is no claim {name!r}; {hint}")


CLAIMS: Final[dict[str, Claim]] = {
    "rank_gains": Claim(
        "Under rsLoRA the final loss falls as the rank grows; under LoRA it does not.",
        "figures 2, 5, 7",
        f"rslora's loss falls from the lowest to the highest rank and rises at none between, and "
        f"lora gains nothing that counts or less than {verdicts.SHARE:.0%} of what rslora does",
        verdicts.rank_gains,
    ),
    "gradient_norms": Claim(
        "LoRA's gradient norms collapse with the rank as r^(-1/2); rsLoRA's keep their size, "
        "within an order of magnitude through training.",
        "figures 3, 4",
        f"both slopes at the first step are within {verdicts.SLOPE_TOLERANCE} of theory, rslora's "
        f"norms stay within a factor of {verdicts.ORDER_OF_MAGNITUDE:g} at every later step, and "
        f"the median spread of lora's is within a factor of {verdicts.ABOUT:g} of sqrt(highest / "
        "lowest rank)",
        verdicts.gradient_norms,
    ),
    "other_scalings": Claim(
        "alpha/r^(1/4) is too large and unstable at high rank; alpha/r^2 is too small to learn.",
        "figure 8",
        "at some rate more than half of quarter_root's runs at its highest rank are unstable and "
        "rslora's are not, and inverse_square does not learn at its highest rank, by what rslora "
        "does",
        verdicts.other_scalings,
    ),
    "initialization": Claim(
        "Scaling A at initialization does not replace the factor: with alpha alone training is "
        "unstable at high rank, with alpha/r the rank still brings nothing.",
        "figure 6, appendix B.3",
        "at some rate more than half of unit's runs at its highest rank are unstable and rslora's "
        "are not, and lora gains nothing from rank",
        verdicts.initialization,
    ),
    "moments": Claim(
        "The moments of the adapted layers' outputs stay in size over the ranks and through "
        "training.",
        "figure 9",
        f"under rslora their second moment differs by less than a factor of {verdicts.ABOUT:g} "
        "among the ranks at every step, and over the steps at every rank",
        verdicts.moments,
    ),
    "learning_rate": Claim(
        "No learning rate brings LoRA at the lowest rank to where rsLoRA is at the highest rank "
        "with its default rate.",
        "appendix B.4",
        f"the best rate leaves a difference that counts and closes less than {verdicts.SHARE:.0%} "
        "of the gap; confounded if it closes more",
        verdicts.learning_rate,
    ),
    "tuned": Claim(
        "rsLoRA's lead over LoRA at high rank is left when each method and rank has its best "
        "learning rate.",
        "ours; the paper does not ask",
        f"{verdicts.HALF:.0%} or more of the untuned lead is left and counts; confounded if less. "
        "The untuned rate is the sweep's, else the best of rslora at its highest rank, for all",
        verdicts.tuned,
    ),
    "adalora": Claim(
        "rsLoRA's scaling helps AdaLoRA, the more the larger the budget of ranks.",
        "conjecture of the paper",
        "its lead counts at the largest budget and is larger there than at the smallest",
        verdicts.adalora,
    ),
}

import itertools

import pytest

from rslightning.errors import UserError
from rslightning.rslora.spec import (
    AdapterSpec,
    ResolvedAdapter,
    pattern_matches,
    unmatched_patterns,
)

PATHS = [f"model.layers.{n}.{name}" for n in (0, 1, 11) for name in ("attn.q_proj", "mlp.up_proj")]


def test_without_patterns_every_module_has_the_same_numbers():
    spec = AdapterSpec(rank=6, alpha=3.0, scaling="lora")
    assert {spec.resolve(path) for path in PATHS} == {ResolvedAdapter(6, 3.0, "lora")}
    assert spec.resolve(PATHS[0]).gamma == 0.5


def test_rank_and_alpha_patterns_are_resolved_apart():
    spec = AdapterSpec(
        rank=4, alpha=16.0, rank_pattern={"q_proj": 9}, alpha_pattern={"layers.1.mlp.up_proj": 2.0}
    )
    assert [(spec.resolve(path).rank, spec.resolve(path).alpha) for path in PATHS] == [
        (9, 16.0),
        (4, 16.0),
        (9, 16.0),
        (4, 2.0),
        (9, 16.0),
        (4, 16.0),
    ]
    assert spec.resolve(PATHS[0]).gamma == 16.0 / 3.0


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("q_proj", [0, 2, 4]),  # the last segment
        ("attn.q_proj", [0, 2, 4]),  # the last segments
        ("model.layers.0.attn.q_proj", [0]),  # a full path
        (r"^model\.layers\.0\.attn\.q_proj", [0]),
        (r"layers\.1\..*", [2, 3]),  # an expression; layer 11 is another one
        (".*", [0, 1, 2, 3, 4, 5]),
        ("q_proj|up_proj", [0, 1, 2, 3, 4, 5]),
        ("proj", []),  # no part of a segment
        ("attn", []),  # no container
        ("^q_proj", []),
    ],
)
def test_what_a_pattern_matches(pattern, matches):
    assert [PATHS.index(path) for path in PATHS if pattern_matches(pattern, path)] == matches


def test_patterns_match_as_peft_matches_them():
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    patterns = ["q_proj", "proj", "^q_proj", r".*\.0\..*", "layers.1.mlp.up_proj", "a|up_proj", ""]
    for pattern, path in itertools.product(patterns, PATHS):
        assert pattern_matches(pattern, path) == (get_pattern_key([pattern], path) == pattern)


def test_the_order_of_patterns_does_not_matter():
    patterns = {"q_proj": 5, r"layers\.1\.mlp.*": 7, r".*\.11\.attn\.q_proj": 5}
    expected = [5, 4, 5, 7, 5, 4]
    for order in itertools.permutations(patterns.items()):
        spec = AdapterSpec(rank=4, rank_pattern=dict(order))
        assert [spec.resolve(path).rank for path in PATHS] == expected


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_disagree_are_an_error_in_either_order(field):
    for keys in (["q_proj", ".*layers.0.*"], [".*layers.0.*", "q_proj"]):
        spec = AdapterSpec(**{field: dict(zip(keys, [3, 5], strict=True))})
        with pytest.raises(UserError) as error:
            spec.resolve(PATHS[0])
        assert str(error.value) == (
            f"{field} is ambiguous for model.layers.0.attn.q_proj: {keys[0]!r}: 3, {keys[1]!r}: 5; "
            "make the patterns disjoint."
        )
        default = AdapterSpec().resolve(PATHS[3])
        assert spec.resolve(PATHS[3]) == default


def test_unmatched_patterns_of_both_tables():
    spec = AdapterSpec(
        rank_pattern={"q_proj": 3, "c_attn": 3}, alpha_pattern={"k_proj": 1.0, "up_proj": 2.0}
    )
    assert unmatched_patterns(spec, PATHS) == ["c_attn", "k_proj"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be a positive integer, got 0."),
        ({"rank": True}, "rank must be a positive integer, got True."),
        ({"rank": 8.0}, "rank must be a positive integer, got 8.0."),
        ({"alpha": -1.0}, "alpha must be positive and finite, got -1.0."),
        ({"alpha": "16"}, "alpha must be a number, got '16'."),
        ({"alpha": float("nan")}, "alpha must be positive and finite, got nan."),
        (
            {"scaling": "sqrt"},
            "scaling must be one of lora, rslora, quarter_root, inverse_square, unit; got 'sqrt'.",
        ),
        (
            {"init": "xavier"},
            "init must be one of kaiming_uniform, gaussian, rank_corrected; got 'xavier'.",
        ),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0."),
        ({"dropout": -0.1}, "dropout must be in [0, 1), got -0.1."),
        ({"dropout": "0.1"}, "dropout must be in [0, 1), got '0.1'."),
        ({"targets": ""}, "targets is empty; use all_linear, attention, mlp or module names."),
        ({"targets": []}, "targets is empty; use all_linear, attention, mlp or module names."),
        (
            {"targets": "layers.(0"},
            "'layers.(0' is not a regular expression: "
            "missing ), unterminated subpattern at position 7.",
        ),
        (
            {"rank_pattern": {"*.q_proj": 4}},
            "'*.q_proj' is not a regular expression: nothing to repeat at position 0.",
        ),
        (
            {"alpha_pattern": {"a)|(b": 4.0}},
            "'a)|(b' is not a regular expression: unbalanced parenthesis at position 1.",
        ),
        (
            {"rank_pattern": {"(?i)q_proj": 4}},
            "'(?i)q_proj' is not a regular expression for the end of a path: "
            "global flags not at the start of the expression.",
        ),
        (
            {"rank_pattern": {"q_proj": 0}},
            "rank_pattern['q_proj'] must be a positive integer, got 0.",
        ),
        (
            {"alpha_pattern": {"q_proj": -4}},
            "alpha_pattern['q_proj'] must be positive and finite, got -4.",
        ),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(UserError) as error:
        AdapterSpec(**fields)
    assert str(error.value) == message


def test_flags_of_a_group_and_of_a_whole_path():
    assert AdapterSpec(rank_pattern={"(?i:Q_PROJ)": 4}).resolve("layers.0.q_proj").rank == 4
    assert AdapterSpec(targets="(?i).*Q_PROJ").targets == "(?i).*Q_PROJ"


def test_names_in_a_list_are_no_expressions():
    assert AdapterSpec(targets=["layers.(0"]).targets == ["layers.(0"]


def test_a_spec_is_frozen():
    with pytest.raises(AttributeError):
        AdapterSpec().rank = 4

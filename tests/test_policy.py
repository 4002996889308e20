"""The rule on scores, and its comparison with the tracker of perforatedai at each evaluation."""

import contextlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import sys
from fractions import Fraction

import pytest

from perforated_trainer import policy
from perforated_trainer.policy import Decision, Outcome, Policy

CONTINUE, ADD, RETRY, COMPLETE = Decision
NAN, INF = float("nan"), float("inf")
UP = [0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.7]  # grows two dendrites
SETTINGS = {
    "greater_is_better": True,
    "n_epochs_to_switch": 2,
    "max_dendrites": 2,
    "max_dendrite_tries": 1,
    "history_lookback": 1,
    "improvement_threshold": [1e-4],
    "improvement_threshold_raw": 1e-5,
    "fixed": False,
}


def make(**settings):
    return Policy(**SETTINGS | settings)


def run(scores, ends=None, **settings):
    """The outcomes of a run, until training is complete, and its policy."""
    rule, outcomes = make(**settings), []
    for score, end in zip(scores, ends or [False] * len(scores), strict=True):
        outcomes.append(rule.add_score(score, end_of_cycle=end))
        if outcomes[-1].decision is COMPLETE:
            break
    return outcomes, rule


def decisions(scores, ends=None, **settings):
    """Decisions other than CONTINUE, by the index of their evaluation."""
    outcomes, _ = run(scores, ends, **settings)
    return {i: outcome.decision for i, outcome in enumerate(outcomes) if outcome.decision is not CONTINUE}


def kept(scores, ends=None, **settings):
    """Index of the evaluation whose model is kept at the end."""
    outcomes, _ = run(scores, ends, **settings)
    return max((i for i, outcome in enumerate(outcomes) if outcome.is_best), default=None)


def random_settings(rng, **settings):
    chosen = {
        "greater_is_better": rng.random() < 0.5,
        "n_epochs_to_switch": rng.randint(0, 4),
        "max_dendrites": rng.randint(0, 4),
        "max_dendrite_tries": rng.randint(1, 3),
        "history_lookback": rng.randint(1, 4),
        "improvement_threshold": rng.choice([[0.0], [1e-4], [0.1], [0.1, 0.0], [0.0, 0.3, 0.01]]),
        "improvement_threshold_raw": rng.choice([0.0, 1e-5, 0.05]),
        "fixed": rng.random() < 0.3,
        "doing_pai": rng.random() < 0.9,
        "capacity_test": rng.random() < 0.05,
    }
    return chosen | settings


def random_scores(rng, length=40):
    kind = rng.randrange(4)
    if kind == 0:  # many equal ones, 0 among them
        scores = [rng.randint(-3, 3) / 4 for _ in range(length)]
    elif kind == 1:
        scores = [rng.gauss(0, 1) for _ in range(length)]
    elif kind == 2:  # a learning curve
        scores = [1 - math.exp(-i / 9) + rng.gauss(0, 0.03) for i in range(length)]
    else:
        scores = [rng.choice([1e-300, 1e308, -1e308, 0.0, -0.0, 5e-324, 1.0]) for _ in range(length)]
    return [rng.choice([NAN, INF, -INF]) if rng.random() < 0.05 else score for score in scores]


def random_runs(number, **settings):
    for seed in range(number):
        rng = random.Random(seed)
        chosen, scores = random_settings(rng, **settings), random_scores(rng)
        yield scores, [rng.random() < 0.3 for _ in scores], chosen


def test_module_imports_only_the_standard_library():
    imported = set(re.findall(r"^\s*(?:from|import) (\S+)", inspect.getsource(policy), re.MULTILINE))
    assert imported <= sys.stdlib_module_names, imported - sys.stdlib_module_names


# ----------------------------------------------------------------------------------------------- when a cycle ends


def test_plateau_is_patience_evaluations_without_improvement():
    assert decisions(UP) == {4: ADD, 9: ADD, 14: COMPLETE}


@pytest.mark.parametrize(("patience", "when"), [(0, 0), (1, 3), (2, 4), (3, 5)])
def test_dendrite_is_added_after_n_epochs_to_switch(patience, when):
    scores = [0.1, 0.2, 0.3] + [0.3] * 9
    assert min(decisions(scores, n_epochs_to_switch=patience)) == when


def test_improving_scores_never_end_a_cycle():
    assert decisions([i / 10 for i in range(50)]) == {}
    assert decisions([2 - i / 10 for i in range(50)], greater_is_better=False, history_lookback=3) == {}


def test_patience_restarts_in_each_cycle():
    scores = [0.5, 0.5, 0.5, 0.1, 0.2, 0.3, 0.3, 0.3]  # the second cycle improves, although below the kept score
    assert decisions(scores) == {2: ADD, 7: COMPLETE}


def test_improvement_is_measured_from_the_last_better_score():
    slow = [1.0, 1.05, 1.11, 1.16, 1.23, 1.28, 1.36]  # above 10% together, below it one by one
    assert decisions(slow, improvement_threshold=[0.1]) == {}
    assert decisions(slow, improvement_threshold=[0.2], n_epochs_to_switch=3) == {3: ADD}


def test_both_thresholds_must_be_exceeded():
    scores = [10.0, 10.5, 11.0]
    assert decisions(scores, improvement_threshold=[0.04], improvement_threshold_raw=0.4) == {}
    assert decisions(scores, improvement_threshold=[0.06], improvement_threshold_raw=0.0, n_epochs_to_switch=1) == {
        1: ADD
    }
    assert decisions(scores, improvement_threshold=[0.0], improvement_threshold_raw=0.5, n_epochs_to_switch=1) == {
        1: ADD
    }


def test_equal_scores_are_no_improvement_without_thresholds():
    assert decisions([0.5] * 9, improvement_threshold=[0.0], improvement_threshold_raw=0.0) == {2: ADD, 5: COMPLETE}


def test_without_dendrites_plateau_completes_training():
    assert decisions(UP, doing_pai=False) == decisions(UP, max_dendrites=0) == {4: COMPLETE}


def test_complete_policy_stays_complete():
    _, rule = run(UP)
    assert rule.complete and rule.add_score(99.0) == Outcome(COMPLETE, False)


# ---------------------------------------------------------------------------------------- whether a dendrite helped


def test_retry_until_max_dendrite_tries():
    assert decisions([0.5] * 20, max_dendrite_tries=1) == {2: ADD, 5: COMPLETE}
    assert decisions([0.5] * 20, max_dendrite_tries=3) == {2: ADD, 5: RETRY, 8: RETRY, 11: COMPLETE}


def test_each_dendrite_gets_all_its_tries():
    scores = [0.1, 0.2, 0.3, 0.3, 0.3, 0.2, 0.2, 0.2, 0.4, 0.5, 0.5, 0.5, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]
    when = {4: ADD, 7: RETRY, 11: ADD, 14: RETRY, 17: COMPLETE}  # the second try of the first dendrite helps
    assert decisions(scores, max_dendrites=5, max_dendrite_tries=2) == when


def test_dendrite_helped_if_better_than_the_kept_model_by_the_thresholds():
    scores = [1.0, 1.0, 1.0, 1.05, 1.05, 1.05]
    assert decisions(scores, improvement_threshold=[0.04]) == {2: ADD, 5: ADD}
    assert decisions(scores, improvement_threshold=[0.06]) == {2: ADD, 5: COMPLETE}


def test_list_of_thresholds_is_by_number_of_dendrites():
    scores = [1.0, 1.0, 1.0, 1.05, 1.05, 1.05, 1.1, 1.1, 1.1, 1.15, 1.15, 1.15]
    ends = {
        (9.0,): {2: ADD, 5: COMPLETE},
        (9.0, 0.0): {2: ADD, 5: ADD, 8: ADD, 11: ADD},
        (0.0, 0.0, 9.0): {2: ADD, 5: ADD, 8: COMPLETE},
        (0.0, 0.0, 0.0, 9.0, 0.0): {2: ADD, 5: ADD, 8: ADD, 11: COMPLETE},
    }
    for thresholds, when in ends.items():
        assert decisions(scores, max_dendrites=9, improvement_threshold=list(thresholds)) == when


def test_dendrite_that_does_not_fit_completes_training():
    rule = make()
    assert [rule.add_score(score, may_add=False).decision for score in [1.0, 0.0, 0.0]] == [
        CONTINUE,
        CONTINUE,
        COMPLETE,
    ]
    assert (rule.num_dendrites, rule.best_score) == (0, 1.0)


def test_retry_does_not_need_room_for_one_more():
    rule = make(max_dendrite_tries=2)
    seen = [rule.add_score(0.5, may_add=i < 3).decision for i in range(9)]
    assert seen[2::3] == [ADD, RETRY, COMPLETE]


def test_number_of_dendrites_follows_the_decisions():
    rule, seen = make(max_dendrite_tries=2), []
    for score in [0.5] * 3 + [0.6] * 3 + [0.1] * 6:
        rule.add_score(score)
        seen.append((rule.num_dendrites, rule.kept_dendrites, rule.num_tries))
    at = [(0, 0, 0)] * 2 + [(1, 0, 1)] + [(1, 1, 1)] * 2 + [(2, 1, 1)] * 3 + [(2, 1, 2)] * 3 + [(1, 1, 2)]
    assert seen == at and rule.best_score == 0.6


# ------------------------------------------------------------------------------------------ the model that is kept


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.9, 0.8, 0.7, 0.6], 0),
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.5], 0),  # with a dendrite
        ([0.1, 0.5, 0.4, 0.4, 0.3, 0.3, 0.3], 1),
        ([0.1, 0.5, 0.4, 0.4, 0.3, 0.8, 0.7, 0.7, 0.1, 0.1, 0.1], 5),  # of the second of three cycles
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5], 0),  # the earlier of equals, with fewer dendrites
        ([0.0, -1.0, -1.0, -2.0, -2.0, -2.0], 0),
        ([-3.0, -1.0, -2.0, -2.0, -0.5, -0.6, -0.6], 4),
        ([0.1, 0.2, 0.3], 2),
        ([NAN, INF, -INF, 0.3, 0.2], 3),
        ([NAN, NAN], None),
    ],
)
def test_kept_model_is_the_best_evaluation(scores, best):
    for greater in True, False:
        scores = [score if greater else -score for score in scores]
        assert kept(scores, greater_is_better=greater) == best


def test_improvement_below_the_thresholds_is_kept_at_the_same_number_of_dendrites():
    assert kept([1.0, 1.001, 1.002, 1.003], improvement_threshold=[0.1], doing_pai=False) == 2  # complete there


def test_improvement_below_the_thresholds_is_not_kept_with_more_dendrites():
    settings = {"improvement_threshold": [0.1], "max_dendrites": 1}
    assert kept([1.0, 1.0, 1.0, 1.05, 1.05, 1.05], **settings) == 0
    assert kept([1.0, 1.0, 1.0, 1.15, 1.151, 1.152], **settings) == 5  # once it helped, any higher score is


def test_smoothed_scores_decide_on_their_mean():
    outcomes, rule = run([1.0, 3.0, 2.0, 2.5], history_lookback=2)  # means 1, 2, 2.5, 2.25
    assert [outcome.is_best for outcome in outcomes] == [True, True, True, False] and rule.best_score == 2.5
    assert rule.evaluations_since_improvement == 1


def test_smoothed_scores_do_not_reach_into_the_next_cycle():
    outcomes, rule = run([4.0, 4.0, 4.0, 5.0, 1.0], history_lookback=3)
    assert outcomes[2].decision is ADD and outcomes[3].is_best and rule.best_score == 5.0


@pytest.mark.parametrize("score", [0.1, 0.7, 1 / 3, 1e308])
def test_mean_of_equal_scores_is_that_score(score):
    assert kept([score] * 20, history_lookback=7, n_epochs_to_switch=30, improvement_threshold_raw=0.0) == 0


def brute_force(evaluations, beats, higher):
    """Index of the kept model among `(number of dendrites, mean)`, directly from the definition of the rule."""
    chosen = None
    for number in sorted({number for number, _ in evaluations}):
        mean = max if higher else min
        best = mean(value for n, value in evaluations if n == number)
        first = evaluations.index((number, best))
        if chosen is None or beats(best, evaluations[chosen][1], number):
            chosen = first
    return chosen


def test_kept_model_is_what_the_rule_says():
    grown = set()
    for scores, ends, settings in random_runs(3000, capacity_test=False):
        thresholds, raw = settings["improvement_threshold"], settings["improvement_threshold_raw"]

        def beats(value, reference, number, thresholds=thresholds, raw=raw, settings=settings):
            gain = value - reference if settings["greater_is_better"] else reference - value
            return gain > raw and gain > thresholds[min(number, len(thresholds) - 1)] * abs(reference)

        rule, evaluations, indices, cycle, last_best = make(**settings), [], [], [], None
        for i, (score, end) in enumerate(zip(scores, ends, strict=True)):
            number = rule.num_dendrites
            outcome = rule.add_score(score, end_of_cycle=end)
            if math.isfinite(score):
                cycle.append(Fraction(score))
                window = cycle[-settings["history_lookback"] :]
                evaluations.append((number, float(sum(window) / len(window))))
                indices.append(i)
            if outcome.is_best:
                last_best = i
            chosen = brute_force(evaluations, beats, settings["greater_is_better"]) if evaluations else None
            assert last_best == (None if chosen is None else indices[chosen]), (i, settings, scores)
            if chosen is not None:
                assert (rule.kept_dendrites, rule.best_score) == evaluations[chosen], (i, settings, scores)
            if outcome.decision is not CONTINUE:
                cycle = []
            if outcome.decision is COMPLETE:
                break
        grown.add(rule.num_dendrites)
    assert grown == {0, 1, 2, 3, 4}


def test_decisions_keep_to_the_limits():
    for scores, ends, settings in random_runs(3000):
        outcomes, rule = run(scores, ends, **settings)
        made = [outcome.decision for outcome in outcomes if outcome.decision is not CONTINUE]
        limit = (3 if settings["capacity_test"] else settings["max_dendrites"]) * settings["doing_pai"]
        assert made.count(ADD) <= limit and made.count(COMPLETE) == rule.complete
        for decision, group in itertools.groupby(made):
            assert decision is not RETRY or len(list(group)) < settings["max_dendrite_tries"]
        if rule.complete:
            assert rule.num_dendrites == rule.kept_dendrites


def test_score_and_its_negative_decide_alike():
    for scores, ends, settings in random_runs(3000):
        mirrored = settings | {"greater_is_better": not settings["greater_is_better"]}
        negatives = [-score for score in scores]
        assert run(scores, ends, **settings)[0] == run(negatives, ends, **mirrored)[0], (scores, settings)


# ------------------------------------------------------------------------------------- fixed cycles, special scores


def test_fixed_cycles_end_at_end_of_cycle_only():
    scores = [0.1] * 10 + [0.2] * 10
    ends = [i in (9, 14, 19) for i in range(20)]
    assert decisions(scores, fixed=True) == {}
    assert decisions(scores, ends, fixed=True) == {9: ADD, 14: ADD, 19: COMPLETE}


def test_cycles_of_one_evaluation_compare_it_with_the_kept_model():
    settings = {"fixed": True, "max_dendrites": 9, "max_dendrite_tries": 2, "history_lookback": 3}
    outcomes, rule = run([0.5, 0.6, 0.4, 0.7, 0.7, 0.7], [True] * 6, **settings)
    assert [outcome.decision for outcome in outcomes] == [ADD, ADD, RETRY, ADD, RETRY, COMPLETE]
    assert [outcome.is_best for outcome in outcomes] == [True, True, False, True, False, False]
    assert (rule.num_dendrites, rule.best_score) == (2, 0.7)


def test_end_of_cycle_is_ignored_without_fixed_cycles():
    assert decisions([0.1, 0.2, 0.3], [True] * 3) == {}


@pytest.mark.parametrize("score", [NAN, INF, -INF])
def test_score_that_is_not_finite_changes_nothing(score):
    rule = make()
    for good in UP[:4]:
        rule.add_score(good)
    before = rule.state_dict()
    assert rule.add_score(score) == Outcome(CONTINUE, False) and rule.state_dict() == before
    assert make(n_epochs_to_switch=0).add_score(score) == Outcome(CONTINUE, False)


def test_fixed_cycle_that_ends_with_nan_is_decided_by_its_earlier_scores():
    scores = [0.5, NAN, 0.6, NAN, NAN, NAN]
    ends = [False, True, False, True, True, True]
    assert decisions(scores, ends, fixed=True, max_dendrite_tries=2) == {1: ADD, 3: ADD, 4: RETRY, 5: COMPLETE}


def test_fixed_first_cycle_without_a_finite_score_completes_training():
    outcomes, rule = run([NAN, NAN], [False, True], fixed=True)
    assert outcomes[-1] == Outcome(COMPLETE, False) and rule.best_score is None


@pytest.mark.parametrize("fixed", [False, True])
def test_capacity_test_adds_three_dendrites_and_keeps_them(fixed):
    outcomes, rule = run([0.5, 0.4, 0.3, 0.2], max_dendrites=1, n_epochs_to_switch=9, capacity_test=True, fixed=fixed)
    assert outcomes == [Outcome(ADD, True)] * 3 + [Outcome(COMPLETE, True)] and rule.num_dendrites == 3


# ------------------------------------------------------------------------------------------------------------ state


def test_state_after_every_prefix_continues_alike():
    for scores, ends, settings in random_runs(200):
        outcomes, rule = run(scores, ends, **settings)
        for i in range(len(outcomes)):
            first, second = make(**settings), make(**settings)
            for score, end in zip(scores[:i], ends, strict=False):
                first.add_score(score, end)
            second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
            rest = [second.add_score(score, end) for score, end in zip(scores[i:], ends[i:], strict=True)]
            assert rest[: len(outcomes) - i] == outcomes[i:], (i, settings, scores)
            assert rule.complete <= second.complete


def states():
    rule = make(history_lookback=3, max_dendrite_tries=2)
    for score in [0.5, 0.5, 0.5, 0.5, 0.4]:
        rule.add_score(score)
    good = rule.state_dict()
    assert (good["num_dendrites"], good["kept_dendrites"], len(good["window"])) == (1, 0, 2)
    wrong = {
        "num_dendrites": [-1, 2, 1.0, True, "1", None],
        "kept_dendrites": [-1, 2, 0.0, None],
        "num_tries": [-1, 0, 1.0, [1]],
        "evaluations_since_improvement": [-1, 0.5, None],
        "complete": [True, 0, "no", None],  # complete with a dendrite being tried
        "best_score": [None, NAN, INF, "0.5", 1, True],
        "reference": [None, NAN, "x"],
        "window": [[], [NAN], ["0.5"], [None], [[0.5]], "ab", None, {"0": 0.5}],
    }
    yield from ({**good, name: value} for name, values in wrong.items() for value in values)
    yield {**good, "reference": None, "window": []}  # evaluations since an improvement, without an evaluation
    yield from ({key: good[key] for key in good if key != name} for name in good)
    yield from ({**good, "more": 1}, {}, None, [], "state", list(good.items()))


@pytest.mark.parametrize("state", list(states()), ids=str)
def test_invalid_state_raises_and_changes_nothing(state):
    rule = make()
    rule.add_score(0.3)
    before = rule.state_dict()
    with pytest.raises(ValueError, match="state of the policy") as error:
        rule.load_state_dict(state)
    assert "\n" not in str(error.value) and rule.state_dict() == before


def test_loaded_state_is_not_shared():
    first, second = make(history_lookback=3), make(history_lookback=3)
    first.add_score(0.5)
    state = first.state_dict()
    second.load_state_dict(state)
    second.add_score(0.6)
    assert first.state_dict() == state and state["window"] == [0.5]


# ------------------------------------------------------------------------------------- the tracker of perforatedai


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    """A function that starts a run of perforatedai's tracker: `(score, force_switch) -> Outcome`."""
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "perforatedbp", None)  # asks for an e-mail address when it is imported
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.importorskip("perforatedai")
        from perforatedai import globals_perforatedai as GPA
        from perforatedai import utils_perforatedai as UPA
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GPA, "pc", GPA.pc)
    monkeypatch.setattr(GPA, "pai_tracker", GPA.pai_tracker)

    def start(rule, initial_history_after_switches):
        GPA.pc = config = type(GPA.pc)()
        for name in "configuration_confirmed unwrapped_modules_confirmed weight_decay_accepted silent".split():
            getattr(config, f"set_{name}")(True)
        values = {name: rule[name] for name in rule.keys() - {"greater_is_better", "fixed", "doing_pai"}} | {
            "testing_dendrite_capacity": False,
            "device": torch.device("cpu"),
            "use_cuda": False,
            "verbose": False,
            "find_best_lr": False,
            "test_saves": False,
            "pai_saves": False,
            "retain_all_dendrites": False,
            "output_dimensions": [-1, 0],
            "module_ids_to_perforate": [".layer"],
            "module_names_to_perforate": [],
            "initial_history_after_switches": initial_history_after_switches,
            "switch_mode": config.DOING_NO_SWITCH if rule["fixed"] else config.DOING_HISTORY,
        }
        for name, value in values.items():
            getattr(config, f"set_{name}")(value)
        mirror = torch.nn.Module()
        mirror.layer = torch.nn.Linear(2, 2)
        with contextlib.redirect_stdout(io.StringIO()):
            UPA.perforate_model(
                mirror, save_name="run", making_graphs=False, maximizing_score=rule["greater_is_better"], doing_pai=True
            )

        def add_score(score, force_switch=False):
            for module in UPA.get_pai_modules(mirror, 0):  # perforatedai sets these from a gradient
                module.dendrite_module.dendrite_values[0].setup_arrays([1, 2])
            GPA.pai_tracker.set_optimizer_instance(torch.optim.SGD(mirror.parameters(), lr=0.1))
            before = GPA.pai_tracker.member_vars["num_dendrites_added"]
            best = tmp_path / "run" / "best_model.pt"
            if best.exists():
                os.utime(best, (0, 0))
            with contextlib.redirect_stdout(io.StringIO()):
                _, restructured, complete = GPA.pai_tracker.add_validation_score(score, mirror, force_switch)
            added = GPA.pai_tracker.member_vars["num_dendrites_added"] > before
            decision = COMPLETE if complete else (ADD if added else RETRY) if restructured else CONTINUE
            return Outcome(decision, best.stat().st_mtime > 0)

        return add_score

    return start


def compare(start, scores, ends, settings, initial_history_after_switches=-1):
    """Compare outcomes until one run is complete, or a retry helped. Returns the decisions."""
    rule, tracker, made = make(**settings), start(SETTINGS | settings, initial_history_after_switches), []
    for i, (score, end) in enumerate(zip(scores, ends, strict=True)):
        outcome = rule.add_score(score, end)
        assert tracker(score, end) == outcome, (i, made, scores, ends, settings)
        made.append(outcome.decision)
        helped = outcome.decision is ADD and RETRY in made  # from here on, the tracker allows one try fewer
        if outcome.decision is COMPLETE or helped:
            break
    return made


def test_decisions_are_those_of_perforatedai(tracker):
    """On positive scores that differ by more than the thresholds or not at all, without averages."""
    seen, rng = [], random.Random(0)
    for _ in range(60):
        settings = {
            "greater_is_better": rng.random() < 0.5,
            "n_epochs_to_switch": rng.randint(0, 3),
            "max_dendrites": rng.randint(0, 4),
            "max_dendrite_tries": rng.randint(1, 3),
            # With a threshold of 100, neither the tracker nor the rule accepts a score.
            "improvement_threshold": rng.choice([[1e-4], [1e-3, 1e-4, 0.0], [0.0, 0.0, 100.0], [0.0, 100.0, 0.0]]),
            "fixed": rng.random() < 0.3,
        }
        top = rng.choice([5, 20])
        scores = [(min(top, i // 3) + rng.randint(1, 4)) / 8 for i in range(30)]
        scores = scores if settings["greater_is_better"] else [4 - score for score in scores]
        ends = [settings["fixed"] and rng.random() < 0.4 for _ in scores]
        seen += [compare(tracker, scores, ends, settings)]
    counts = {decision: sum(made.count(decision) for made in seen) for decision in Decision}
    assert min(counts.values()) >= 15, counts  # each kind was compared


def test_decisions_are_those_of_perforatedai_that_waits_for_the_second_score(tracker):
    """With `initial_history_after_switches` 0, its default, if the first score of the run is not the best."""
    assert compare(tracker, UP, [False] * len(UP), {}, 0).count(ADD) == 2
    falling = [1 - score for score in UP]
    assert compare(tracker, falling, [False] * len(UP), {"greater_is_better": False}, 0).count(ADD) == 2


RETRIED = [0.1, 0.2, 0.3, 0.3, 0.3, 0.2, 0.2, 0.2, 0.4, 0.5, 0.5, 0.5] + [0.2] * 7


@pytest.mark.parametrize(
    ("scores", "settings", "of_perforatedai", "of_policy"),
    [
        ([0.9, 0.5, 0.5, 0.5], {}, {3: ADD}, {2: ADD}),
        ([-2.0, -1.0, 0.0, -1.0, -2.0, -3.0], {}, {5: ADD}, {4: ADD}),
        ([2 - i / 10 for i in range(6)], {"history_lookback": 3, "greater_is_better": False}, {3: ADD}, {}),
        ([-1.0, -0.99, -0.98, -0.97], {"improvement_threshold": [0.1]}, {}, {2: ADD}),
        (
            RETRIED,
            {"max_dendrites": 5, "max_dendrite_tries": 2},
            {4: ADD, 7: RETRY, 11: ADD, 14: COMPLETE},
            {4: ADD, 7: RETRY, 11: ADD, 14: RETRY, 17: COMPLETE},
        ),
        ([0.5, NAN, 0.6, 0.7], {}, {3: ADD}, {}),
    ],
    ids=["first", "zero", "average", "negative", "tries", "nan"],
)
def test_differences_from_perforatedai_are_those_that_are_listed(tracker, scores, settings, of_perforatedai, of_policy):
    """If one of these fails, perforatedai has changed: update the list in the docstring of `policy`."""
    add_score, made = tracker(SETTINGS | settings, 0), {}
    for i, score in enumerate(scores):
        if (decision := add_score(score).decision) is not CONTINUE:
            made[i] = decision
        if decision is COMPLETE:
            break
    assert made == of_perforatedai
    assert decisions(scores, **settings) == of_policy

"""Decide from validation scores which model is kept, when a dendrite is added and when training is complete.

A cycle is the training between two changes of the architecture. Scores are averaged over the last `history_lookback`
evaluations of the cycle (fewer at its beginning). A score is *better* than a reference if it exceeds it by more than
`improvement_threshold * abs(reference)` and by more than `improvement_threshold_raw`. The first evaluation of a cycle
is its reference, then each one that is better than the reference before. A cycle ends on a plateau:
`n_epochs_to_switch` evaluations in a row that are not better than the reference.

Each number of dendrites has its best evaluation. The kept model is the best evaluation without dendrites, or the best
one with one dendrite if that is better, and so on. A dendrite is added to the kept model, so one kept copy is enough.

Settings and decisions are those of perforatedai, except for these effects of its tracker (3.2.9):

- It ignores the first evaluation of a run (if `initial_history_after_switches` is 0). Here, it counts.
- It treats a best score of 0 as no score. Here, 0 is a score.
- It averages with an exponential decay that starts from 0 in each cycle. Here, the mean is that of the scores.
- Its relative threshold is relative to the new score, and has no effect on negative scores. Here, it is relative to
  the absolute value of the reference, so that a score and its negative decide alike.
- After a retry that helped, it gives the next dendrite one try less. Here, each dendrite has all its tries.
- It keeps only what is better by the thresholds. Here, they decide between numbers of dendrites and about plateaus;
  with the same number of dendrites, any higher score is kept.
- It counts NaN as an evaluation, and can take it for the best score. Here, scores that are not finite are skipped.
"""

import enum
import math
import statistics
from collections import deque
from dataclasses import dataclass

CAPACITY_TEST_DENDRITES = 3  # of perforatedai's capacity test, whatever the settings


def _is_count(value) -> bool:
    return type(value) is int and value >= 0


def _is_score(value) -> bool:
    return type(value) is float and math.isfinite(value)


_VALID = {
    "num_dendrites": _is_count,
    "kept_dendrites": _is_count,
    "num_tries": _is_count,
    "evaluations_since_improvement": _is_count,
    "complete": lambda value: type(value) is bool,
    "best_score": lambda value: value is None or _is_score(value),
    "reference": lambda value: value is None or _is_score(value),
    "window": lambda value: isinstance(value, list) and all(map(_is_score, value)),
}


class Decision(enum.Enum):
    """What follows from an evaluation."""

    CONTINUE = "continue training"
    ADD = "restore the kept model and add a dendrite"
    RETRY = "the last dendrite did not help: restore the kept model and add one with new weights"
    COMPLETE = "training is complete: restore the kept model"


@dataclass(frozen=True)
class Outcome:
    """The result of an evaluation.

    Attributes:
        decision (`Decision`): What to do next.
        is_best (`bool`): Whether the weights of this evaluation are the kept model from now on.
    """

    decision: Decision
    is_best: bool


class Policy:
    """Decides from a sequence of scores.

    Args:
        greater_is_better (`bool`): Whether a higher score is better.
        n_epochs_to_switch (`int`): Evaluations without improvement before a cycle ends.
        max_dendrites (`int`): Maximum number of dendrites per layer that this run adds.
        max_dendrite_tries (`int`): Maximum number of tries of a dendrite that does not help.
        history_lookback (`int`): Number of evaluations that scores are averaged over.
        improvement_threshold (`list[float]`):
            Minimum relative improvement. If several values, one per number of dendrites (0, 1, ...); the last one is
            used from there on.
        improvement_threshold_raw (`float`): Minimum absolute improvement.
        fixed (`bool`): Whether cycles end with `end_of_cycle` instead of on a plateau.
        doing_pai (`bool`): Whether dendrites are added. If not, training is complete at the end of the first cycle.
        capacity_test (`bool`):
            Whether to keep every evaluation, add a dendrite after each of the first three and complete at the fourth.

    Attributes:
        num_dendrites (`int`): Dendrites added in this run, including the one being tried, without those dropped.
        kept_dendrites (`int`): Number of these in the kept model.
        best_score (`float`, *optional*): Score of the kept model, averaged if `history_lookback` is above 1.
        num_tries (`int`): Tries of the last dendrite, including the current one. 0 before the first dendrite.
        evaluations_since_improvement (`int`): Evaluations of this cycle since the last better one.
        complete (`bool`): Whether training is complete. All further evaluations then return `Decision.COMPLETE`.
    """

    def __init__(
        self,
        *,
        greater_is_better: bool,
        n_epochs_to_switch: int,
        max_dendrites: int,
        max_dendrite_tries: int,
        history_lookback: int,
        improvement_threshold: list[float],
        improvement_threshold_raw: float,
        fixed: bool,
        doing_pai: bool = True,
        capacity_test: bool = False,
    ):
        if capacity_test:
            max_dendrites = CAPACITY_TEST_DENDRITES
        self._greater_is_better, self._patience = greater_is_better, n_epochs_to_switch
        self._max_dendrites, self._max_tries = max_dendrites if doing_pai else 0, max_dendrite_tries
        self._thresholds, self._threshold_raw = list(improvement_threshold), improvement_threshold_raw
        self._fixed, self._capacity_test = fixed, capacity_test
        self.num_dendrites = self.kept_dendrites = self.num_tries = self.evaluations_since_improvement = 0
        self.best_score: float | None = None
        self.complete = False
        self._reference: float | None = None  # the last better score of this cycle
        self._window: deque[float] = deque(maxlen=history_lookback)  # the last scores of this cycle

    def add_score(self, score: float, end_of_cycle: bool = False, may_add: bool = True) -> Outcome:
        """Add the score of an evaluation and decide.

        Args:
            score (`float`): Value of the monitored metric. One that is not finite is skipped.
            end_of_cycle (`bool`): Whether the cycle ends with this evaluation. Only used with `fixed`.
            may_add (`bool`): Whether one more dendrite fits. If not, training is complete instead of `Decision.ADD`.

        Returns:
            `Outcome`: The decision, and whether the weights of this evaluation are the kept model from now on.
        """
        if self.complete:
            return Outcome(Decision.COMPLETE, False)
        score = float(score)
        finite = math.isfinite(score)
        is_best = finite and self._add_finite(score)
        if self._fixed and not self._capacity_test:
            ends = end_of_cycle
        else:
            ends = finite and (self._capacity_test or self.evaluations_since_improvement >= self._patience)
        return Outcome(self._end_cycle(may_add) if ends else Decision.CONTINUE, is_best)

    def _add_finite(self, score: float) -> bool:
        """Record a score. Returns whether it is the best."""
        self._window.append(score)
        mean = float(statistics.mean(self._window))  # exact, so that the mean of equal scores is that score
        if self._reference is None or self._is_better(mean, self._reference):
            self._reference, self.evaluations_since_improvement = mean, 0
        else:
            self.evaluations_since_improvement += 1
        if self.best_score is None or self._capacity_test:
            is_best = True
        elif self.num_dendrites > self.kept_dendrites:
            is_best = self._is_better(mean, self.best_score)
        else:
            is_best = self._gain(mean, self.best_score) > 0
        if is_best:
            self.best_score, self.kept_dendrites = mean, self.num_dendrites
        return is_best

    def _gain(self, score: float, reference: float) -> float:
        return score - reference if self._greater_is_better else reference - score

    def _is_better(self, score: float, reference: float) -> bool:
        """Whether a score is better than a reference by both thresholds."""
        threshold = self._thresholds[min(self.num_dendrites, len(self._thresholds) - 1)]
        return self._gain(score, reference) > max(threshold * abs(reference), self._threshold_raw)

    def _end_cycle(self, may_add: bool) -> Decision:
        """Decide at the end of a cycle and begin the next one."""
        helped = self.kept_dendrites == self.num_dendrites  # true without dendrites
        if not helped and self.num_tries < self._max_tries:
            decision, self.num_tries = Decision.RETRY, self.num_tries + 1
        elif helped and self.best_score is not None and may_add and self.num_dendrites < self._max_dendrites:
            decision, self.num_tries = Decision.ADD, 1
            self.num_dendrites += 1
        else:
            decision, self.complete = Decision.COMPLETE, True
            self.num_dendrites = self.kept_dendrites
        self.start_cycle()
        return decision

    def start_cycle(self) -> None:
        """Begin a new cycle: means and the plateau count from here. For a baseline, whose run says when."""
        self._window.clear()
        self._reference, self.evaluations_since_improvement = None, 0

    def state_dict(self) -> dict:
        """Return what `load_state_dict` needs to decide in the same way from here, as JSON types."""
        return {
            "num_dendrites": self.num_dendrites,
            "kept_dendrites": self.kept_dendrites,
            "num_tries": self.num_tries,
            "evaluations_since_improvement": self.evaluations_since_improvement,
            "complete": self.complete,
            "best_score": self.best_score,
            "reference": self._reference,
            "window": list(self._window),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore a state.

        Args:
            state (`dict`): A value of `state_dict`.

        Raises:
            `ValueError`: For anything else. The policy is then unchanged.
        """
        if not isinstance(state, dict) or state.keys() != self.state_dict().keys():
            raise ValueError(f"the state of the policy must have the entries {', '.join(self.state_dict())}")
        for name, value in state.items():
            if not _VALID[name](value):
                raise ValueError(f"the state of the policy has an invalid {name}: {value!r:.80}")
        num, kept, window = state["num_dendrites"], state["kept_dendrites"], state["window"]
        if not (
            (num == kept or (num == kept + 1 and not state["complete"]))
            and (state["complete"] or (state["num_tries"] > 0) == (num > 0))
            and (state["best_score"] is not None or (num == 0 and not window))
            and (state["reference"] is not None) == bool(window)
            and (window or not state["evaluations_since_improvement"])
        ):
            raise ValueError(f"the entries of the state of the policy contradict each other: {state!r:.400}")
        for name in state.keys() - {"reference", "window"}:
            setattr(self, name, state[name])
        self._reference = state["reference"]
        self._window = deque(window, self._window.maxlen)

"""A small training for the tests of the trainer: a tiny model, 32 training texts, 8 evaluation texts, no plots.

`scripted` replaces the scores with those of a list, and `kept` returns the scores of the evaluations that had the same
predictions as the trained model.
"""

import json
import os
import signal
from pathlib import Path

import numpy as np
from models import build, rows
from transformers import TrainerCallback, TrainingArguments, set_seed

from perforated_trainer import DendriteArguments, PerforatedTrainer, checkpoint
from perforated_trainer.callbacks import PlotCallback

DISTILBERT = "DistilBertForSequenceClassification"
TRAIN, EVAL = rows(DISTILBERT)[:32], rows(DISTILBERT)[32:]
# With a patience of 1: two dendrites, the second one at the second try.
TWO_DENDRITES = [0.1, 0.2, 0.2, 0.3, 0.3, 0.1, 0.1, 0.4, 0.4]


def compute_metrics(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def arguments(cls=TrainingArguments, **changes):
    """Arguments of a run of 8 steps in the folder `run`, with an evaluation every 2 steps."""
    values = {
        "output_dir": "run",
        "use_cpu": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "max_steps": 8,
        "metric_for_best_model": "loss",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return cls(**values | changes)


def trainer_for(args=None, cls=PerforatedTrainer, model=None, name=DISTILBERT, plots=False, **kwargs):
    """A trainer of a model that is not converted; one evaluation without improvement adds a dendrite."""
    set_seed(0)
    kwargs.setdefault("dendrite_args", DendriteArguments(n_epochs_to_switch=1, max_dendrites=2))
    kwargs = {"train_dataset": rows(name)[:32], "eval_dataset": rows(name)[32:]} | kwargs
    trainer = cls(model=model or build(name), args=args or arguments(), **kwargs)
    if not plots:
        trainer.remove_callback(PlotCallback)
    return trainer


class Script:
    """`compute_metrics` that returns the scores of a list in turn, and keeps the predictions of each evaluation."""

    def __init__(self, scores):
        self.scores, self.seen, self.running = list(scores), [], True

    def __call__(self, prediction):
        score = self.scores[min(len(self.seen), len(self.scores) - 1)]
        if self.running:
            self.seen.append((score, np.array(prediction.predictions)))
        return {"score": score}


def scripted(scores, model=None, dendrites=None, greater_is_better=True, cls=PerforatedTrainer, more=None, **changes):
    """A trainer whose evaluations have the scores of a list. Returns trainer and `Script`."""
    if "test_dataset" in (more or {}):  # each score is returned twice
        scores = [score for score in scores for _ in range(2)]
    script = Script(scores)
    metric = {"metric_for_best_model": "score", "greater_is_better": greater_is_better}
    usual = {"max_steps": 200, "save_strategy": "no", "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    settings = DendriteArguments(**{"n_epochs_to_switch": 1, "max_dendrites": 2} | (dendrites or {}))
    args = arguments(**metric | usual | changes)
    trainer = trainer_for(args, cls, model, dendrite_args=settings, compute_metrics=script, **more or {})
    return trainer, script


def kept(trainer, script):
    """Scores of the evaluations whose predictions equal those of the current model."""
    script.running = False
    now = trainer.predict(trainer.eval_dataset).predictions
    return list(dict.fromkeys(score for score, predictions in script.seen if np.array_equal(predictions, now)))


def scores_left(scores, trainer):
    """The scores of a list that remain for a run that is resumed from its newest checkpoint."""
    newest = checkpoint.find(True, Path(trainer.args.output_dir), print)
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return scores[sum("eval_score" in entry for entry in history) :] or scores[-1:]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class SignalAt(TrainerCallback):
    """Sends this process a signal at a step."""

    def __init__(self, step, number=signal.SIGKILL):
        self.step, self.number = step, number

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def killed(run):
    """Run a function in a separate process, which it must kill."""
    if (child := os.fork()) == 0:
        try:
            run()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it ended by itself"


def kill_at_step(step, make):
    """Train what `make()` returns in a separate process, and kill it at the end of a step."""

    def run():
        trainer = make()
        trainer.add_callback(SignalAt(step))
        trainer.train()

    killed(run)

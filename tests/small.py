"""A small training for the tests of the trainer: a tiny model, 32 texts to train on, 8 to evaluate."""

from models import build, rows
from transformers import TrainingArguments, set_seed

from perforated_trainer import DendriteArguments, PerforatedTrainer

DISTILBERT = "DistilBertForSequenceClassification"


def compute_metrics(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def arguments(cls=TrainingArguments, **changes):
    """Arguments of a run in the folder `run`, evaluated at every second of 8 steps."""
    values = {
        "output_dir": "run",
        "use_cpu": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "max_steps": 8,
        "metric_for_best_model": "loss",
        "report_to": "none",
    }
    return cls(**values | changes)


def trainer_for(args=None, cls=PerforatedTrainer, model=None, name=DISTILBERT, **kwargs):
    """A trainer of a model that is not converted; one evaluation without a better score adds a dendrite."""
    set_seed(0)
    kwargs.setdefault("dendrite_args", DendriteArguments(n_epochs_to_switch=1, max_dendrites=2))
    kwargs = {"train_dataset": rows(name)[:32], "eval_dataset": rows(name)[32:]} | kwargs
    return cls(model=model or build(name), args=args or arguments(), **kwargs)

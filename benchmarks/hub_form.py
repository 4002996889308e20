"""Duration of the script's first run if the Hub is reachable: it reads 70,000 PNGs, then trains.

    python benchmarks/hub_form.py --data_dir DIR

Instead of downloading `ylecun/mnist`, it builds a parquet dataset of the same form from MNIST's IDX files in DIR.
Prints the last lines of the script, and the seconds from the launch to the final table. Further flags are passed to the
script.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def write_parquet(data_dir: Path, folder: Path) -> None:
    """Write MNIST as parquet files in the form of the Hub: one PNG and one class label per row."""
    import datasets
    from PIL import Image

    from mnist_huggingface_perforatedai import read_idx

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    for part, (images, labels) in zip(("train", "test"), read_idx(str(data_dir)), strict=True):
        rows = {"image": [Image.fromarray(image.numpy()) for image in images], "label": labels.tolist()}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{part}-00000-of-00001.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with MNIST's IDX files")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "mnist").mkdir()
        write_parquet(args.data_dir.resolve(), folder / "mnist")
        command = [sys.executable, str(ROOT / "mnist_huggingface_perforatedai.py"), "--dataset_name", "./mnist", *flags]
        began = time.monotonic()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        seconds = time.monotonic() - began
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        results = json.loads((folder / "mnistHF" / "results.json").read_text())
    print(done.stdout[done.stdout.rindex("dendrites  parameters") :])
    trained, steps = results["train_seconds"], results["global_step"]
    print(
        f"{sum(results['dataset'][part] for part in ('train', 'validation', 'test')):,} PNGs; launch to final table ",
        end="",
    )
    print(f"{seconds:.0f} s, of which training {trained:.0f} s for {steps:,} steps; imports, reading, scores the rest")


if __name__ == "__main__":
    main()

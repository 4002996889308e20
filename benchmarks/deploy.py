"""A trained model in PyTorch, ONNX and int8, compared with the same network without dendrites.

    python benchmarks/deploy.py --run mnistHF --without mnistHF-without

Both are folders of runs of the script, the second one with `--doing_pai false`. Without these flags, it first trains
two short runs. The accuracy is measured on the test images of the runs; pass the same `--data_dir` as to the script.
Runs on the CPU with one thread. Prints a Markdown table with machine, versions, commit and command. Requires onnx,
onnxscript and onnxruntime.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import onnxruntime  # noqa: E402
import torch  # noqa: E402
from onnx_ir.passes.common import ClearMetadataAndDocStringPass  # noqa: E402
from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: E402
from transformers import AutoModelForImageClassification  # noqa: E402
from transformers.utils import logging  # noqa: E402

import mnist_huggingface_perforatedai as script  # noqa: E402
from perforated_trainer.report import count  # noqa: E402

BATCHES = 64, 1000
SHORT = "--eval_steps 50 --logging_steps 50 --save_steps 1000 --n_epochs_to_switch 3 --max_dendrites 3".split()


def train(folder: Path, *flags: str) -> None:
    command = [sys.executable, str(ROOT / "mnist_huggingface_perforatedai.py"), *SHORT, *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"a run failed: {done.stderr[-2000:]}")


def forms(final: Path, folder: Path) -> dict:
    """Export a model to ONNX and int8.

    Args:
        final (`Path`): Folder of the model.
        folder (`Path`): Folder that the exported files are written to.

    Returns:
        `dict`: For PyTorch, ONNX and int8 a function from an array of images to logits, and the file of the weights.
    """
    model = AutoModelForImageClassification.from_pretrained(final, trust_remote_code=True)
    example = {"pixel_values": torch.zeros(2, 1, 28, 28)}
    free = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.onnx.export(
        model, (), kwargs=example, dynamic_shapes=free, dynamo=True, output_names=["logits"], verbose=False
    )
    ClearMetadataAndDocStringPass()(program.model)
    plain, small = folder / "model.onnx", folder / "model.int8.onnx"
    program.save(plain)
    quantize_dynamic(plain, small, weight_type=QuantType.QUInt8)

    def in_pytorch(images):
        with torch.inference_mode():
            return model(torch.from_numpy(images)).logits.numpy()

    def in_onnxruntime(file):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(["logits"], {"pixel_values": images})[0]

    weights = next(final.glob("model*.safetensors"))
    return {
        "PyTorch": (in_pytorch, weights),
        "ONNX": (in_onnxruntime(plain), plain),
        "ONNX int8": (in_onnxruntime(small), small),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run with dendrites")
    parser.add_argument("--without", type=Path, help="folder of a run with --doing_pai false")
    parser.add_argument("--data_dir", help="as in the script")
    parser.add_argument("--max_eval_samples", type=int, help="as in the script, if the runs used it")
    parser.add_argument("--repeats", type=int, default=31, help="number of timed turns; the median is reported")
    args = parser.parse_args()
    if (args.run is None) != (args.without is None):
        parser.error("give both --run and --without, or neither")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.run is None:
            same = [f"--{name}={value}" for name in ("data_dir", "max_eval_samples") if (value := getattr(args, name))]
            train(folder, "--save_name", "with", *same)
            train(folder, "--save_name", "without", "--doing_pai", "false", *same)
            args.run, args.without = folder / "with", folder / "without"
        print_table(args, folder)


def print_table(args, folder: Path) -> None:
    name, *_, test = script.load_data(
        script.DataArguments(data_dir=args.data_dir, max_eval_samples=args.max_eval_samples)
    )
    rows = test.__getitems__(range(len(test)))
    images, labels = rows["pixel_values"].numpy(), rows["labels"].numpy()
    table, functions = [], []
    for run in (args.without, args.run):
        results = json.loads((run / "results.json").read_text())["final"]
        if (run == args.run) != bool(results["dendrites"]):
            sys.exit(f"{run} ended with {count(results['dendrites'], 'dendrite')}: there is nothing to compare")
        (folder / "onnx" / run.name).mkdir(parents=True)
        for form, (logits, file) in forms(run / "final", folder / "onnx" / run.name).items():
            accuracy = float((logits(images).argmax(-1) == labels).mean())
            if form == "PyTorch" and abs(accuracy - results["test_accuracy"]) > 1e-9:
                sys.exit(f"{run}: accuracy {accuracy}, results.json has {results['test_accuracy']}: other test images?")
            size, number = f"{file.stat().st_size / 1000:.1f}", f"{results['parameters']:,}"
            table.append([count(results["dendrites"], "dendrite"), form, size, number, f"{accuracy:.4f}"])
            functions.append(logits)
    for batch in BATCHES:
        part, seconds = images[:batch], [[] for _ in functions]
        for turn in range(args.repeats + 1):  # in turns, so that other load of the machine affects all networks
            for times, logits in zip(seconds, functions, strict=True):
                began = time.perf_counter()
                logits(part)
                times.append(time.perf_counter() - began)
            if not turn:  # the first turn warms up
                seconds = [[] for _ in functions]
        for row, times in zip(table, seconds, strict=True):
            row.append(f"{1000 * statistics.median(times):.2f}")

    def git(*command):
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=False).stdout

    commit = (git("rev-parse", "--short", "HEAD").strip() or "unknown") + ("+" if git("status", "--porcelain") else "")
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "onnx", "onnxruntime"))
    print(f"`{shlex.join(['python', 'benchmarks/deploy.py', *sys.argv[1:]])}`: {platform.machine()},")
    print(f"{os.cpu_count()} cores, one thread, Python {platform.python_version()}, {versions};")
    print(f"commit {commit}; {len(labels):,} test images of: {name}; medians of {args.repeats} turns.\n")
    names = ["network", "form", "file, kB", "parameters", "test accuracy", *(f"ms for {b:,} images" for b in BATCHES)]
    print("\n".join(f"| {' | '.join(row)} |" for row in [names, ["---"] * len(names), *table]))


if __name__ == "__main__":
    main()

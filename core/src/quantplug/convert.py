"""
From a dense checkpoint to a quantized one: streaming, into a directory that appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantplug.checkpoint import open_checkpoint
from quantplug.config import read_model_config, resolve_config
from quantplug.errors import ConvertError
from quantplug.inventory import inventory_of
from quantplug.load import tell
from quantplug.moescheme import share
from quantplug.plugins import registry as installed
from quantplug.reader import TensorReader
from quantplug.scheme import LinearScheme
from quantplug.schemes import SchemeCache, quantize_dense
from quantplug.skip import SCHEMED, SchemeRef
from quantplug.source import resolve_source
from quantplug.staging import StagedDirectory
from quantplug.worklist import Job, Wish, work_list
from quantplug.writer import TensorFileWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from quantplug.host import CalibrationBlock
    from quantplug.inventory import ModuleInfo
    from quantplug.jsonio import Json
    from quantplug.load import Progress
    from quantplug.registry import Registry
    from quantplug.skip import Entry
    from quantplug.weight import Weight

# What belongs to a model besides weights and configuration: tokenizer, chat template, generation defaults, licence.
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md")
_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Calibration:
    """
    A text that shows what the layers' inputs look like.

    Attributes:
        text: plain text, a few thousand words.
        tokens: how many tokens of it to use at most.
        window: sequence length in tokens.
        host: framework that runs the model; None takes the only one installed.
    """

    text: str
    tokens: int = 8192
    window: int = 512
    host: str | None = None


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """
    What a conversion did.

    Attributes:
        quantized: number of layers by scheme, in words.
        dense: checkpoint paths of the linear layers, those of experts among them, left whole.
        source_bytes: tensor bytes of the source.
        written_bytes: size of the weights file written.
        seconds: wall time.
        rounded: quantized layers that a calibration text was given for and did not reach (those of experts).
    """

    quantized: Mapping[str, int]
    dense: tuple[str, ...]
    source_bytes: int
    written_bytes: int
    seconds: float
    rounded: int = 0


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    scheme: str,
    params: Mapping[str, Json],
    head: Mapping[str, Json] | None = None,
    skip: Sequence[Entry] = (),
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> ConvertReport:
    """
    Quantize the linear layers of a dense checkpoint, those of its experts among them.

    Without a calibration text one tensor at a time is in memory. The destination appears when everything is written;
    an interrupted run leaves only a `.partial` directory beside it, which the next run replaces.

    Args:
        source: directory or repository id of a dense checkpoint.
        destination: directory to create.
        scheme: name of the scheme to write ("gptq").
        params: its parameters (`{"bits": 4, "group_size": 64}`); the rest are the scheme's defaults.
        head: parameters for the output head, which stays dense when this is None. A head that is tied to the
            embedding is then stored on its own, and the embedding stays as it is.
        skip: layers to leave whole.
        calibration: a text to quantize by; None rounds without one. Experts, which see few tokens of a text each, are
            rounded without one in any case.
        progress: told the source bytes done.
        registry: plugins to use; None takes the installed ones.

    Raises:
        ConvertError: `QP-CONV-…`; the destination does not exist then.
        ConfigError, CheckpointError, PluginError: as when planning.
    """
    started = time.perf_counter()
    registry = installed() if registry is None else registry
    directory, target = resolve_source(source), Path(destination)
    checkpoint = open_checkpoint(directory)
    model_config = read_model_config(directory)
    found = resolve_config(directory, registry)
    if found.dialect:
        raise ConvertError(
            "QP-CONV-SOURCE", str(directory), f"is already quantized ({found.dialect})", expected="a dense checkpoint"
        )
    if registry.scheme(scheme).item.quantize is LinearScheme.quantize:
        raise ConvertError(
            "QP-CONV-SCHEME",
            f"scheme {scheme}",
            "reads checkpoints and does not write them",
            expected="a scheme that quantizes",
        )
    inventory = inventory_of(checkpoint, model_config, registry, found)
    wish = Wish(scheme, params, head, tuple(skip))
    jobs = list(work_list(checkpoint, inventory, wish, SchemeCache(registry)))
    quantized = {job.module: job.ref for job in jobs if job.ref is not None}
    linear = [module for module in inventory if module.kind in SCHEMED]
    dense = tuple(name for module in linear if wish.ref(module) is None for name in _stored_as(module))
    base = SchemeRef(scheme, tuple(sorted(params.items())))
    config: dict[str, Json] = dict(model_config)
    config["quantization_config"] = registry.dialect_writing(scheme).item.write(base, quantized, dense)
    if any(module.tied_to and module.name in quantized for module in linear):
        config["tie_word_embeddings"] = False
    outputs = [output for job in jobs for output in job.outputs]
    with _disk_errors(target), StagedDirectory(target) as staged:
        for pattern in _COMPANIONS:
            for file in directory.glob(pattern):
                if file.is_file() and not file.name.endswith(".safetensors.index.json"):
                    shutil.copyfile(file, staged.path / file.name)
        (staged.path / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with (
            TensorReader(checkpoint) as reader,
            TensorFileWriter(staged.path / _WEIGHTS, outputs, {"format": "pt"}) as writer,
        ):
            waiting = _write_all(jobs, reader, writer, _blocks(directory, calibration, registry), progress)
    return ConvertReport(
        dict(Counter(job.scheme.describe() for job in jobs if job.scheme is not None)),
        dense,
        sum(header.nbytes for header in checkpoint.tensors.values()),
        writer.size,
        time.perf_counter() - started,
        waiting if calibration is not None else 0,
    )


def _write_all(
    jobs: list[Job],
    reader: TensorReader,
    writer: TensorFileWriter,
    blocks: Iterator[CalibrationBlock],
    progress: Progress | None,
) -> int:
    """
    Do the calibrated layers in the order the host brings them, then everything else in file order.

    Returns:
        How many layers were quantized that the host did not bring.
    """
    total, done = sum(job.nbytes for job in jobs), 0
    waiting = {job.module: job for job in jobs if job.scheme is not None}
    for block in blocks:
        for path, hessian in block.hessians.items():
            job = waiting.pop(path, None)
            if job is not None:
                block.replace(path, _quantize(job, reader, writer, hessian).dequantize())
                done += job.nbytes
                tell(progress, "convert", done, total)
    for job in jobs:
        if job.scheme is None:
            writer.write(job.outputs[0][0], _read(job, reader))
        elif job.module in waiting:
            _quantize(job, reader, writer, None)
        else:
            continue
        done += job.nbytes
        tell(progress, "convert", done, total)
    return len(waiting)


def _stored_as(module: ModuleInfo) -> tuple[str, ...]:
    """Return the paths of what a module that stays whole is stored as."""
    apart = module.experts is not None and not module.experts.files.stacked
    return module.shards if apart else (module.name,)


def _read(job: Job, reader: TensorReader) -> torch.Tensor:
    if job.part is None:
        return reader.read(job.source)
    return share(reader.read_part(job.source, job.part.expert), job.part.ending)[job.part.rows].contiguous()


def _quantize(job: Job, reader: TensorReader, writer: TensorFileWriter, hessian: torch.Tensor | None) -> Weight:
    """Quantize one layer, write it, and return it."""
    if job.scheme is None:
        raise TypeError(f"{job.source} is to be copied, not quantized")
    weight = quantize_dense(job.scheme, _read(job, reader), job.source, hessian=hessian)
    stored = {f"{job.module}.{suffix}": tensor for suffix, tensor in job.scheme.encode(weight).items()}
    announced = {name for name, _, _ in job.outputs}
    if stored.keys() != announced:
        raise ConvertError(
            "QP-CONV-SPEC",
            job.module,
            f"{job.scheme.describe()} gives {', '.join(sorted(stored))}",
            expected=f"{', '.join(sorted(announced))}, as it announced",
            fix="Report this to the makers of its plugin.",
        )
    for name, _, _ in job.outputs:
        writer.write(name, stored[name])
    return weight


def _blocks(directory: Path, calibration: Calibration | None, registry: Registry) -> Iterator[CalibrationBlock]:
    if calibration is None:
        return iter(())
    host = registry.host(calibration.host).item
    return host.calibrate(directory, calibration.text, tokens=calibration.tokens, window=calibration.window)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConvertError(
            "QP-CONV-SPACE",
            str(error.filename or target),
            error.strerror or str(error),
            expected="a writable disk with room for the result",
            fix="Nothing was left behind; free some space or name another destination.",
        ) from error

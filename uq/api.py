"""The commands as functions: what `import uq` offers. They return what the commands print.

import uq

bundle = uq.quantize("google/gemma-3-1b-it", "out", uq.QuantizeOptions(recipe="int4"))
report = uq.validate(bundle)
print(report.kld.mean, report.speed)
uq.export(bundle, options=uq.ExportOptions("gguf"))
"""

from __future__ import annotations

from pathlib import Path

from uq.commands.quantize import default_folder, open_farm
from uq.export import export as writing
from uq.export.export import Exported, ExportOptions, default_output
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.journal import begun_revision
from uq.formats.writer import work_folder
from uq.generation import Generated, generate
from uq.kernels.session import Sampling
from uq.progress import Progress, SilentProgress
from uq.quantize import pipeline
from uq.quantize.pipeline import QuantizeOptions
from uq.validate import validate as comparison
from uq.validate.report import Report
from uq.validate.validate import ValidateOptions

__all__ = [
    "Bundle",
    "Checkpoint",
    "ExportOptions",
    "Exported",
    "Generated",
    "QuantizeOptions",
    "Report",
    "Sampling",
    "ValidateOptions",
    "export",
    "generate",
    "open_checkpoint",
    "quantize",
    "validate",
]


def quantize(
    model: str | Path | Checkpoint,
    output: str | Path | None = None,
    options: QuantizeOptions | None = None,
    *,
    revision: str | None = None,
    keep: bool = False,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Quantize a model, as `uq quantize` does. A run that was broken off is continued.

    Args:
        model: checkpoint folder, GGUF file, Hub id `owner/name`, `demo:gemma-3-270m`, or what
            `open_checkpoint` returned; then `revision` and `keep` have no effect.
        output: folder of the bundle; None: MODEL-RECIPE-gGROUP in the current folder.
        revision: branch, tag or commit of a Hub id.
        keep: download a Hub checkpoint into the Hugging Face cache; else fetch it layer by layer.
        scheduler: address of a Dask scheduler, `tcp://host:port`, whose workers help.
        progress: told about every step; None: nobody is.

    Returns:
        The bundle, opened.

    Raises:
        UsageError: the options do not fit the model or each other, or `output` exists.
        CheckpointError: the model is broken or of another family.
        HubError: it cannot be downloaded.
        DeviceError: the disk is full or broken, or no worker can help.
    """
    options = options or QuantizeOptions()
    name = model.source.id if isinstance(model, Checkpoint) else str(model)
    out = Path(output) if output is not None else default_folder(name, options)
    if not isinstance(model, Checkpoint):
        if revision is None and options.resume != "restart":  # the branch may have moved since
            revision = begun_revision(work_folder(out), name)
        model = open_checkpoint(model, revision=revision, stream=not keep)
    progress = progress or SilentProgress()
    with open_farm(scheduler, model, options, progress) as farm:
        path = pipeline.quantize(model, out, options, progress, farm=farm)
    return open_bundle(path, verify="lazy")


def validate(
    bundle: str | Path | Bundle,
    reference: str | Path | Checkpoint | None = None,
    options: ValidateOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Report:
    """Compare a bundle with its reference, as `uq validate` does; the report is not saved.

    The text is taken as it is, unless `options.render` puts it to the model as a chat.

    Args:
        reference: None: the checkpoint that the bundle was made from.

    Raises:
        BundleError: the folder is not a bundle, or a broken one.
        CheckpointError: the reference cannot be opened or is another model.
        DeviceError: the device is not available.
        UsageError: the text cannot be read or is too short.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if isinstance(reference, str | Path):
        keep = options is not None and options.keep
        reference = open_checkpoint(reference, stream=not keep)
    return comparison.validate(opened, reference, options, progress)


def export(
    bundle: str | Path | Bundle,
    output: str | Path | None = None,
    options: ExportOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Exported:
    """Write a bundle for another program, as `uq export` does.

    Args:
        output: the folder, or the GGUF file; None: as the command names it.
        options: None: plain weights in float32 for transformers.

    Raises:
        BundleError: the folder is no bundle or a broken one, or no other program has such a model.
        UsageError: `output` exists, the options do not go together, or the format cannot hold the
            bundle exactly and `allow_rounding` is not given.
        DeviceError: the disk is full or broken.
    """
    options = options or ExportOptions()
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, verify="lazy")
    out = Path(output) if output is not None else default_output(opened, options)
    return writing.export(opened, out, options, progress or SilentProgress())

"""The model card: metadata for the Hub, and a page for people, from the report's numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING

from uq.chat import CHAT_FILES
from uq.inspection import bundle_towers
from uq.validate.html import provenance, tiles

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from uq.formats.bundle import Bundle
    from uq.validate.report import Report

TEMPLATE = Path(__file__).with_name("card.md.j2")
# The sentence that section 3.1 of the Gemma Terms of Use asks every distribution to carry.
NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms."
)
REQUIRED = {
    "base_model": "the bundle does not name a model of the Hub; pass --base-model ORG/NAME",
    "license": "pass --license ID",
    "library_name": "",
    "pipeline_tag": "",
    "tags": "",
    "eval_results": "run uq validate BUNDLE first",
}


def card_data(
    bundle: Bundle, report: Report | None, base_model: str | None, licence: str
) -> ModelCardData:
    """The metadata of the card; what is not known is None."""
    from huggingface_hub import ModelCardData

    chat = ["conversational"] if is_chat(bundle) else []
    return ModelCardData(
        base_model=base_model,
        base_model_relation="quantized",
        license=licence,
        library_name="unicorn-quant",
        pipeline_tag="text-generation",
        tags=["gemma", "quantized", "amd", "ryzen-ai", bundle.manifest.recipe, *chat],
        model_name=bundle.name,
        eval_results=None if report is None else list(eval_results(report)),
    )


def missing_fields(data: ModelCardData) -> list[str]:
    """One sentence for each field without which the Hub would not know what the model is."""
    empty = [name for name in REQUIRED if not getattr(data, name)]
    return [f"model card: {name} is missing: {REQUIRED[name]}".rstrip(": ") for name in empty]


def eval_results(report: Report) -> Iterator[EvalResult]:
    """The report's figures as entries of the Hub's model-index; speeds name their device."""
    from huggingface_hub import EvalResult

    figures = [
        ("kl_divergence", "KL divergence from the reference (nats)", report.kld.mean),
        ("same_top_token", "Same top token as the reference (%)", report.same_top_percent),
        ("perplexity", "Perplexity", report.perplexity.value),
        ("perplexity_ratio", "Perplexity ratio to the reference", report.perplexity_ratio.value),
    ]
    if report.speed is not None:
        where = f"tokens/s on {report.device.name}"
        figures += [
            ("decode_speed", f"Decode, {where}", report.speed.decode_tps.median),
            ("prefill_speed", f"Prefill, {where}", report.speed.prefill_tps.median),
        ]
    text = report.text
    for kind, name, value in figures:
        yield EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=text.name,
            dataset_args={"sha256": text.sha256, "chunks": text.chunks, "context": text.context},
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 6),
        )


def render_card(
    bundle: Bundle, report: Report, data: ModelCardData, repo: str, plots: dict[str, str]
) -> str:
    """The card as Markdown behind its YAML header. `plots`: name -> SVG."""
    from huggingface_hub import ModelCard
    from jinja2 import Environment

    page = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    text = page.from_string(TEMPLATE.read_text("utf-8")).render(
        card_data=data.to_yaml(),
        name=repo.rpartition("/")[2],
        repo=repo,
        base_model=data.base_model,
        report=report,
        chat=is_chat(bundle),
        towers=describe_towers(bundle),
        tiles=tiles(report),
        plots={name: spoken(svg) for name, svg in plots.items()},
        provenance=provenance(report),
        files=(sources := bundle.manifest.provenance.files),
        stated=all(file.sha256 for file in sources.values()),
        notice=NOTICE,
    )
    return str(ModelCard(text).content)


def describe_towers(bundle: Bundle) -> str:
    """What lies beside the text model, if anything does."""
    towers = bundle_towers(bundle)
    if towers is None:
        return ""
    how = f"{towers.int8} of them in INT8" if towers.int8 else "as they are"
    return f"the {towers.tensors} tensors of the source's towers and projectors, {how}"


def spoken(svg: str) -> str:
    """What a figure says to who cannot see it."""
    label = re.search(r'aria-label="([^"]*)"', svg)
    return re.sub(r"[\[\]\n]", " ", unescape(label[1])) if label else ""


def is_chat(bundle: Bundle) -> bool:
    return CHAT_FILES[0] in bundle.manifest.files

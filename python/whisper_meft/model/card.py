"""The README.md that is saved beside a trained model, with the header that the model hub reads."""

import json
import os

from transformers.configuration_utils import PreTrainedConfig

from ..errors import markdown


def model_card(config: PreTrainedConfig) -> str:
    """The text of a ``README.md`` for a saved model.

    Args:
        config: a ``MeftModelConfig``.
    """
    base, method = config.base_model_name_or_path, config.meft["method"]
    transcribes = config.task == "transcription"
    tag = "automatic-speech-recognition" if transcribes else "audio-classification"
    head = {"library_name": "whisper_meft", "pipeline_tag": tag}
    if base and base != "backbone" and not os.path.isabs(base):
        head["base_model"] = base
    known = base and not os.path.isabs(base)
    where = "" if not known else " in `backbone/`" if base == "backbone" else f", {markdown(base)}"
    if "reduction_factor" in config.meft:
        title = f"{method.upper()} side network"
        beside = "" if transcribes else " and classifier"
        of = f"Whisper, beside its {config.meft['placement']}" if transcribes else "Whisper encoder"
        what = (
            f"A {method.upper()} side network{beside} (reduction factor "
            f"{config.meft['reduction_factor']}) for a frozen {of}{where}."
        )
    else:
        target = config.meft.get("target")
        part = f" {target}" if target in ("encoder", "decoder") else ""
        of = f"Whisper{part}{where}" if transcribes else f"Whisper encoder{where}, and a classifier"
        title = f"Whisper {'recogniser' if transcribes else 'classifier'} trained by {method}"
        what = f"What method {method} trains of a {of}."
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in head.items()), "tags:", f"- {tag}"]
    lines += ["- whisper", f"- {method}", "---", "", f"# {title}", "", what, ""]
    if not transcribes:
        lines += [f"Labels: {', '.join(markdown(v) for v in config.id2label.values())}.", ""]
    name = "MeftForConditionalGeneration" if transcribes else "MeftModel"
    lines += [
        "```python",
        f"from whisper_meft import {name}",
        "",
        f'model = {name}.from_pretrained("path/or/name/of/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines)

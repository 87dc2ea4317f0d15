"""`import whisper_meft` makes transformers know saved models, whatever is imported first, and stays cheap."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import WhisperFeatureExtractor
from whisper_meft import LSTConfig, get_meft_model

from tests.modelling_fixtures import tiny_whisper

ROOT = Path(__file__).parents[2]
AUTO = "from transformers import AutoConfig, AutoModelForAudioClassification as Auto"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    get_meft_model(tiny_whisper(), LSTConfig()).save_pretrained(folder, save_backbone=True)
    WhisperFeatureExtractor(feature_size=12).save_pretrained(folder)
    return folder


def run(code, folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "python"]))}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "imports",
    [
        f"import whisper_meft\n{AUTO}",
        f"{AUTO}\nimport whisper_meft",
        f"import transformers.trainer\nimport whisper_meft\n{AUTO}",
        f"from whisper_meft import MeftModel\n{AUTO}",
    ],
)
def test_the_auto_classes_load_saved_models(imports, saved):
    code = (
        f"import sys\n{imports}\nprint(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)\n"
        "print(type(Auto.from_pretrained(sys.argv[1])).__name__)\n"
    )
    result = run(code, saved)
    assert result.stdout.split() == ["MeftModelConfig", "MeftModel"], result.stderr


def test_a_pipeline_does(saved):
    code = (
        "import sys\nimport whisper_meft\nfrom transformers import pipeline\n"
        "print(type(pipeline('audio-classification', model=sys.argv[1], device='cpu').model).__name__)"
    )
    result = run(code, saved)
    assert result.stdout.split() == ["MeftModel"], result.stderr
    assert "not supported" not in result.stderr


def test_importing_loads_no_framework():
    code = (
        "import sys, whisper_meft\nheavy = {'torch', 'transformers', 'numpy', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "from transformers import AutoConfig\nprint('whisper_meft.model' in sys.modules)"
    )
    assert run(code, "").stdout.splitlines() == ["[]", "False"]


def test_a_model_is_loaded_without_the_trainers_and_served_by_one_that_comes_later(saved):
    code = (
        "import sys\nfrom whisper_meft import MeftModel\nMeftModel.from_pretrained(sys.argv[1])\n"
        "print(sorted({'transformers.trainer', 'datasets', 'pandas', 'pyarrow'} & set(sys.modules)))\n"
        "from transformers import trainer\nprint([each.__name__ for each in trainer.DEFAULT_CALLBACKS])"
    )
    result = run(code, saved)
    found = ["[]", "['DefaultFlowCallback', 'MethodCallback']"]
    assert result.stdout.splitlines() == found, result.stderr

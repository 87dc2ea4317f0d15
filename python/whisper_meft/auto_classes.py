"""Makes transformers' Auto classes and ``pipeline`` know saved models, before anything of them is imported.

``import whisper_meft`` must stay cheap, and transformers loads its Auto classes when they are asked for. They
hold names and import what these stand for when it is needed: ours join them the moment they are loaded. What
models need of Trainers is given to these the same way.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

MODEL_TYPE, CONFIG = "whisper_meft", "MeftModelConfig"
# By the mapping of each Auto class.
MODELS = {
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING": "MeftModel",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING": "MeftForConditionalGeneration",
}
PACKAGE = __name__.partition(".")[0]


def _know_the_config(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    mapping._mapping.setdefault(MODEL_TYPE, CONFIG)
    mapping._modules[MODEL_TYPE] = sys.modules[PACKAGE]


def _know_the_models(module: ModuleType) -> None:
    for name, model in MODELS.items():
        mapping = getattr(module, name)
        mapping._model_mapping.setdefault(MODEL_TYPE, model)
        mapping._config_mapping.setdefault(MODEL_TYPE, CONFIG)
        mapping._reverse_config_mapping.setdefault(CONFIG, MODEL_TYPE)
        mapping._modules[MODEL_TYPE] = sys.modules[PACKAGE]


def _let_pipelines_hear(module: ModuleType) -> None:
    # The pipeline for recognition asks the config's type whether a model is a Whisper, and cuts what others
    # hear to one window, silently. Of models that are not ours this property gives what was set.
    def kind(self) -> str | None:
        own, config = self.__dict__.get("type"), getattr(getattr(self, "model", None), "config", None)
        ours = getattr(config, "model_type", None) == MODEL_TYPE
        return "seq2seq_whisper" if ours and own == "seq2seq" else own

    def set_kind(self, value: str) -> None:
        self.__dict__["type"] = value

    module.AutomaticSpeechRecognitionPipeline.type = property(kind, set_kind)


def _let_trainers_serve(module: ModuleType) -> None:
    ours = sys.modules.get(f"{PACKAGE}.model.in_any_trainer")  # without it there is no model yet
    if ours is not None:
        ours.serve_in_every_trainer()


_STEPS = {
    "transformers.models.auto.configuration_auto": _know_the_config,
    "transformers.models.auto.modeling_auto": _know_the_models,
    "transformers.pipelines.automatic_speech_recognition": _let_pipelines_hear,
    "transformers.trainer": _let_trainers_serve,
}


def _take(module: ModuleType) -> None:
    # Another transformers may hold its names otherwise: then MeftModel registers itself when it is imported.
    with suppress(AttributeError):
        _STEPS[module.__name__](module)


class _Then(Loader):
    """Loads a module as ``loader`` does, and then adds our names to it."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _take(module)

    def __getattr__(self, name: str):
        return getattr(self._loader, name)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _STEPS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


def register_when_loaded() -> None:
    """Adds our names to those of transformers' modules that are loaded, and to the others once they are."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _STEPS:
        if name in sys.modules:
            _take(sys.modules[name])

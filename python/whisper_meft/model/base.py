"""What the models of all tasks share: the encoder, what a method trains, saving, loading and uploading."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..encoder.cached import states_read
from ..encoder.dtypes import HALF
from ..encoder.fingerprint import fingerprint
from ..encoder.frozen import FrozenEncoder
from ..errors import UserError
from ..methods import MeftConfig
from ..once import warn_once
from ..padding import frames_of_mask, frames_with_sound
from .backbone import write_backbone
from .config import MeftModelConfig
from .in_any_trainer import serve_in_every_trainer
from .loading import load
from .saving import save, upload
from .sharing import check_unused, note_use
from .weights import plain_name, some_of


class MeftBase(PreTrainedModel):
    """A Whisper encoder, and what a method trains of it or beside it; a task's model adds the rest.

    Args:
        config: sizes and the method's options.
        base: the Whisper model of the task, a ``base_class``. Its modules are shared, not copied: several
            models of methods that leave them as they are may share one base, any other needs one to itself.

    Raises:
        UserError: the options do not fit the backbone, or another model on ``base`` has trained it or would
            be changed with it.
    """

    # What the model does, and transformers' Whisper model that does it.
    task: ClassVar[str]
    base_class: ClassVar[type[PreTrainedModel]]

    # Whose hidden states `states_read` counts: the encoder's of frames, or the decoder's of tokens.
    states_of: str = "encoder"

    config_class = MeftModelConfig
    base_model_prefix = "meft"  # names no attribute: nothing of this model is a stock base model
    main_input_name = "input_features"
    # A frozen backbone saves no activations and recomputes nothing, a tuned one recomputes layer by layer.
    supports_gradient_checkpointing = True
    # forward takes num_items_in_batch: gradient accumulation then gives the gradient of the whole batch.
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MeftModelConfig, base: PreTrainedModel | None = None):
        if not isinstance(base, self.base_class):
            raise UserError(
                f"base must be a {self.base_class.__name__}, got {type(base).__name__}: a config alone "
                "makes no model, get_meft_model and from_pretrained do"
            )
        super().__init__(config)
        self.meft_config = MeftConfig.from_dict(config.meft)
        whisper_encoder = base.get_encoder()
        if any(name.endswith("base_layer") for name, _ in base.named_modules()):
            raise UserError(
                "base already carries an adapter of an earlier model: load it anew, or merge that model first"
            )
        check_unused(base, self.meft_config)
        self.encoder = self.meft_config.build_encoder(whisper_encoder)
        check_sizes(config, self.encoder)
        self.check_method()
        # Masters in float32 whatever the backbone's number format.
        place = {"device": self.encoder.conv1.weight.device, "dtype": torch.float32}
        self.build(base, **place)
        self.post_init()
        serve_in_every_trainer(type(self.meft_config).trainer_callback is not MeftConfig.trainer_callback)
        self._adapter_is_off = False
        self._cast_to_run = False
        # Whether whoever trains the model adds `penalty()` to the loss, where it computes one itself.
        self.penalty_elsewhere = False
        # Trainer compares with the exact names when it loads a checkpoint, and then reports none missing.
        self._keys_to_ignore_on_save = self.frozen_names()
        # Every process loads the backbone itself; torch's DistributedDataParallel need not send it around.
        self._ddp_params_and_buffers_to_ignore = sorted(self._keys_to_ignore_on_save)
        self._given_up = False
        note_use(self, base)

    def give_up(self) -> None:
        """Leaves the backbone to a later model of the same options: this one is refused from now on."""
        self._given_up = True
        self.register_forward_pre_hook(lambda *_: self.check_not_given_up())

    def check_not_given_up(self) -> None:
        """Raises UserError where another model trains this one's weights."""
        if self._given_up:
            raise UserError(
                f"this model of {self.meft_config.method} cannot be used any more: a later one was made of "
                "the same base and trains the same weights; use that one, or load the base anew for each"
            )

    def cast_to_run(self, dtype: torch.dtype) -> None:
        """Casts the weights of a backbone that trains, to run with them: training is then refused."""
        for part in ("encoder", "decoder"):
            if hasattr(self, part):
                getattr(self, part).to(dtype)
        self._cast_to_run = True

    def refuse_training_in_half(self) -> None:
        """Raises UserError in training where the weights that train were cast to half precision to run."""
        if self._cast_to_run and self.training and self.encoder.dtype in HALF:
            dtype = str(self.encoder.dtype).removeprefix("torch.")
            raise UserError(
                f"{self.meft_config.method} trains the backbone's own weights in float32, and this model was "
                f"loaded with dtype {dtype}: load it without dtype to train it, under autocast (bf16 or fp16)"
            )

    def check_frozen(self) -> None:
        """Raises UserError where a parameter of the backbone was unfrozen that the method neither trains nor
        saves."""
        found = [name for name, _ in self._training_parameters() if not self._is_saved(name)]
        if found:
            method = self.meft_config.method
            raise UserError(
                f"{some_of(found)} would train, but {method} trains and saves others alone: call "
                "requires_grad_(False) on them, or use FullConfig; save_pretrained(..., save_backbone=True) "
                "writes them too"
            )

    def _tell_of_hooks(self) -> None:
        """Warns of forward hooks that do not run: on parts that are run in steps of their own."""
        if torch.compiler.is_compiling():
            return
        for name in ("encoder", "decoder", "side_network"):
            part = getattr(self, name, None)
            if part is not None and (part._forward_hooks or part._forward_pre_hooks):
                warnings.warn(
                    f"forward hooks of {name} do not run, as it is never called as a whole: put them on its "
                    "layers, or on the model",
                    stacklevel=3,
                )

    def _tell_of_unfrozen(self) -> None:
        """Warns once of parameters of a frozen encoder that ask for gradients, which never come: those that
        somebody unfroze, or peft's inside it."""
        if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return
        if not any(parameter.requires_grad for parameter in self.encoder.parameters()):
            return
        trained = {name for name, _ in self._training_parameters()}
        asking = (f"encoder.{name}" for name, each in self.encoder.named_parameters() if each.requires_grad)
        if idle := [name for name in asking if name not in trained]:
            method = self.meft_config.method
            warn_once(
                f"{some_of(idle)} would train, but {method} runs the encoder without gradients, so that they "
                "stay as they are: FullConfig trains the encoder, LoRAConfig puts LoRA's weights into it"
            )

    def _training_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that training would change, by name. Those of a frozen encoder are not among them,
        whatever was unfrozen: no gradient enters it but SHERL's, beside it, in its last layer and norm."""
        options, never, but = self.meft_config, (), ()
        if options.frozen_encoder and options.method != "mezo":  # which needs no gradient
            never = ("encoder.",)
            if options.through_last_layer and options.placement == "encoder":
                but = (f"encoder.layers.{self.encoder.num_layers - 1}.", "encoder.layer_norm.")
        for name, parameter in self.named_parameters():
            plain = plain_name(name)
            if parameter.requires_grad and (plain.startswith(but) or not plain.startswith(never)):
                yield name, parameter

    def check_method(self) -> None:
        """Raises UserError where the method's options do not fit the task or the backbone."""
        config = self.config
        self.meft_config.check_backbone(
            config.hidden_size, config.num_hidden_layers, config.max_source_positions
        )

    def build(self, base: PreTrainedModel, **place: Any) -> None:
        """Makes ``side_network`` and all else that the task needs beside ``encoder``; ``place``: the device
        and number format of what trains."""
        raise NotImplementedError

    def frozen_names(self) -> set[str]:
        """Names in ``state_dict`` of the tensors that stay as they were loaded."""
        return {f"encoder.{name}" for name in self.encoder.frozen_names()}

    def fingerprint(self) -> str:
        """A few of the backbone's weights in hexadecimal, to recognise it; empty where all that it is known
        by trains."""
        return fingerprint(self.encoder)

    @property
    def tuned(self) -> nn.Module:
        """What holds all that a method trains inside the backbone."""
        return self.encoder

    def write_backbone(self, folder: str | os.PathLike) -> None:
        """Writes the backbone as an ordinary Hugging Face folder, which the task needs nothing else for."""
        write_backbone(self.encoder, folder)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every part initialises itself, and the backbone is already loaded."""

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.conv1

    def saved_names(self) -> set[str]:
        """Names of the tensors that :meth:`save_pretrained` writes: all but those that stay as loaded."""
        return {name for name in self.state_dict() if self._is_saved(name)}

    def check_config(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises UserError where ``tensors``, to be saved, are not those that the config describes, so that
        nobody could load them."""

    def _is_saved(self, name: str) -> bool:
        return plain_name(name) not in self._keys_to_ignore_on_save

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise UserError(
                "gradient checkpointing with use_reentrant=True would lose the gradients behind frozen "
                "layers; use_reentrant=False is accepted"
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    @property
    def states_read(self) -> tuple[int, ...]:
        """Indices of the hidden states that the method reads; h_0 is the embedding, h_i layer i's output.

        Raises:
            UserError: the method trains inside the encoder, so that its states change with every step.
        """
        if not self.meft_config.frozen_encoder:
            raise UserError(
                f"hidden states cannot be computed ahead for {self.meft_config.method}, which trains inside "
                "the encoder"
            )
        return states_read(self.side_network, self.encoder.num_layers)

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Chooses the encoder's attention: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` or another that
        transformers knows.

        Raises:
            UserError: there is none of this name.
        """
        known = ["eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]
        if attn_implementation not in known:
            raise UserError(
                f"attn_implementation must be one of {', '.join(known)}, got {attn_implementation!r}"
            )
        self.encoder.config._attn_implementation = attn_implementation

    def penalty(self) -> torch.Tensor | None:
        """What the method adds to the loss in training, a scalar, or None.

        The loss that :meth:`forward` returns holds it. Where you compute another from the scores, add it
        there and say so by ``penalty_elsewhere = True``.
        """
        return None if self._adapter_is_off else self.meft_config.penalty(self.tuned)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model is the plain Whisper that it was made of, as PEFT's models are in
        theirs: the side network is left out, LoRA and adapters add nothing. Behind it all is as before.

        In it ``model.encoder(input_features, output_hidden_states=True)`` gives the hidden states of
        transformers' encoder, whatever the method; a recogniser transcribes as its backbone does, also by
        ``generate``; a classifier's head, which has nothing plain to go back to, reads the mean over time of
        the plain encoder's output. States of a feature cache are refused.

        Raises:
            UserError: the method trains the backbone's own weights: full, bitfit and mezo; or it is merged in
                here.
        """
        before = self._adapter_is_off
        with self.meft_config.switched_off(self.tuned):
            self._adapter_is_off = True
            try:
                yield
            finally:
                self._adapter_is_off = before

    def refuse_stored(self) -> None:
        """Raises UserError where the adapter is disabled: states computed ahead are those that it reads."""
        if self._adapter_is_off:
            raise UserError(
                "hidden_states cannot be used in disable_adapter(), which needs what the method does not "
                "read: give input_features"
            )

    def _frames_to_compute(
        self, features: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The features to encode, and the clips' lengths (B,) in encoder frames or None if padding counts."""
        max_frames = self.meft_config.max_frames
        if max_frames == "fidelity" or not isinstance(features, torch.Tensor) or features.ndim != 3:
            return features, None  # the encoder reports a wrong shape
        # The encoder counts pairs of frames: what lies behind the clip's end in the last pair is cut here.
        if attention_mask is None:
            frames = frames_with_sound(features)
        else:
            frames = frames_of_mask(attention_mask, features)
        if isinstance(max_frames, int):
            features = features[..., : 2 * max_frames]
        past_end = torch.arange(features.shape[2], device=features.device) >= frames[:, None]
        features = features.masked_fill(past_end[:, None, :], 0)
        # A clip without sound counts as one frame, so that means and softmaxes stay finite.
        return features, ((frames + 1) // 2).clamp(1, max((features.shape[2] + 1) // 2, 1))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of parameters that training changes and of all. Of a frozen encoder none counts, whatever
        was unfrozen, but where SHERL's gradient goes: no other enters it."""
        trainable = sum(parameter.numel() for _, parameter in self._training_parameters())
        return trainable, sum(parameter.numel() for parameter in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Prints how much of the model trains, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: "
            f"{100 * trainable / total:.4f}"
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        save_backbone: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes what was trained, the options and the labels; the frozen backbone only when asked to.

        Each file is written beside its place and renamed, so there is never half a file.

        Args:
            save_directory: folder, made as needed. Gets ``config.json``, ``model.safetensors`` and a
                ``README.md`` where there is none.
            is_main_process: ``False`` writes nothing (other processes of a distributed run).
            state_dict: tensors to save instead of the model's own, such as those gathered from several
                processes, or of a wrapper around it (``module.``, ``_orig_mod.``): all that trains, at least.
            push_to_hub: upload the folder afterwards; ``repo_id`` and :meth:`push_to_hub`'s options in
                ``kwargs``.
            save_backbone: also write the encoder to ``backbone/`` and refer to it there: the folder then
                needs nothing else.
            kwargs: options of ``PreTrainedModel.save_pretrained`` that have no meaning here are ignored.

        Raises:
            UserError: the folder cannot be written, or is the backbone's own; ``state_dict`` lacks a tensor;
                the config has other sizes or no usable labels; without ``save_backbone``, a parameter was
                unfrozen that would not be saved.
        """
        if is_main_process:
            save(self, Path(save_directory), state_dict, save_backbone)
            if push_to_hub:
                repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
                self.push_to_hub(repo_id, save_backbone=save_backbone, state_dict=state_dict, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        save_backbone: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        commit_message: str = "Upload side network",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Uploads what :meth:`save_pretrained` writes to the model hub.

        Args:
            repo_id: name of the repository, made as needed.
            save_backbone, state_dict: see :meth:`save_pretrained`.
            commit_message, private, token, revision, create_pr: see ``huggingface_hub.HfApi``.
            kwargs: other options of ``PreTrainedModel.push_to_hub`` are ignored.

        Raises:
            UserError: the backbone is a local folder, which nobody else could find.
        """
        options = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
        return upload(self, repo_id, state_dict, save_backbone, private, token, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        backbone: str | os.PathLike | nn.Module | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        quantization: str | None = None,
        device: str | torch.device | None = None,
        attention: str | None = None,
        **kwargs: Any,
    ) -> "MeftBase":
        """Loads a saved model and the backbone that it belongs to.

        Args:
            pretrained_model_name_or_path: folder that :meth:`save_pretrained` wrote, or its name on the model
                hub.
            backbone: hub name, folder, or loaded Whisper model of the task to use instead of the one that the
                saved config names.
            dtype: number format of the backbone's weights; unset takes the saved one. The rest is float32.
                In half precision a model whose method trains the backbone's own weights runs, but does not
                train.
            attn_implementation: the backbone's attention, as in transformers.
            quantization: of the backbone, ``"int8"``, ``"fp8"``, ``"nf4"`` or ``"none"``; unset: the
                saved one.
            device: where the model goes; the backbone is quantised there.
            attention: of a UniPT, where it is not to be run with that which it was trained with: ``"exact"``,
                ``"pooled:8"`` or whatever else ``UniPTConfig`` takes.
            kwargs: ``device_map``, which is one device or ``"auto"``, in the place of ``device``;
                ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``;
                ``subfolder`` of a local folder; ``config`` is accepted for the Auto classes, and
                ``torch_dtype``, the earlier name of ``dtype``.

        Returns:
            The model in evaluation mode.

        Raises:
            UserError: folder, config, weights or backbone are missing, damaged or do not belong together.
        """
        return load(
            cls,
            pretrained_model_name_or_path,
            backbone=backbone,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization=quantization,
            device=device,
            attention=attention,
            **kwargs,
        )


def check_tensors(**arguments: Any) -> None:
    """Raises UserError, by name, for one of forward's arguments that is neither a tensor nor None."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, torch.Tensor):
            kind = type(value)
            raise UserError(
                f"{name} must be a torch.Tensor, got {kind.__module__.partition('.')[0]}'s {kind.__name__}: "
                "turn arrays and lists into tensors first (return_tensors='pt' of the feature extractor)"
            )


def check_sizes(config: PreTrainedConfig, encoder: FrozenEncoder) -> None:
    """Raises UserError unless ``encoder`` has the sizes in ``config``, a MeftModelConfig or WhisperConfig."""
    expected = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_mel_bins": config.num_mel_bins,
        "max_source_positions": config.max_source_positions,
    }
    found = {
        "hidden_size": encoder.hidden_size,
        "num_hidden_layers": encoder.num_layers,
        "num_mel_bins": encoder.num_mel_bins,
        "max_source_positions": encoder.max_source_positions,
    }
    wrong = [f"{k} is {found[k]} where {expected[k]} is needed" for k in expected if found[k] != expected[k]]
    if wrong:
        raise UserError(f"the backbone does not fit the side network: {', '.join(wrong)}")

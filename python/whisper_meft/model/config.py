"""What is saved of a model beside its weights."""

from transformers.configuration_utils import PreTrainedConfig

TASKS = ("classification", "transcription")


class MeftModelConfig(PreTrainedConfig):
    """What ``config.json`` of a saved model holds.

    Attributes:
        task: what the model does, "classification" or "transcription".
        meft: the method's options, see :meth:`whisper_meft.MeftConfig.to_dict`.
        base_model_name_or_path: the backbone: hub name, absolute folder, or folder relative to this file.
        base_model_fingerprint: a few of its weights, to recognise it
            (:func:`whisper_meft.encoder.fingerprint.fingerprint`).
        quantization_revision: how the backbone was rounded that it was trained on
            (:data:`whisper_meft.encoder.quantization.REVISION`); None where it was not, or before there were
            several.
        hidden_size, num_hidden_layers, num_mel_bins, max_source_positions: the backbone's sizes, of its
            encoder.
        decoder_layers, vocab_size, max_target_positions: those of its decoder, of a model that transcribes.
        calibration_temperature: what a classifier's logits are divided by, but in training; None: nothing.
        rejection_threshold: probability below which `whisper-meft predict --reject_below saved` rejects.
        classifier_proj_size: width of the projector. Labels are in ``id2label`` and ``label2id`` as usual.
    """

    model_type = "whisper_meft"

    task: str = "classification"
    meft: dict | None = None
    base_model_name_or_path: str | None = None
    base_model_fingerprint: str | None = None
    quantization_revision: int | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_mel_bins: int = 80
    max_source_positions: int = 1500
    classifier_proj_size: int = 256
    decoder_layers: int | None = None
    vocab_size: int | None = None
    max_target_positions: int | None = None
    calibration_temperature: float | None = None
    rejection_threshold: float | None = None

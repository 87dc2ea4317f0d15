"""What a training run shows of itself while it runs."""

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback


class ProgressBar(ProgressCallback):
    """The Trainer's progress bars without its log lines."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class LogLines(PrinterCallback):
    """Log lines for people, above the progress bar where there is one."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        head = f"epoch {logs.get('epoch', 0):6.2f}  "
        if "eval_accuracy" in logs:
            tqdm.write(
                f"{head}evaluation: accuracy {logs['eval_accuracy']:.2%}, mean class accuracy "
                f"{logs['eval_mean_class_accuracy']:.2%}, macro-F1 {logs['eval_macro_f1']:.4f}, "
                f"loss {logs['eval_loss']:.4f}"
            )
        elif "eval_loss" in logs:
            rates = ""
            if "eval_wer" in logs:
                rates = (
                    f"WER {logs['eval_normalized_wer']:.1%} ({logs['eval_wer']:.1%} as written), "
                    f"CER {logs['eval_normalized_cer']:.1%} ({logs['eval_cer']:.1%}), "
                )
            tqdm.write(f"{head}evaluation: {rates}loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            rates = (
                f"  {logs['utterances_per_second']:.3g} utterances/s"
                if "utterances_per_second" in logs
                else ""
            )
            rate = logs.get("learning_rate", 0)
            tqdm.write(f"{head}loss {logs['loss']:.4f}  learning rate {rate:.2e}{rates}")

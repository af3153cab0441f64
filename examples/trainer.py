"""Hugging Face's Trainer: the model is compiled in place, and the logits that nobody reads are dropped.

python examples/trainer.py
"""

from __future__ import annotations

import tempfile

from common import OPTIONS, batches, run, show_reports, small_llama
from transformers import Trainer, TrainingArguments


def main(steps: int) -> list[float]:
    model = small_llama()
    # The model returns (loss, logits); the Trainer reads the loss only.
    model.compile(backend="mstc", options={**OPTIONS, "unused_outputs": [1]}, dynamic=False)
    data = [{"input_ids": ids[0], "labels": ids[0]} for ids in batches(2 * steps)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
    show_reports()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    run(main, __doc__)
